"""Convolution on the occupied cells of a 3-D grid; the cost grows with their number, not with the grid.

Source: Graham et al., Submanifold Sparse Convolutional Networks (arXiv:1711.10275); the gather, multiply,
scatter scheme: SECOND (Sensors 2018, 18(10), 3337), section 3.1.2.
Letters: B batch, Z Y X layers, rows and columns of the grid, N occupied cells (sites), C channels, K cells of
a kernel.

A *rulebook* lists, for each cell of the kernel, which input site meets which output site. Sites are kept in
the order of their linear index, so a neighbour is found by binary search, and neighbours along x lie side by
side.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..errors import ConfigError
from .spconv_backend import convolve_spconv

Triple = tuple[int, int, int]  # along z, y, x
PAIRS_PER_BLOCK = 2**15  # fewer and the calls' own cost shows, more and a CPU's cache overflows
PAIRS_PER_BLOCK_GPU = 2**20  # bounds memory: 1 GB with 128 channels in and out


@dataclass(frozen=True)
class Block:
    """The pairs that add to the output sites from `first` to before `last`.

    Attributes:
        steps: kernel cell, input sites and output sites of its pairs; cells without pairs are left out.
        order: (P,) the pairs, counted through all steps, sorted by output site.
        starts: (last - first,) where each output site's pairs begin in `order`.
    """

    first: int
    last: int
    steps: list[tuple[int, Tensor, Tensor]]
    order: Tensor
    starts: Tensor


@dataclass(frozen=True)
class Rulebook:
    """Pairs of sites by kernel cell: site `inputs[k][i]` adds to site `outputs[k][i]` through weight k.

    Each list ascends. `identity` is the kernel cell that meets every site with itself (its lists are empty), or
    None.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    num_inputs: int
    num_outputs: int
    identity: int | None = None

    @cached_property
    def transposed(self) -> Rulebook:
        """The way of the gradients: outputs add to inputs."""
        return Rulebook(self.outputs, self.inputs, self.num_outputs, self.num_inputs, self.identity)

    @cached_property
    def blocks(self) -> list[Block]:
        """All pairs, block after block of the output sites, so that what is gathered stays in a CPU's cache."""
        device = self.outputs[0].device
        counts = torch.bincount(torch.cat(self.outputs), minlength=self.num_outputs)
        starts = counts.cumsum(0) - counts
        # Place of each pair among those sorted by output site: behind the pairs of earlier kernel cells.
        places: list[Tensor] = []
        next_places = starts.clone()
        for outputs in self.outputs:
            places.append(next_places.index_select(0, outputs))
            next_places.index_copy_(0, outputs, places[-1] + 1)

        listed = sum(map(len, self.outputs))
        per_block = PAIRS_PER_BLOCK if device.type == "cpu" else PAIRS_PER_BLOCK_GPU
        num_blocks = max(1, round(listed / per_block))
        edges = torch.linspace(0, self.num_outputs, num_blocks + 1).long()
        borders = [torch.searchsorted(outputs, edges.to(device)).tolist() for outputs in self.outputs]
        blocks = []
        first_pair = 0
        for block, (first, last) in enumerate(pairwise(edges.tolist())):
            cuts = [slice(at[block], at[block + 1]) for at in borders]
            place = torch.cat([places[k][cut] for k, cut in enumerate(cuts)]) - first_pair
            order = torch.empty_like(place, dtype=torch.int32)
            order[place] = torch.arange(len(place), dtype=torch.int32, device=device)
            steps = [
                (k, self.inputs[k][cut], self.outputs[k][cut])
                for k, cut in enumerate(cuts)
                if cut.start < cut.stop
            ]
            blocks.append(Block(first, last, steps, order, (starts[first:last] - first_pair).int()))
            first_pair += len(place)
        return blocks

    @property
    def num_pairs(self) -> int:
        return sum(map(len, self.inputs)) + (0 if self.identity is None else self.num_outputs)


@dataclass
class Sites:
    """The occupied cells of a batch of 3-D grids.

    Rulebooks are made once and kept here, so all layers that work on the same sites share them.

    Attributes:
        cells: (N,) int64, ascending and distinct: ((b * Z + z) * Y + y) * X + x.
        shape: (B, Z, Y, X).
        by_spconv: layers on these sites, and on all that come of them, compute with spconv (spconv_backend.py).
    """

    cells: Tensor
    shape: tuple[int, int, int, int]
    by_spconv: bool = False
    _submanifold: dict[Triple, Rulebook] = field(default_factory=dict, repr=False)
    _strided: dict[tuple[Triple, Triple, Triple], tuple[Sites, Rulebook]] = field(
        default_factory=dict, repr=False
    )
    _spconv_tables: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_coordinates(
        cls, coordinates: Tensor, shape: tuple[int, int, int, int], by_spconv: bool = False
    ) -> tuple[Sites, Tensor]:
        """(N, 4) distinct rows of sample, z, y, x -> sites, and (N,) the order that sorts the rows."""
        sample, z, y, x = coordinates.long().unbind(dim=1)
        _, Z, Y, X = shape
        cells, order = (((sample * Z + z) * Y + y) * X + x).sort()
        return cls(cells, shape, by_spconv), order

    def __len__(self) -> int:
        return len(self.cells)

    def coordinates(self) -> Tensor:
        """(N, 4) int64: sample, z, y, x."""
        _, Z, Y, X = self.shape
        rows = self.cells // X
        layers = rows // Y
        return torch.stack([layers // Z, layers % Z, rows % Y, self.cells % X], dim=1)

    def submanifold(self, kernel: Triple) -> Rulebook:
        """Output sites are the input sites. The kernel's sizes are odd."""
        if kernel not in self._submanifold:
            self._submanifold[kernel] = _submanifold_rulebook(self, kernel)
        return self._submanifold[kernel]

    def strided(self, kernel: Triple, stride: Triple, padding: Triple) -> tuple[Sites, Rulebook]:
        """Output sites are those whose window holds an input site."""
        key = (kernel, stride, padding)
        if key not in self._strided:
            self._strided[key] = _strided_rulebook(self, kernel, stride, padding)
        return self._strided[key]


@dataclass
class SparseTensor:
    """Features (N, C) of the sites, in their order; zero everywhere else."""

    features: Tensor
    sites: Sites

    def with_features(self, features: Tensor) -> SparseTensor:
        return replace(self, features=features)

    def dense(self) -> Tensor:
        """(B, C, Z, Y, X)."""
        B, Z, Y, X = self.sites.shape
        # Channels first from the start: turning the sites around is cheap, turning the grid is not.
        canvas = self.features.new_zeros(self.features.shape[1], B * Z * Y * X)
        canvas.index_copy_(1, self.sites.cells, self.features.t().contiguous())
        return canvas.view(-1, B, Z, Y, X).transpose(0, 1).contiguous()


class SubmanifoldConv3d(nn.Module):
    """Convolution evaluated at the occupied sites only, which stay as they are; zero padding, no bias.

    `weight` is (out, kz, ky, kx, in), as public checkpoints (spconv 2) hold it.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Triple = (3, 3, 3)) -> None:
        super().__init__()
        if any(size % 2 == 0 for size in kernel):
            raise ConfigError(f"kernel={kernel}; a submanifold convolution needs a middle: odd sizes")
        self.kernel = kernel
        self.weight = nn.Parameter(_initial_weight(in_channels, out_channels, kernel))

    def forward(self, tensor: SparseTensor) -> SparseTensor:
        if _suits_spconv(tensor, self.weight):
            return _convolve_spconv(tensor, self.weight, (1, 1, 1), (0, 0, 0), submanifold=True)
        rulebook = tensor.sites.submanifold(self.kernel)
        return tensor.with_features(convolve(tensor.features, self.weight, rulebook))


class SparseConv3d(nn.Module):
    """Convolution whose output sites are all those whose window holds an occupied one; no bias.

    `weight` is (out, kz, ky, kx, in), as public checkpoints (spconv 2) hold it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Triple = (3, 3, 3),
        stride: Triple = (1, 1, 1),
        padding: Triple = (0, 0, 0),
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.weight = nn.Parameter(_initial_weight(in_channels, out_channels, kernel))

    def forward(self, tensor: SparseTensor) -> SparseTensor:
        if _suits_spconv(tensor, self.weight):
            return _convolve_spconv(tensor, self.weight, self.stride, self.padding, submanifold=False)
        sites, rulebook = tensor.sites.strided(self.kernel, self.stride, self.padding)
        return SparseTensor(convolve(tensor.features, self.weight, rulebook), sites)


def _initial_weight(in_channels: int, out_channels: int, kernel: Triple) -> Tensor:
    weight = torch.empty(out_channels, *kernel, in_channels)
    fan_in = in_channels * kernel[0] * kernel[1] * kernel[2]
    return nn.init.normal_(
        weight, std=(2 / fan_in) ** 0.5
    )  # Kaiming, of the input; sites have few neighbours


def _suits_spconv(tensor: SparseTensor, weight: Tensor) -> bool:
    """spconv takes neither empty batches nor our layout of kernels that have one cell only."""
    return tensor.sites.by_spconv and len(tensor.sites) > 0 and weight[0, ..., 0].numel() > 1


def _convolve_spconv(
    tensor: SparseTensor, weight: Tensor, stride: Triple, padding: Triple, submanifold: bool
) -> SparseTensor:
    sites = tensor.sites
    features, coordinates = convolve_spconv(
        tensor.features,
        sites.coordinates().int(),
        sites.shape,
        weight,
        stride,
        padding,
        submanifold,
        sites._spconv_tables,
    )
    if submanifold:
        return tensor.with_features(features)
    kernel = (weight.shape[1], weight.shape[2], weight.shape[3])
    out_sites, order = Sites.from_coordinates(
        coordinates, _strided_shape(sites.shape, kernel, stride, padding), by_spconv=True
    )
    return SparseTensor(features.index_select(0, order), out_sites)


def convolve(features: Tensor, weight: Tensor, rulebook: Rulebook) -> Tensor:
    """Applies a rulebook. Under autocast in its type, with sums in float32.

    Args:
        features: (N, C_in) of the input sites. weight: (C_out, kz, ky, kx, C_in).

    Returns:
        (rulebook.num_outputs, C_out).
    """
    device = features.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        features, weight = features.to(dtype), weight.to(dtype)
    kernels = (
        weight.flatten(1, 3).permute(1, 2, 0).contiguous()
    )  # (K, C_in, C_out), one matrix after the other
    with torch.autocast(device, enabled=False):
        return _GatherMultiplyScatter.apply(features, kernels, rulebook)  # pyright: ignore[reportReturnType]


class _GatherMultiplyScatter(torch.autograd.Function):
    """Keeps the input features only; what was gathered from them is gathered again on the way back."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, kernels: Tensor, rulebook: Rulebook) -> Tensor:
        ctx.save_for_backward(features, kernels)
        ctx.rulebook = rulebook
        return _apply(features, kernels, rulebook)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        features, kernels = ctx.saved_tensors
        rulebook: Rulebook = ctx.rulebook
        grad = grad_outputs[0].contiguous()
        grad_features = grad_kernels = None
        if ctx.needs_input_grad[0]:
            grad_features = _apply(grad, kernels.transpose(1, 2).contiguous(), rulebook.transposed)
        if ctx.needs_input_grad[1]:
            sums = torch.zeros_like(kernels, dtype=_sum_type(kernels))
            if rulebook.identity is not None:
                sums[rulebook.identity] = features.t() @ grad
            for block in rulebook.blocks:
                for k, inputs, outputs in block.steps:
                    sums[k] += features.index_select(0, inputs).t() @ grad.index_select(0, outputs)
            grad_kernels = sums.to(kernels.dtype)
        return grad_features, grad_kernels, None


def _apply(features: Tensor, kernels: Tensor, rulebook: Rulebook) -> Tensor:
    """Features (N, C_in) of the input sites, kernels (K, C_in, C_out) -> (num_outputs, C_out)."""
    result = features.new_empty(rulebook.num_outputs, kernels.shape[2])
    # Memory costs more to get than to fill: what one step gathers and one block multiplies is got once.
    sizes = [[len(inputs) for _, inputs, _ in block.steps] for block in rulebook.blocks]
    room = features.new_empty(max((max(steps, default=0) for steps in sizes), default=0), features.shape[1])
    products = features.new_empty(max(map(sum, sizes)), kernels.shape[2])
    matrices = kernels.unbind()
    for block, steps in zip(rulebook.blocks, sizes, strict=True):
        done = sum(steps)
        parts = products[:done].split(steps)
        for (k, inputs, _), size, part in zip(block.steps, steps, parts, strict=True):
            gathered = torch.index_select(features, 0, inputs, out=room.narrow(0, 0, size))
            torch.mm(gathered, matrices[k], out=part)
        # Each site's products in one go: on a CPU far faster than adding them to scattered places.
        wide = products[:done].to(_sum_type(products))
        sums = functional.embedding_bag(block.order, wide, block.starts, mode="sum")
        rows = slice(block.first, block.last)
        if rulebook.identity is not None:
            sums += features[rows] @ matrices[rulebook.identity]
        result[rows] = sums
    return result


def _sum_type(tensor: Tensor) -> torch.dtype:
    """At least float32: a bfloat16 sum would lose small addends."""
    return torch.promote_types(tensor.dtype, torch.float32)


def convolve_dense(
    tensor: SparseTensor, weight: Tensor, stride: Triple, padding: Triple, submanifold: bool
) -> SparseTensor:
    """The slow, readable twin of both layers: a dense convolution, read at the sites that are occupied."""
    dense = functional.conv3d(tensor.dense(), weight.permute(0, 4, 1, 2, 3), stride=stride, padding=padding)
    sites = tensor.sites
    if not submanifold:
        occupied = tensor.with_features(tensor.features.new_ones(len(sites), 1)).dense()
        window = tensor.features.new_ones(1, 1, *weight.shape[1:4])
        reached = functional.conv3d(occupied, window, stride=stride, padding=padding) > 0.5
        B, _, Z, Y, X = dense.shape
        sites = Sites(reached.flatten().nonzero().squeeze(1), (B, Z, Y, X))
    return SparseTensor(dense.movedim(1, -1).flatten(0, 3)[sites.cells], sites)


def _submanifold_rulebook(sites: Sites, kernel: Triple) -> Rulebook:
    """Looks up the neighbours earlier in the order; the later ones are the same pairs turned around."""
    reach_z, reach_y, reach_x = (size // 2 for size in kernel)
    _, Z, Y, X = sites.shape
    # With room between rows, layers and samples a neighbour beyond the border is a cell that nobody occupies.
    sample, z, y, x = sites.coordinates().unbind(dim=1)
    row_length = X + reach_x
    layer_length = (Y + reach_y) * row_length
    keys = (sample * (Z + reach_z) + z) * layer_length + y * row_length + x
    sentinel = keys.new_full((1,), -(2**62))
    padded_keys = torch.cat([keys, sentinel])

    earlier: list[tuple[Tensor, Tensor]] = []  # (neighbour, site), by kernel cell up to the middle
    for dz, dy in product(range(-reach_z, reach_z + 1), range(-reach_y, reach_y + 1)):
        if (dz, dy) > (0, 0):
            break
        wanted = keys + (dz * layer_length + dy * row_length - reach_x)
        position = torch.searchsorted(keys, wanted)
        for _ in range(reach_x if (dz, dy) == (0, 0) else kernel[2]):
            hit = padded_keys.index_select(0, position) == wanted
            found = hit.nonzero().squeeze(1)
            earlier.append((position.index_select(0, found), found))
            position += hit
            wanted += 1

    none = keys.new_empty(0)
    later = [(site, neighbour) for neighbour, site in reversed(earlier)]
    pairs = [*earlier, (none, none), *later]
    inputs, outputs = zip(*pairs, strict=True)
    return Rulebook(inputs, outputs, len(sites), len(sites), identity=len(earlier))


def _strided_shape(
    shape: tuple[int, int, int, int], kernel: Triple, stride: Triple, padding: Triple
) -> tuple[int, int, int, int]:
    B, *extents = shape
    Z, Y, X = (
        (extent + 2 * p - k) // s + 1
        for extent, k, s, p in zip(extents, kernel, stride, padding, strict=True)
    )
    if min(Z, Y, X) < 1:
        raise ConfigError(
            f"a convolution with kernel {kernel} and padding {padding} (z, y, x) finds no place in a grid of "
            f"{tuple(extents)} cells; use fewer strided layers or smaller cells"
        )
    return B, Z, Y, X


def _strided_rulebook(
    sites: Sites, kernel: Triple, stride: Triple, padding: Triple
) -> tuple[Sites, Rulebook]:
    out_shape = _strided_shape(sites.shape, kernel, stride, padding)
    out_extents = out_shape[1:]
    sample, *axes = sites.coordinates().unbind(dim=1)
    weights = (out_extents[1] * out_extents[2], out_extents[2], 1)
    # By axis and place in the kernel: which sites stand there in some window, and its part of the index.
    steps: list[list[tuple[Tensor, Tensor]]] = []
    for axis, out_extent, k, s, p, weight in zip(
        axes, out_extents, kernel, stride, padding, weights, strict=True
    ):
        along = []
        for place in range(k):
            start = axis + (p - place)
            window = torch.div(start, s, rounding_mode="floor")
            fits = (window * s == start) & (window >= 0) & (window < out_extent)
            along.append((fits, window * weight))
        steps.append(along)

    sample_start = sample * (out_extents[0] * weights[0])
    inputs: list[Tensor] = []
    cells: list[Tensor] = []
    for fits_z, part_z in steps[0]:
        for fits_y, part_y in steps[1]:
            fits_zy, part_zy = fits_z & fits_y, sample_start + part_z + part_y
            for fits_x, part_x in steps[2]:
                found = (fits_zy & fits_x).nonzero().squeeze(1)
                inputs.append(found)
                cells.append(part_zy.index_select(0, found) + part_x.index_select(0, found))
    out_cells, outputs = torch.cat(cells).unique(return_inverse=True)
    rulebook = Rulebook(
        tuple(inputs), outputs.split([len(i) for i in inputs]), len(sites), num_outputs=len(out_cells)
    )
    return Sites(out_cells, out_shape), rulebook
