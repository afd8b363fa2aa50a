"""From a cloud of points to a map: the points above each cell of the ground become one feature vector.

Source: PointPillars (arXiv:1812.05784), section 2.1; without limits on counts ("dynamic"): arXiv:1910.06528.
Letters: B batch, P points, N occupied pillars, S slots of a pillar, F point features, C channels, Y X rows,
columns. Points are rows of x, y, z (m, LiDAR frame) and further measurements. Everything here runs in fp32,
autocast or
not: bfloat16 places a point 50 m away no better than to 0.25 m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import Config
from ..errors import ConfigError, DataError
from ..grid import BevGrid
from .processes import values_per_channel

Reduction = Literal["max", "mean"]
NORM_EPS = 1e-3


class DynamicPillarsConfig(Config, frozen=True):
    """Pillars that keep every point. The default for training from scratch.

    Each layer but the first also sees the pillar's maximum of the layer before. `intensity_scale` multiplies
    the fourth column: 1 keeps the 0-255 that published weights expect, 1/255 brings it to the others' range.
    `virtual_flag_column` is where points tell whether a sensor measured them (`data.virtual_points`): there
    the network sees 1 for virtual points and 0 for all others.
    """

    channels: tuple[int, ...] = (64,)
    point_features: int = 5
    z_range_m: tuple[float, float] = (-5.0, 3.0)
    intensity_scale: float = 1.0
    reduction: Reduction = "max"
    with_distance: bool = False
    virtual_flag_column: int | None = None

    def __post_init__(self) -> None:
        _check(self.channels, self.point_features, self.z_range_m)
        column = self.virtual_flag_column
        if column is not None and not 3 <= column < self.point_features:
            raise ConfigError(
                f"virtual_flag_column={column}; points of {self.point_features} columns have measurements "
                f"in columns 3 to {self.point_features - 1}"
            )


class HardPillarsConfig(Config, frozen=True):
    """Pillars with a fixed number of slots, as in the published 0.2 m CenterPoint.

    Empty slots take part in the maximum and in batch statistics, so weights trained so need it so.
    `offset_axes`: "xyz" is the encoder of mmdetection3d 1.x, which also measures from the middle of the
    height range. `overwrite_xy` is that of the earliest releases, where the offset from the pillar's centre
    also replaced the raw x and y.
    """

    channels: tuple[int, ...] = (64,)
    point_features: int = 5
    z_range_m: tuple[float, float] = (-5.0, 3.0)
    intensity_scale: float = 1.0
    reduction: Reduction = "max"
    with_distance: bool = False
    offset_axes: Literal["xy", "xyz"] = "xy"
    overwrite_xy: bool = False
    max_points: int = 20
    max_pillars: int = 30_000
    max_pillars_eval: int = 40_000

    def __post_init__(self) -> None:
        _check(self.channels, self.point_features, self.z_range_m)
        if min(self.max_points, self.max_pillars, self.max_pillars_eval) < 1:
            raise ConfigError("max_points, max_pillars and max_pillars_eval must be at least 1")


def _check(channels: tuple[int, ...], point_features: int, z_range_m: tuple[float, float]) -> None:
    if not channels or min(channels) < 1:
        raise ConfigError(f"channels={channels}; expected at least one layer's width")
    if point_features < 3:
        raise ConfigError(f"point_features={point_features}; points need at least x, y and z")
    if z_range_m[0] >= z_range_m[1]:
        raise ConfigError(f"z_range_m={z_range_m}; expected the lower limit first")


@dataclass
class Slots:
    """Points in pillars: points (N, S, F), empty slots zero; counts (N,); cells (N,) over the batch."""

    points: Tensor
    counts: Tensor
    cells: Tensor


class DynamicPillars(nn.Module):
    """Encodes points by a linear layer, batch norm, ReLU and the maximum over each pillar."""

    def __init__(self, config: DynamicPillarsConfig, grid: BevGrid, norm_momentum: float = 0.01) -> None:
        super().__init__()
        self.config = config
        self.grid = grid
        self.out_channels = config.channels[-1]
        widths = [config.point_features + 5 + config.with_distance, *(2 * c for c in config.channels[:-1])]
        self.pfn_layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(in_channels, out_channels, bias=False),
                PointNorm(out_channels, eps=NORM_EPS, momentum=norm_momentum),
                nn.ReLU(inplace=True),
            )
            for in_channels, out_channels in zip(widths, config.channels, strict=True)
        )

    def forward(self, points: list[Tensor]) -> Tensor:
        """One (P, F) cloud per sample -> (B, C, Y, X), zero where no point is."""
        features, cells = self.encode(points)
        return scatter_to_map(features, cells, len(points), self.grid)

    def encode(self, points: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(P, F) clouds -> features (N, C) and ascending cells (N,) of the occupied pillars."""
        flat, cells = flatten_batch(points, self.config, self.grid)
        if self.config.virtual_flag_column is not None:
            flag = flat[:, self.config.virtual_flag_column]
            flag.copy_(flag < 0)  # `flat` is ours, the caller's points keep their flags
        counts = torch.bincount(cells, minlength=len(points) * _num_cells(self.grid))
        # Numbering the occupied cells by a running sum needs no sort, which `unique` would.
        occupied = counts > 0
        pillar = (occupied.cumsum(0) - 1)[cells]
        pillar_cells = occupied.nonzero().squeeze(1)
        counts = counts[pillar_cells, None].to(flat.dtype)

        with torch.autocast(flat.device.type, enabled=False):
            xyz = flat[:, :3]
            mean = flat.new_zeros(len(pillar_cells), 3).index_add(0, pillar, xyz) / counts
            parts = [flat, xyz - mean[pillar], xyz[:, :2] - cell_centres(cells, self.grid)]
            if self.config.with_distance:
                parts.append(xyz.norm(dim=1, keepdim=True))
            features = torch.cat(parts, dim=1)
            pooled = features.new_zeros(len(pillar_cells), 0)
            for i, layer in enumerate(self.pfn_layers):
                if i > 0:
                    features = torch.cat([features, pooled[pillar]], dim=1)
                features = layer(features)
                pooled = self._pool(features, pillar, counts)
        return pooled, pillar_cells

    def _pool(self, features: Tensor, pillar: Tensor, counts: Tensor) -> Tensor:
        pooled = features.new_zeros(len(counts), features.shape[1])
        if self.config.reduction == "mean":
            return pooled.index_add(0, pillar, features) / counts
        # Features are not negative, so the zeros they meet here change no maximum.
        return pooled.scatter_reduce(0, pillar[:, None].expand_as(features), features, "amax")


class HardPillars(nn.Module):
    """Encodes the first points of each pillar, slot by slot."""

    def __init__(self, config: HardPillarsConfig, grid: BevGrid, norm_momentum: float = 0.01) -> None:
        super().__init__()
        self.config = config
        self.grid = grid
        self.out_channels = config.channels[-1]
        in_channels = config.point_features + 3 + len(config.offset_axes) + config.with_distance
        last = len(config.channels) - 1
        layers = []
        for i, channels in enumerate(config.channels):
            layers.append(PillarLayer(in_channels, channels, i == last, config.reduction, norm_momentum))
            in_channels = channels
        self.pfn_layers = nn.ModuleList(layers)

    def forward(self, points: list[Tensor]) -> Tensor:
        """One (P, F) cloud per sample -> (B, C, Y, X), zero where no point is."""
        config = self.config
        flat, cells = flatten_batch(points, config, self.grid)
        max_pillars = config.max_pillars if self.training else config.max_pillars_eval
        slots = fill_slots(flat, cells, _num_cells(self.grid), len(points), config.max_points, max_pillars)
        return scatter_to_map(self.encode(slots), slots.cells, len(points), self.grid)

    def encode(self, slots: Slots) -> Tensor:
        """Slots -> (N, C) features of the pillars."""
        points, counts = slots.points, slots.counts[:, None, None]
        with torch.autocast(points.device.type, enabled=False):
            xyz = points[..., :3]
            mean = xyz.sum(dim=1, keepdim=True) / counts
            offset = xyz[..., :2] - cell_centres(slots.cells, self.grid)[:, None]
            parts = [points, xyz - mean, offset]
            if self.config.overwrite_xy:
                parts[0] = torch.cat([offset, points[..., 2:]], dim=-1)
            if self.config.offset_axes == "xyz":
                parts.append(xyz[..., 2:] - sum(self.config.z_range_m) / 2)
            if self.config.with_distance:
                parts.append(xyz.norm(dim=-1, keepdim=True))
            filled = torch.arange(points.shape[1], device=points.device)[:, None] < counts  # (N, S, 1)
            features = torch.cat(parts, dim=-1) * filled
            for layer in self.pfn_layers:
                features = layer(features, counts)
        return features.flatten(1)


class PillarLayer(nn.Module):
    """Linear, batch norm, ReLU, then the maximum (or mean) over ALL slots, empty ones included.

    The last layer gives that alone, (N, 1, C); others give it behind each slot's own half of the channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, last: bool, reduction: Reduction, norm_momentum: float
    ) -> None:
        super().__init__()
        width = out_channels if last else out_channels // 2
        self.last = last
        self.reduction = reduction
        self.linear = nn.Linear(in_channels, width, bias=False)
        self.norm = PointNorm(width, eps=NORM_EPS, momentum=norm_momentum)

    def forward(self, features: Tensor, counts: Tensor) -> Tensor:
        """(N, S, F) and counts (N, 1, 1) -> (N, 1 or S, C)."""
        # Batch statistics are summed more exactly over a contiguous (N, C, S) tensor.
        channels_first = self.linear(features).transpose(1, 2).contiguous()
        own = self.norm(channels_first).transpose(1, 2).relu()
        pooled = (
            own.amax(dim=1, keepdim=True) if self.reduction == "max" else own.sum(1, keepdim=True) / counts
        )
        return pooled if self.last else torch.cat([own, pooled.expand_as(own)], dim=-1)


class PointNorm(nn.BatchNorm1d):
    """Batch norm that survives clouds of no point or a single one: there it takes the running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and values_per_channel(input) <= 1:
            return functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps
            )
        return super().forward(input)


def _num_cells(grid: BevGrid) -> int:
    rows, columns = grid.shape
    return rows * columns


def cell_centres(cells: Tensor, grid: BevGrid) -> Tensor:
    """(N,) cells over the batch -> (N, 2) x and y of their centres, metres."""
    rows, columns = grid.shape
    index = torch.stack([cells % columns, cells // columns % rows], dim=1)
    low = [grid.x_range_m[0] + grid.cell_m / 2, grid.y_range_m[0] + grid.cell_m / 2]
    return index * grid.cell_m + torch.tensor(low, device=cells.device)


def point_cells(points: Tensor, grid: BevGrid, z_range_m: tuple[float, float], num_layers: int = 1) -> Tensor:
    """(P, >=3) points -> (P,) int64, (layer * Y + row) * X + column of each, -1 outside the ranges.

    Lower limits are inside, upper ones outside. Float32 and a true division, as voxelisation is done
    everywhere else: in float64, or times the reciprocal, points on a border would change cells.
    """
    rows, columns = grid.shape
    low = points.new_tensor([grid.x_range_m[0], grid.y_range_m[0], z_range_m[0]])
    size = points.new_tensor([grid.cell_m, grid.cell_m, (z_range_m[1] - z_range_m[0]) / num_layers])
    cell = ((points[:, :3] - low) / size).floor()
    inside = ((cell >= 0) & (cell < cell.new_tensor([columns, rows, num_layers]))).all(dim=1)  # False for NaN
    column, row, layer = torch.where(inside[:, None], cell, 0).long().unbind(dim=1)
    return torch.where(inside, (layer * rows + row) * columns + column, -1)


class PointFormat(Protocol):
    """What every point encoder's configuration says about the points it takes."""

    @property
    def point_features(self) -> int: ...
    @property
    def z_range_m(self) -> tuple[float, float]: ...
    @property
    def intensity_scale(self) -> float: ...


def flatten_batch(
    points: list[Tensor], config: PointFormat, grid: BevGrid, num_layers: int = 1
) -> tuple[Tensor, Tensor]:
    """Clouds of a batch -> (P, F) points inside the ranges and (P,) their cells, numbered over the batch.

    Raises:
        DataError: a cloud has another number of columns than the encoder was built for.
    """
    for sample, cloud in enumerate(points):
        if cloud.ndim != 2 or cloud.shape[1] != config.point_features:
            raise DataError(
                f"points of sample {sample} have shape {tuple(cloud.shape)}; expected (P, "
                f"{config.point_features}): set point_features to what the loader gives"
            )
    flat = torch.cat(points).float()
    lengths = torch.tensor([len(cloud) for cloud in points], device=flat.device)
    sample = torch.arange(len(points), device=flat.device).repeat_interleave(lengths)
    cells = point_cells(flat, grid, config.z_range_m, num_layers)
    inside = (cells >= 0).nonzero().squeeze(1)
    flat = flat[inside]
    if config.intensity_scale != 1 and config.point_features > 3:
        flat[:, 3] *= config.intensity_scale
    return flat, cells[inside] + sample[inside] * (num_layers * _num_cells(grid))


def fill_slots(
    points: Tensor, cells: Tensor, cells_per_sample: int, batch_size: int, max_points: int, max_pillars: int
) -> Slots:
    """Hard voxelisation: pillars in the order in which points open them, points in their order.

    When a sample has opened `max_pillars`, points of new pillars are skipped, while opened ones still fill;
    points beyond `max_points` of a pillar are ignored.

    Args:
        points: (P, F) of all samples one after the other. cells: (P,), numbered over the batch.
    """
    order = torch.arange(len(points), device=points.device)
    opener_of_cell = order.new_full((batch_size * cells_per_sample,), len(points))
    opener = opener_of_cell.scatter_reduce_(0, cells, order, "amin")[cells]  # (P,) who opened my pillar
    opens = opener == order
    sample = cells // cells_per_sample
    opened_by_sample = torch.bincount(sample[opens], minlength=batch_size)
    earlier_samples = opened_by_sample.cumsum(0) - opened_by_sample
    rank = (opens.cumsum(0) - 1)[opener] - earlier_samples[sample]
    within_limit = rank < max_pillars
    opens &= within_limit

    pillar = (opens.cumsum(0) - 1)[opener]
    by_pillar = order[within_limit]
    by_pillar = by_pillar[pillar[by_pillar].argsort(stable=True)]
    pillar = pillar[by_pillar]
    slot = torch.arange(len(pillar), device=points.device) - torch.searchsorted(pillar, pillar)
    fits = slot < max_points
    num_pillars = int(opens.sum())
    slots = points.new_zeros(num_pillars, max_points, points.shape[1])
    slots[pillar[fits], slot[fits]] = points[by_pillar[fits]]
    counts = torch.bincount(pillar, minlength=num_pillars).clamp(max=max_points)
    return Slots(points=slots, counts=counts, cells=cells[opens])


def fill_slots_by_loop(
    points: Tensor, cells: Tensor, cells_per_sample: int, batch_size: int, max_points: int, max_pillars: int
) -> Slots:
    """The slow, readable twin of `fill_slots`: walks the points."""
    pillars: dict[int, list[int]] = {}
    opened = [0] * batch_size
    for i, cell in enumerate(cells.tolist()):
        sample = cell // cells_per_sample
        if cell not in pillars:
            if opened[sample] == max_pillars:
                continue
            opened[sample] += 1
            pillars[cell] = []
        if len(pillars[cell]) < max_points:
            pillars[cell].append(i)
    slots = points.new_zeros(len(pillars), max_points, points.shape[1])
    for pillar, members in enumerate(pillars.values()):
        slots[pillar, : len(members)] = points[members]
    counts = torch.tensor([len(members) for members in pillars.values()], dtype=torch.int64)
    return Slots(points=slots, counts=counts, cells=torch.tensor(list(pillars), dtype=torch.int64))


def scatter_to_map(features: Tensor, cells: Tensor, batch_size: int, grid: BevGrid) -> Tensor:
    """(N, C) features and (N,) distinct cells over the batch -> (B, C, Y, X), zero elsewhere."""
    # Channels first from the start: turning the pillars around is cheap, turning the map is not.
    canvas = features.new_zeros(features.shape[1], batch_size * _num_cells(grid))
    canvas.index_copy_(1, cells, features.t().contiguous())
    return canvas.view(-1, batch_size, *grid.shape).transpose(0, 1).contiguous()
