"""The LiDAR detector with object queries: the teacher of BEVFormer, with its map and its head.

Source: DistillBEV (ICCV 2023), the teachers called LiDARFormer and MVPFormer; Deformable DETR
(arXiv:2010.04159) for the encoder's layers. Letters: B batch, P points, C channels, S cells along a side, Y X
rows and columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..boxes import Boxes3D
from ..config import Config
from ..data.schema import Batch
from ..errors import ConfigError, DataError
from ..grid import BevGrid
from .attention import DeformableAttention, FeedForward, cell_reference, flatten_maps
from .feature_pyramid import FeaturePyramid
from .outputs import BevMap, DetectorOutput, labelled_boxes
from .pillars import DynamicPillars, DynamicPillarsConfig, HardPillars, HardPillarsConfig
from .query_head import QueryHead, QueryHeadConfig
from .second import NORM_EPS, Second, SecondConfig
from .voxels import SparseVoxels, SparseVoxelsConfig


class QueryEncoderConfig(Config, frozen=True):
    """Layers that bring the levels of a pyramid onto one grid of queries.

    `embedding_spread`: standard deviation of the cells' learned codes at the start. The reference's 1 outshouts
    what the points say until it has been unlearned; a short training starts from less.
    """

    layers: int = 6
    heads: int = 8
    points: int = 4
    ffn_channels: int = 512
    dropout: float = 0.1
    embedding_spread: float = 1.0

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.points) < 1:
            raise ConfigError(
                f"layers={self.layers}, heads={self.heads}, points={self.points}; expected 1 or more of each"
            )


class LidarQueryTeacherConfig(Config, frozen=True):
    """The whole detector; the defaults are LiDARFormer's.

    `voxel_grid` is that of the points, `grid` that of the queries: the student's, so that maps correspond
    cell by cell. The box heights of the head are those of the points.
    """

    grid: BevGrid = BevGrid(cell_m=0.512)
    voxel_grid: BevGrid = BevGrid(cell_m=0.064)
    z_range_m: tuple[float, float] = (-5.0, 3.0)
    points: SparseVoxelsConfig | HardPillarsConfig | DynamicPillarsConfig = SparseVoxelsConfig()
    backbone: SecondConfig = SecondConfig(channels=(128, 256), layers=(5, 5), strides=(1, 2))
    levels: int = 4
    channels: int = 256
    encoder: QueryEncoderConfig = QueryEncoderConfig()
    head: QueryHeadConfig = QueryHeadConfig()
    norm_momentum: float = 0.01

    def __post_init__(self) -> None:
        if not self.grid.covers_same_ground(self.voxel_grid):
            raise ConfigError(
                f"grid spans x {self.grid.x_range_m}, y {self.grid.y_range_m} m, voxel_grid "
                f"{self.voxel_grid.x_range_m}, {self.voxel_grid.y_range_m}; both must span the same ground"
            )
        for name, heads in (("encoder.heads", self.encoder.heads), ("head.heads", self.head.heads)):
            if self.channels % heads or self.channels % 4:
                raise ConfigError(f"channels={self.channels}; expected a multiple of 4 and of {name}={heads}")


class QueryEncoderLayer(nn.Module):
    """Each cell looks into all levels around its own place, then thinks it over."""

    def __init__(self, config: QueryEncoderConfig, channels: int, levels: int) -> None:
        super().__init__()
        self.cross_attention = DeformableAttention(channels, config.heads, levels, config.points)
        self.feed_forward = FeedForward(channels, config.ffn_channels, config.dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, query: Tensor, position: Tensor, value: Tensor, shapes: list[tuple[int, int]], reference: Tensor
    ) -> Tensor:
        """(B, Q, C) queries and (Q, C) positions -> (B, Q, C)."""
        update = self.cross_attention(query + position, value, shapes, reference)
        query = self.norms[0](query + self.dropout(update))
        return self.norms[1](query + self.dropout(self.feed_forward(query)))


class QueryEncoder(nn.Module):
    """Learned queries, one per cell, gather a pyramid over the same ground."""

    def __init__(self, config: QueryEncoderConfig, channels: int, levels: int, grid: BevGrid) -> None:
        super().__init__()
        self.grid = grid
        rows, columns = grid.shape
        self.bev_embedding = nn.Embedding(rows * columns, channels)
        nn.init.normal_(self.bev_embedding.weight, std=config.embedding_spread)
        self.layers = nn.ModuleList(QueryEncoderLayer(config, channels, levels) for _ in range(config.layers))

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Levels (B, C, Y_l, X_l), fine to coarse -> (B, C, Y, X)."""
        value, shapes = flatten_maps(levels)
        query = self.bev_embedding.weight.expand(len(value), -1, -1)
        position = sine_position(self.grid.shape, query.shape[-1], query.device)
        reference = cell_reference(self.grid.shape, query.device)[None]
        for layer in self.layers:
            query = layer(query, position, value, list(shapes), reference)
        return query.transpose(1, 2).unflatten(2, self.grid.shape)


class LidarQueryTeacher(nn.Module):
    """A detector (see `Detector`) on LiDAR points; its BEV map "head" is what BEVFormer imitates."""

    def __init__(self, config: LidarQueryTeacherConfig) -> None:
        super().__init__()
        self.config = config
        momentum = config.norm_momentum
        if isinstance(config.points, SparseVoxelsConfig):
            self.points = SparseVoxels(config.points, config.voxel_grid, momentum)
        elif isinstance(config.points, HardPillarsConfig):
            self.points = HardPillars(config.points, config.voxel_grid, momentum)
        else:
            self.points = DynamicPillars(config.points, config.voxel_grid, momentum)
        self.backbone = Second(config.backbone, self.points.out_channels, momentum)
        self.neck = FeaturePyramid(
            config.backbone.channels, config.channels, config.levels, True, NORM_EPS, momentum
        )
        self.encoder = QueryEncoder(config.encoder, config.channels, config.levels, config.grid)
        self.head = QueryHead(config.head, config.channels, config.grid, config.z_range_m)

    @property
    def bev_channels(self) -> dict[str, int]:
        return {"head": self.config.channels}

    def forward(self, batch: Batch) -> DetectorOutput:
        """Reads `batch.points` only.

        Raises:
            DataError: the batch has no points.
        """
        if batch.points is None:
            raise DataError("this batch has no LiDAR points, and this teacher sees nothing else; load points")
        stages = self.backbone(self.points(batch.points))
        bev = self.encoder(self.neck(stages))
        return DetectorOutput(bev={"head": BevMap(bev, self.config.grid)}, queries=self.head(bev))

    def loss(self, output: DetectorOutput, batch: Batch) -> dict[str, Tensor]:
        """The head's weighted terms; their sum is the detection loss.

        Raises:
            DataError: a sample has no labels.
        """
        assert output.queries is not None
        return self.head.loss(output.queries, labelled_boxes(batch))

    def decode(self, output: DetectorOutput) -> list[Boxes3D]:
        """Detections of every sample, in the LiDAR frame that the points were in."""
        assert output.queries is not None
        return self.head.decode(output.queries)


def sine_position(shape: tuple[int, int], channels: int, device: torch.device | str = "cpu") -> Tensor:
    """(Y*X, C): sines and cosines of a cell's row, then of its column, at wavelengths up to 10000 times 2 pi.

    Source: DETR (arXiv:2005.12872), appendix A.4, with its half-cell offset.
    """
    half = channels // 2
    wavelength = 10000 ** (2 * (torch.arange(half, device=device) // 2) / half)
    codes = []
    for size in shape:
        angle = (torch.arange(size, device=device) + 0.5) / (size + 1e-6) * 2 * math.pi
        phase = angle[:, None] / wavelength  # (size, half)
        codes.append(torch.stack([phase[:, 0::2].sin(), phase[:, 1::2].cos()], dim=-1).flatten(1))
    rows, columns = shape
    row = codes[0][:, None].expand(-1, columns, -1)
    column = codes[1].expand(rows, -1, -1)
    return torch.cat([row, column], dim=-1).flatten(0, 1)
