"""CenterPoint: pillars or voxels, trunk, neck, centre head. The LiDAR detector that teaches.

Source: CenterPoint (arXiv:2006.11275) on PointPillars (arXiv:1812.05784).
Letters: B batch, P points, C channels, Y X rows and columns.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..boxes import Boxes3D
from ..config import Config
from ..data.schema import Batch
from ..errors import ConfigError, DataError
from ..grid import BevGrid
from .bev_encoder import TopDownNeck, TopDownNeckConfig
from .center_head import CenterHead, CenterHeadConfig
from .outputs import BevMap, DetectorOutput, labelled_boxes
from .pillars import DynamicPillarsConfig, HardPillarsConfig
from .second import Second, SecondConfig, SecondFpn, SecondFpnConfig
from .voxels import SparseVoxelsConfig, build_point_encoder, encoder_grid


class CenterPointConfig(Config, frozen=True):
    """The whole detector; the defaults are the published one with 0.2 m pillars.

    `pillars` is the encoder of points and `grid` that of its pillars or voxels; the head's follows from the
    strides. `norm_momentum` is that of the batch norms before the head: published trainings are long and take
    0.01, a run of some hundred steps wants 0.1.
    """

    grid: BevGrid = BevGrid(cell_m=0.2)
    pillars: HardPillarsConfig | DynamicPillarsConfig | SparseVoxelsConfig = HardPillarsConfig()
    backbone: SecondConfig = SecondConfig()
    neck: SecondFpnConfig | TopDownNeckConfig = SecondFpnConfig()
    head: CenterHeadConfig = CenterHeadConfig()
    norm_momentum: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.norm_momentum <= 1:
            raise ConfigError(f"norm_momentum={self.norm_momentum}; expected a share in (0, 1]")
        _ = self.head_grid

    @property
    def stage_grids(self) -> tuple[BevGrid, ...]:
        """The grid of each stage of the backbone, fine to coarse."""
        grids = []
        grid = encoder_grid(self.pillars, self.grid)
        for stride in self.backbone.strides:
            grid = grid.coarser(stride)
            grids.append(grid)
        return tuple(grids)

    @property
    def head_grid(self) -> BevGrid:
        """The grid of the neck's result, on which the head works."""
        if isinstance(self.neck, TopDownNeckConfig):
            return self.stage_grids[0]
        if len(self.neck.upsample) != len(self.stage_grids):
            raise ConfigError(
                f"neck.upsample={self.neck.upsample} for {len(self.stage_grids)} stages of the backbone; "
                "give one factor per stage"
            )
        levels = [
            grid.coarser(1 / factor)
            for grid, factor in zip(self.stage_grids, self.neck.upsample, strict=True)
        ]
        if len({level.shape for level in levels}) != 1:
            raise ConfigError(
                f"neck.upsample={self.neck.upsample} brings the stages to maps of "
                f"{[level.shape for level in levels]}; "
                f"choose factors that undo backbone.strides={self.backbone.strides}"
            )
        return levels[0]


class CenterPoint(nn.Module):
    """A detector (see `Detector`) on LiDAR points; gives the BEV maps stage0, stage1, ... and head."""

    def __init__(self, config: CenterPointConfig) -> None:
        super().__init__()
        self.config = config
        momentum = config.norm_momentum
        self.pillars = build_point_encoder(config.pillars, config.grid, momentum)
        self.backbone = Second(config.backbone, self.pillars.out_channels, momentum)
        self.neck = (
            SecondFpn(config.neck, self.backbone.out_channels, momentum)
            if isinstance(config.neck, SecondFpnConfig)
            else TopDownNeck(self.backbone.out_channels, config.neck.out_channels, config.neck.upsample)
        )
        self.head = CenterHead(config.head, self.neck.out_channels, config.head_grid)

    @property
    def bev_channels(self) -> dict[str, int]:
        stages = {f"stage{i}": channels for i, channels in enumerate(self.backbone.out_channels)}
        return {**stages, "head": self.neck.out_channels}

    def forward(self, batch: Batch) -> DetectorOutput:
        """Reads `batch.points` only.

        Raises:
            DataError: the batch has no points.
        """
        if batch.points is None:
            raise DataError("this batch has no LiDAR points, and CenterPoint sees nothing else; load points")
        canvas = self.pillars(batch.points)  # (B, C, Y, X)
        stages = self.backbone(canvas)
        bev = self.neck(stages)
        maps = {
            f"stage{i}": BevMap(stage, grid)
            for i, (stage, grid) in enumerate(zip(stages, self.config.stage_grids, strict=True))
        }
        maps["head"] = BevMap(bev, self.head.grid)
        return DetectorOutput(bev=maps, heads=self.head(bev))

    def loss(self, output: DetectorOutput, batch: Batch) -> dict[str, Tensor]:
        """The head's weighted terms; their sum is the detection loss.

        Raises:
            DataError: a sample has no labels.
        """
        boxes = labelled_boxes(batch)
        return self.head.loss(output.heads, self.head.targets(boxes))

    def decode(self, output: DetectorOutput) -> list[Boxes3D]:
        """Detections of every sample, in the LiDAR frame that the points were in."""
        return self.head.decode(output.heads)
