"""From a cloud of points to a map through small voxels and a sparse 3-D encoder.

Source: SECOND (Sensors 2018, 18(10), 3337), section 3.1; in the residual form of CenterPoint
(arXiv:2006.11275), appendix. Letters: B batch, P points, F point features, N occupied voxels, C channels,
Z Y X layers, rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import ConfigError
from ..grid import BevGrid
from .pillars import (
    NORM_EPS,
    DynamicPillars,
    DynamicPillarsConfig,
    HardPillars,
    HardPillarsConfig,
    PointNorm,
    flatten_batch,
)
from .sparse_conv import Sites, SparseConv3d, SparseTensor, SubmanifoldConv3d, Triple
from .spconv_backend import built_for

MVP_COLUMNS = 17
ORIGIN_COLUMNS = 24


class SparseVoxelsConfig(Config, frozen=True):
    """Mean of the points in each voxel, then stages of sparse residual blocks, each half as fine as the last.

    The defaults are the published ones, with cells of 0.1 m or 0.075 m. `channels` holds the width of each
    stage. The first `max_points` points of a voxel count, and the first voxels that points open; None lifts a
    limit. `by_origin` takes MVP's 17 columns (`data.virtual_points`) and averages measured points and those with
    a class apart, as the released query teacher does; it had no limits. `use_spconv`: on a GPU the sparse layers
    compute with spconv where it is installed (`pip install spconv-cu126`, or of another CUDA); False keeps to torch.
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    out_channels: int = 128
    blocks_per_stage: int = 2
    point_features: int = 5
    z_range_m: tuple[float, float] = (-5.0, 3.0)
    z_cell_m: float = 0.2
    intensity_scale: float = 1.0
    by_origin: bool = False
    max_points: int | None = 10
    max_voxels: int | None = 90_000
    max_voxels_eval: int | None = 120_000
    use_spconv: bool = True

    def __post_init__(self) -> None:
        if not self.channels or min(*self.channels, self.out_channels) < 1 or self.blocks_per_stage < 0:
            raise ConfigError(
                f"channels={self.channels}, out_channels={self.out_channels}, "
                f"blocks_per_stage={self.blocks_per_stage}; expected a positive width per stage"
            )
        if self.point_features < 3:
            raise ConfigError(f"point_features={self.point_features}; points need at least x, y and z")
        if self.by_origin and self.point_features != MVP_COLUMNS:
            raise ConfigError(
                f"by_origin with point_features={self.point_features}; points that tell their origin have "
                f"{MVP_COLUMNS} columns"
            )
        low, high = self.z_range_m
        layers = (high - low) / self.z_cell_m if self.z_cell_m > 0 else 0.0
        if layers < 1 or abs(layers - round(layers)) > 1e-6 * layers:
            raise ConfigError(
                f"z_range_m={self.z_range_m} holds {layers:.2f} cells of z_cell_m={self.z_cell_m}; "
                "choose a range that is a whole, positive number of cells"
            )
        if any(n is not None and n < 1 for n in (self.max_points, self.max_voxels, self.max_voxels_eval)):
            raise ConfigError("max_points, max_voxels and max_voxels_eval must be at least 1, or None")
        if self.out_layers < 1:
            raise ConfigError(
                f"{round(layers)} cells of {self.z_cell_m} m in height are too few for {len(self.channels)} "
                "stages that each halve them; use fewer stages or smaller cells"
            )

    @property
    def voxel_features(self) -> int:
        return ORIGIN_COLUMNS - 1 if self.by_origin else self.point_features

    @property
    def num_layers(self) -> int:
        """Voxels on top of each other."""
        return round((self.z_range_m[1] - self.z_range_m[0]) / self.z_cell_m)

    @property
    def stride(self) -> int:
        """Cells of the grid along one cell of the map."""
        return 2 ** (len(self.channels) - 1)

    @property
    def out_layers(self) -> int:
        """Layers of the last stage, which become channels of the map."""
        layers = self.num_layers + 1
        for last in self.z_unpadded:
            layers = (layers - 3 + (0 if last else 2)) // 2 + 1
        return (layers - 3) // 2 + 1

    @property
    def z_unpadded(self) -> tuple[bool, ...]:
        """Per halving, whether it goes without padding along z: the last one does."""
        halvings = len(self.channels) - 1
        return tuple(i == halvings - 1 for i in range(halvings))


class SparseVoxels(nn.Module):
    """Points to map: voxel means, sparse encoder, layers laid side by side as channels."""

    def __init__(self, config: SparseVoxelsConfig, grid: BevGrid, norm_momentum: float = 0.01) -> None:
        super().__init__()
        self.config = config
        self.grid = grid
        self.out_channels = config.out_channels * config.out_layers
        first = config.channels[0]
        self.conv_input = nn.Sequential(
            SubmanifoldConv3d(config.voxel_features, first), SparseNorm(first, norm_momentum)
        )
        self.encoder_layers = nn.ModuleDict()
        next_widths = (*config.channels[1:], None)
        z_unpadded = (*config.z_unpadded, False)
        for i, (width, next_width) in enumerate(zip(config.channels, next_widths, strict=True)):
            parts: list[nn.Module] = [
                ResidualBlock(width, norm_momentum) for _ in range(config.blocks_per_stage)
            ]
            if next_width is not None:
                padding = (0 if z_unpadded[i] else 1, 1, 1)
                parts.append(
                    sparse_conv_norm(width, next_width, (3, 3, 3), (2, 2, 2), padding, norm_momentum)
                )
            self.encoder_layers[f"encoder_layer{i + 1}"] = nn.Sequential(*parts)
        self.conv_out = sparse_conv_norm(
            config.channels[-1], config.out_channels, (3, 1, 1), (2, 1, 1), (0, 0, 0), norm_momentum
        )

    def forward(self, points: list[Tensor]) -> Tensor:
        """One (P, F) cloud per sample -> (B, C * Z, Y, X), zero where nothing is."""
        return self.encode(self.voxelise(points))[-1]

    def voxelise(self, points: list[Tensor]) -> SparseTensor:
        """Clouds -> mean features (N, F) of the occupied voxels."""
        config = self.config
        rows, columns = self.grid.shape
        flat, cells = flatten_batch(points, config, self.grid, config.num_layers)
        limit = config.max_voxels if self.training else config.max_voxels_eval
        cells_per_sample = config.num_layers * rows * columns
        if config.by_origin:
            flat = split_by_origin(flat)
        features, cells = mean_voxels(flat, cells, cells_per_sample, len(points), config.max_points, limit)
        if config.by_origin:
            features = undo_shares(features)
        # One layer more than there are voxels, as in the published encoders: it decides how layers pair up.
        sample, inside = cells // cells_per_sample, cells % cells_per_sample
        shape = (len(points), config.num_layers + 1, rows, columns)
        by_spconv = config.use_spconv and features.is_cuda and built_for() == "cuda"
        return SparseTensor(features, Sites(sample * (shape[1] * rows * columns) + inside, shape, by_spconv))

    def encode(self, voxels: SparseTensor) -> tuple[list[SparseTensor], Tensor]:
        """Voxels -> what each stage gave, and the map (B, C * Z, Y, X); channel c of layer z is c * Z + z."""
        tensor = self.conv_input(voxels)
        stages = []
        for stage in self.encoder_layers.values():
            tensor = stage(tensor)
            stages.append(tensor)
        return stages, self.conv_out(tensor).dense().flatten(1, 2)


class SparseNorm(PointNorm):
    """Batch norm over the occupied sites of the batch, then ReLU."""

    def __init__(self, channels: int, momentum: float) -> None:
        super().__init__(channels, eps=NORM_EPS, momentum=momentum)

    def forward(self, input: SparseTensor) -> SparseTensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return input.with_features(super().forward(input.features).relu_())


class ResidualBlock(nn.Module):
    """Two submanifold convolutions, each with batch norm, around which the input is added; ReLU."""

    def __init__(self, channels: int, norm_momentum: float) -> None:
        super().__init__()
        self.conv1 = SubmanifoldConv3d(channels, channels)
        self.bn1 = SparseNorm(channels, norm_momentum)
        self.conv2 = SubmanifoldConv3d(channels, channels)
        self.bn2 = PointNorm(channels, eps=NORM_EPS, momentum=norm_momentum)

    def forward(self, tensor: SparseTensor) -> SparseTensor:
        hidden = self.conv2(self.bn1(self.conv1(tensor)))
        return hidden.with_features((self.bn2(hidden.features) + tensor.features).relu_())


def sparse_conv_norm(
    in_channels: int,
    out_channels: int,
    kernel: Triple,
    stride: Triple,
    padding: Triple,
    norm_momentum: float,
) -> nn.Sequential:
    """Strided sparse convolution, batch norm, ReLU; parts named as in public checkpoints."""
    return nn.Sequential(
        SparseConv3d(in_channels, out_channels, kernel, stride, padding),
        SparseNorm(out_channels, norm_momentum),
    )


PointEncoderConfig = HardPillarsConfig | DynamicPillarsConfig | SparseVoxelsConfig
PointEncoder = HardPillars | DynamicPillars | SparseVoxels


def build_point_encoder(config: PointEncoderConfig, grid: BevGrid, norm_momentum: float) -> PointEncoder:
    """The encoder that a configuration describes; takes clouds and gives a map on `encoder_grid`."""
    match config:
        case HardPillarsConfig():
            return HardPillars(config, grid, norm_momentum)
        case DynamicPillarsConfig():
            return DynamicPillars(config, grid, norm_momentum)
        case SparseVoxelsConfig():
            return SparseVoxels(config, grid, norm_momentum)


def encoder_grid(config: PointEncoderConfig, grid: BevGrid) -> BevGrid:
    """The grid of the map that an encoder makes of cells on `grid`."""
    return grid.coarser(config.stride) if isinstance(config, SparseVoxelsConfig) else grid


def split_by_origin(points: Tensor) -> Tensor:
    """(P, 17) points of MVP -> (P, 24): each writes only the columns of its origin, so that means do not mix.

    Measured points: x, y, z, intensity, column 4, time in columns 0-5, and 1 in the last. Points with a class,
    measured copies and virtual ones: columns 0-14 in 6-20, their flag in 21, 1 for copies in 22.
    """
    flag = points[:, 15:16]
    measured = flag > 0
    own = points[:, [0, 1, 2, 3, 4, 16]] * measured
    classified = torch.cat([points[:, :15], flag, (flag == 0).to(flag.dtype)], dim=1) * ~measured
    return torch.cat([own, classified, measured.to(flag.dtype)], dim=1)


def undo_shares(means: Tensor) -> Tensor:
    """(N, 24) means of `split_by_origin` -> (N, 23): each origin's mean over its own points."""
    share = means[:, -1:]
    mixed = (share > 0) & (share < 1)
    own, classified = torch.where(mixed, share, 1), torch.where(mixed, 1 - share, 1)
    return torch.cat([means[:, :6] / own, means[:, 6:-1] / classified], dim=1)


def mean_voxels(
    points: Tensor,
    cells: Tensor,
    cells_per_sample: int,
    batch_size: int,
    max_points: int | None,
    max_voxels: int | None,
) -> tuple[Tensor, Tensor]:
    """Mean of the points in each occupied voxel.

    Args:
        points: (P, F) of all samples one after the other. cells: (P,), numbered over the batch.
        cells_per_sample, batch_size: what the numbers mean.
        max_points: of a voxel; later points are ignored.
        max_voxels: of a sample, in the order in which points open them; points elsewhere are ignored.

    Returns:
        features (N, F) and their cells (N,), ascending.
    """
    cells, order = cells.sort(stable=True)
    opens = torch.ones_like(cells, dtype=torch.bool)
    opens[1:] = cells[1:] != cells[:-1]
    starts = opens.nonzero().squeeze(1)  # (N,)
    voxel = opens.cumsum(0) - 1  # (P,)
    voxel_cells = cells[starts]
    kept = torch.ones_like(cells, dtype=torch.bool)
    if max_points is not None:
        kept = torch.arange(len(cells), device=cells.device) - starts[voxel] < max_points
    if max_voxels is not None:
        # The sort is stable, so a voxel's first point is the one that opened it; points lie sample by sample.
        rank = torch.empty_like(starts)
        rank[order[starts].argsort()] = torch.arange(len(starts), device=cells.device)
        opened = torch.bincount(voxel_cells // cells_per_sample, minlength=batch_size)
        within = rank - (opened.cumsum(0) - opened)[voxel_cells // cells_per_sample] < max_voxels
        kept &= within[voxel]
        voxel = (within.cumsum(0) - 1)[voxel]
        voxel_cells = voxel_cells[within]
    chosen = kept.nonzero().squeeze(1)
    voxel, rows = voxel[chosen], points[order[chosen]]
    counts = torch.bincount(voxel, minlength=len(voxel_cells)).to(points.dtype)
    sums = points.new_zeros(len(voxel_cells), points.shape[1]).index_add(0, voxel, rows)
    return sums / counts[:, None], voxel_cells
