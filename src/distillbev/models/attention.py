"""Deformable attention: every query looks at a few places that it chooses itself.

Sources: Deformable DETR (arXiv:2010.04159), section 4.1; BEVFormer (arXiv:2203.17270), sections 3.2 to 3.4.
Letters: B batch, N cameras, Q queries, C channels, M heads, L levels, P points per head and level, D anchors
of a pillar, S cells of all levels together, H W rows and columns of a level.

Places are (x, y) from 0 to 1 over a whole map, 0 and 1 being the outer edges of its border cells. A map
outside its edges is zero. Maps of several levels are flattened row by row and joined along S; `shapes` has
(H, W) of each. The attentions here give what is to be added to the query; the sum is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

Shapes = Sequence[tuple[int, int]]
BILINEAR, ZEROS_OUTSIDE = 0, 0  # of grid_sampler_2d


def sample_deformably(value: Tensor, shapes: Shapes, places: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of bilinear samples, per head.

    Args:
        value: (B, S, M, C/M), the heads' maps.
        shapes: (H, W) of each level.
        places: (B, Q, M, L, P, 2).
        weights: (B, Q, M, L, P).

    Returns:
        (B, Q, C), heads side by side; fp32, since bf16 could not tell neighbouring cells apart.
    """
    B, Q, M = places.shape[:3]
    # Queries last: the sums over points then run along them.
    grid = (2 * places.float() - 1).permute(0, 2, 3, 4, 1, 5).flatten(0, 1)  # (B*M, L, P, Q, 2)
    shares = weights.float().permute(0, 2, 3, 4, 1).flatten(0, 1)  # (B*M, L, P, Q)
    result: Tensor | None = None
    for level, level_value in enumerate(
        value.float().split([rows * columns for rows, columns in shapes], dim=1)
    ):
        maps = level_value.permute(0, 2, 3, 1).reshape(B * M, -1, *shapes[level])  # (B*M, C/M, H, W)
        summed = WeightedSamples.apply(maps, grid[:, level], shares[:, level])
        result = summed if result is None else result + summed
    assert result is not None, shapes
    return result.reshape(B, -1, Q).transpose(1, 2)


class WeightedSamples(torch.autograd.Function):
    """Maps (N, C, H, W), grid (N, P, Q, 2) from -1 to 1, shares (N, P, Q) -> sums over the points (N, C, Q).

    The single samples, C/M numbers for each place, would be most of what a training step of BEVFormer keeps. They are
    taken again on the way back.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, grid: Tensor, shares: Tensor) -> Tensor:
        ctx.save_for_backward(maps, grid, shares)
        samples = functional.grid_sample(maps, grid, align_corners=False)  # (N, C, P, Q)
        return samples.mul_(shares[:, None]).sum(dim=2)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        (gradient,) = grad_outputs
        maps, grid, shares = ctx.saved_tensors
        samples = functional.grid_sample(maps, grid, align_corners=False)
        of_shares = samples.mul_(gradient[:, :, None]).sum(dim=1)
        of_samples = torch.mul(gradient[:, :, None], shares[:, None], out=samples)
        of_maps, of_grid = torch.ops.aten.grid_sampler_2d_backward(
            of_samples, maps, grid, BILINEAR, ZEROS_OUTSIDE, False, (True, True)
        )
        return of_maps, of_grid, of_shares


def sample_deformably_by_loop(value: Tensor, shapes: Shapes, places: Tensor, weights: Tensor) -> Tensor:
    """The slow twin of `sample_deformably`: one cell at a time."""
    B, Q, M, L, P = weights.shape
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(L)]
    rows_of_result = []
    for b in range(B):
        for q in range(Q):
            for m in range(M):
                total = value.new_zeros(value.shape[-1])
                for level, (H, W) in enumerate(shapes):
                    for p in range(P):
                        x = places[b, q, m, level, p, 0] * W - 0.5
                        y = places[b, q, m, level, p, 1] * H - 0.5
                        left, top = math.floor(x.item()), math.floor(y.item())
                        for row in (top, top + 1):
                            for column in (left, left + 1):
                                if 0 <= row < H and 0 <= column < W:
                                    nearness = (1 - (x - column).abs()) * (1 - (y - row).abs())
                                    cell = value[b, starts[level] + row * W + column, m]
                                    total = total + weights[b, q, m, level, p] * nearness * cell
                rows_of_result.append(total)
    return torch.stack(rows_of_result).reshape(B, Q, -1)


class DeformableAttention(nn.Module):
    """Queries look at one set of maps, each around its own reference point."""

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = offset_layer(channels, heads, levels, points)
        self.attention_weights = zero_layer(channels, heads * levels * points)
        self.value_proj = mixing_layer(channels)
        self.output_proj = mixing_layer(channels)

    def forward(self, query: Tensor, value: Tensor, shapes: Shapes, reference: Tensor) -> Tensor:
        """Lets every query look around its reference point.

        Args:
            query: (B, Q, C), its position already added.
            value: (B, S, C).
            shapes: (H, W) of each level.
            reference: (B or 1, Q, 2), the same on every level.

        Returns:
            (B, Q, C), to be added to the query.
        """
        M, L, P = self.heads, self.levels, self.points
        offsets = self.sampling_offsets(query).unflatten(-1, (M, L, P, 2))
        weights = (
            self.attention_weights(query).unflatten(-1, (M, L * P)).softmax(dim=-1).unflatten(-1, (L, P))
        )
        places = reference[:, :, None, None, None] + offsets / cells_of_levels(shapes, offsets)
        heads = self.value_proj(value).unflatten(-1, (M, -1))
        return self.output_proj(sample_deformably(heads, shapes, places, weights))


class TemporalSelfAttention(nn.Module):
    """BEV queries look at the BEV map of the frame before and at that of now.

    Source: BEVFormer, section 3.4. Offsets and weights are chosen by history and query together; the softmax
    is over the points of each map apart, and the two results are averaged.
    """

    def __init__(self, channels: int, heads: int, points: int) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = offset_layer(2 * channels, heads, 2, points)
        self.attention_weights = zero_layer(2 * channels, heads * 2 * points)
        self.value_proj = mixing_layer(channels)
        self.output_proj = mixing_layer(channels)

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        maps: tuple[Tensor, Tensor],
        references: tuple[Tensor, Tensor],
        shape: tuple[int, int],
    ) -> Tensor:
        """Lets every cell look at both maps around where it lies in them.

        Args:
            query: (B, Q, C), Q the cells row by row.
            position: (Q, C), added to the query where it chooses, not where it is looked at.
            maps: two of (B, Q, C), history and present.
            references: two of (B or 1, Q, 2), where each cell lies in the two maps.
            shape: (Y, X) of the maps.

        Returns:
            (B, Q, C), to be added to the query.
        """
        B = len(query)
        M, P = self.heads, self.points
        chooser = torch.cat([maps[0], query + position], dim=-1)
        offsets = (
            self.sampling_offsets(chooser).unflatten(-1, (M, 2, P, 2)) / cells_of_levels([shape], query)[0]
        )
        weights = self.attention_weights(chooser).unflatten(-1, (M, 2, P)).softmax(dim=-1)
        reference = torch.stack([r.expand(B, -1, -1) for r in references], dim=1)  # (B, 2, Q, 2)
        places = reference[:, :, :, None, None] + offsets.permute(0, 3, 1, 2, 4, 5)  # (B, 2, Q, M, P, 2)
        heads = self.value_proj(torch.stack(maps, dim=1)).unflatten(-1, (M, -1))  # (B, 2, Q, M, C/M)
        looked = sample_deformably(
            heads.flatten(0, 1),
            [shape],
            places.flatten(0, 1)[:, :, :, None],
            weights.permute(0, 3, 1, 2, 4).flatten(0, 1)[:, :, :, None],
        )
        return self.output_proj(looked.unflatten(0, (B, 2)).mean(dim=1))


class SpatialCrossAttention(nn.Module):
    """BEV queries look into the cameras that see the pillar above their cell.

    Source: BEVFormer, section 3.3. A camera counts for a query if it sees any anchor of its pillar; then all
    anchors are sampled there. The cameras' results are averaged.
    """

    def __init__(self, channels: int, heads: int, levels: int, points: int, anchors: int) -> None:
        super().__init__()
        assert points % anchors == 0, (points, anchors)
        self.heads, self.levels, self.points, self.anchors = heads, levels, points, anchors
        self.sampling_offsets = offset_layer(channels, heads, levels, points)
        self.attention_weights = zero_layer(channels, heads * levels * points)
        self.value_proj = mixing_layer(channels)
        self.output_proj = mixing_layer(channels)

    def forward(self, query: Tensor, value: Tensor, shapes: Shapes, sight: Sight) -> Tensor:
        """Lets every cell look into the cameras that see its pillar.

        Args:
            query: (B, Q, C).
            value: (B, N, S, C), image features.
            shapes: (H, W) of each level.
            sight: who sees what.

        Returns:
            (B, Q, C), to be added to the query; only the output's bias where no camera sees the pillar.
        """
        B, Q = query.shape[:2]
        M, L, P = self.heads, self.levels, self.points
        offsets = self.sampling_offsets(query)  # (B, Q, M*L*P*2)
        weights = self.attention_weights(query).unflatten(-1, (M, L * P)).softmax(dim=-1)

        def rows_of(per_query: Tensor) -> Tensor:
            return per_query.flatten(0, 1).index_select(0, sight.rows).unflatten(0, sight.found.shape)

        offsets_in_levels = rows_of(offsets).unflatten(-1, (M, L, P, 2)) / cells_of_levels(shapes, query)
        # Point p of a level belongs to anchor p modulo D.
        anchors = sight.anchors_uv.repeat(1, 1, P // self.anchors, 1)[:, :, None, None]
        places = anchors + offsets_in_levels  # (B*N, R, M, L, P, 2)
        heads = self.value_proj(value).flatten(0, 1).unflatten(-1, (M, -1))  # (B*N, S, M, C/M)
        looked = sample_deformably(heads, shapes, places, rows_of(weights).unflatten(-1, (L, P)))

        looked = (looked * sight.found[..., None]).flatten(0, 1)
        slots = looked.new_zeros(B * Q, looked.shape[-1]).index_add(0, sight.rows, looked)
        return self.output_proj(slots.unflatten(0, (B, Q)) / sight.cameras.clamp(min=1))


@dataclass
class Sight:
    """Which queries each camera sees, and where: found once per frame, for all layers.

    Few cameras see a cell, so each camera's queries are gathered, R rows of them: as many as any camera sees.

    Attributes:
        rows: (B*N*R,), the query of each row, numbered over the batch.
        found: (B*N, R) bool, False for rows that only pad.
        anchors_uv: (B*N, R, D, 2), the anchors of the rows' pillars in the camera's image, 0 to 1.
        cameras: (B, Q, 1), by how many cameras a query is seen.
    """

    rows: Tensor
    found: Tensor
    anchors_uv: Tensor
    cameras: Tensor


def find_sight(anchors_uv: Tensor, visible: Tensor) -> Sight:
    """Gathers each camera's queries.

    Args:
        anchors_uv: (B, N, Q, D, 2), the pillars' anchors in every image, 0 to 1.
        visible: (B, N, Q, D) bool, whether the camera sees the anchor.
    """
    B, _, Q, D = visible.shape
    sees = visible.any(dim=-1)  # (B, N, Q)
    longest = max(int(sees.sum(dim=-1).max()), 1)
    found, queries = sees.byte().sort(dim=-1, descending=True, stable=True)
    found, queries = found[..., :longest].bool(), queries[..., :longest]  # (B, N, R)
    rows = queries + torch.arange(B, device=queries.device)[:, None, None] * Q
    anchors = anchors_uv.gather(2, queries[..., None, None].expand(-1, -1, -1, D, 2))
    return Sight(rows.flatten(), found.flatten(0, 1), anchors.flatten(0, 1), sees.sum(dim=1)[..., None])


class FeedForward(nn.Module):
    """Two layers with a ReLU between, on every query alone; to be added to the query."""

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.widen = nn.Linear(channels, hidden)
        self.narrow = nn.Linear(hidden, channels)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.widen, self.narrow):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, query: Tensor) -> Tensor:
        return self.narrow(self.dropout(self.widen(query).relu()))


def cell_reference(shape: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """(Y, X) of a map -> (Y*X, 2): x and y of each cell's centre, 0 to 1, row by row."""
    rows, columns = shape
    y = (torch.arange(rows, device=device) + 0.5) / rows
    x = (torch.arange(columns, device=device) + 0.5) / columns
    return torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], dim=-1).flatten(0, 1)


def flatten_maps(maps: Sequence[Tensor]) -> tuple[Tensor, Shapes]:
    """Maps (B, C, H, W) of several levels -> (B, S, C) and their shapes."""
    flat = torch.cat([level.flatten(2) for level in maps], dim=2).transpose(1, 2)
    return flat, [(level.shape[-2], level.shape[-1]) for level in maps]


def cells_of_levels(shapes: Shapes, like: Tensor) -> Tensor:
    """(L, 1, 2): columns and rows of each level. Offsets are chosen in cells, places go from 0 to 1."""
    return torch.tensor(
        [[[columns, rows]] for rows, columns in shapes], dtype=torch.float32, device=like.device
    )


def offset_layer(in_channels: int, heads: int, groups: int, points: int) -> nn.Linear:
    """Chooses places, in cells; starts with the heads looking in different directions, point k at k + 1
    cells."""
    layer = zero_layer(in_channels, heads * groups * points * 2)
    angles = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
    directions = directions / directions.abs().amax(dim=-1, keepdim=True)
    steps = torch.arange(1, points + 1, dtype=torch.float32)
    bias = directions[:, None, None] * steps[:, None]  # (M, 1, P, 2)
    layer.bias = nn.Parameter(bias.expand(-1, groups, -1, -1).flatten())
    return layer


def zero_layer(in_channels: int, out_channels: int) -> nn.Linear:
    """Starts at zero: all points equally."""
    layer = nn.Linear(in_channels, out_channels)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def mixing_layer(channels: int) -> nn.Linear:
    layer = nn.Linear(channels, channels)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
