"""BEVDet: cameras to the ground, then a detector as for LiDAR. The student.

Source: BEVDet (arXiv:2112.11790). Letters: B batch, N cameras, C channels, Y X rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..boxes import Boxes3D
from ..config import Config
from ..data.schema import Batch
from ..errors import ConfigError, DataError
from ..grid import BevGrid
from .bev_encoder import (
    BevEncoder,
    BevEncoderConfig,
    BevNeckConfig,
    LssNeckConfig,
    build_bev_neck,
    neck_reduction,
)
from .center_head import CenterHead, CenterHeadConfig
from .image_encoder import ImageEncoder, ImageEncoderConfig
from .lift import DepthLift, DepthLossConfig, LiftConfig, depth_loss, depth_targets
from .outputs import BevMap, DetectorOutput


class BevDetConfig(Config, frozen=True):
    """The whole detector; the defaults are the published one with ResNet-50.

    `grid` is that of the lift. `depth_loss` needs LiDAR points in training (the term "depth"), never later.
    """

    grid: BevGrid = BevGrid()
    image_encoder: ImageEncoderConfig = ImageEncoderConfig()
    lift: LiftConfig = LiftConfig()
    depth_loss: DepthLossConfig | None = None
    bev_encoder: BevEncoderConfig = BevEncoderConfig()
    bev_neck: BevNeckConfig = LssNeckConfig()
    head: CenterHeadConfig = CenterHeadConfig()

    def __post_init__(self) -> None:
        for grid in self.stage_grids:
            _ = grid.shape

    @property
    def stage_grids(self) -> tuple[BevGrid, ...]:
        """The grid of each stage of the BEV encoder, fine to coarse."""
        grids = []
        grid = self.grid
        for stride in self.bev_encoder.strides:
            try:
                grid = grid.coarser(stride)
            except ConfigError as error:
                raise ConfigError(
                    f"bev_encoder.strides={self.bev_encoder.strides} on this grid: {error}"
                ) from None
            grids.append(grid)
        return tuple(grids)

    @property
    def head_grid(self) -> BevGrid:
        """The grid of the neck's map, on which the head works."""
        return self.grid.coarser(neck_reduction(self.bev_encoder, self.bev_neck))


class BevDet(nn.Module):
    """A detector (see `Detector`) on images; gives the BEV maps lifted, stage0, stage1, ... and head."""

    def __init__(self, config: BevDetConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config.image_encoder)
        self.lift = DepthLift(
            config.lift, self.image_encoder.out_channels, config.grid, self.image_encoder.stride
        )
        self.bev_encoder = BevEncoder(config.bev_encoder, self.lift.out_channels)
        self.bev_neck = build_bev_neck(config.bev_neck, self.bev_encoder.out_channels)
        self.head = CenterHead(config.head, self.bev_neck.out_channels, config.head_grid)
        # Convolutions are faster so, in bfloat16 by a seventh; keys, shapes and values stay.
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]: its stub lacks it

    @property
    def bev_channels(self) -> dict[str, int]:
        """Channels of every named BEV map."""
        stages = {f"stage{i}": channels for i, channels in enumerate(self.bev_encoder.out_channels)}
        return {"lifted": self.lift.out_channels, **stages, "head": self.bev_neck.out_channels}

    def forward(self, batch: Batch) -> DetectorOutput:
        """Reads images and camera matrices only.

        Raises:
            DataError: the batch has no images.
        """
        if batch.images is None:
            raise DataError("this batch has no images, and BEVDet sees nothing else; load images")
        features = self.image_encoder(batch.images)  # (B, N, C, H, W)
        lifted, depth_logits = self.lift(features, batch.cam2img, batch.cam2lidar)
        stages = self.bev_encoder(lifted)
        bev = self.bev_neck(stages)
        maps = {"lifted": BevMap(lifted, self.config.grid)}
        for i, (stage, grid) in enumerate(zip(stages, self.config.stage_grids, strict=True)):
            maps[f"stage{i}"] = BevMap(stage, grid)
        maps["head"] = BevMap(bev, self.head.grid)
        return DetectorOutput(bev=maps, heads=self.head(bev), depth_logits=depth_logits)

    def loss(self, output: DetectorOutput, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms whose sum is the detection loss: the head's, and "depth" if configured.

        Raises:
            DataError: a sample has no labels, or the depth loss has no points.
        """
        boxes = [sample for sample in batch.boxes if sample is not None]
        if len(boxes) < len(batch.boxes):
            unlabelled = [t for t, b in zip(batch.tokens, batch.boxes, strict=True) if b is None]
            raise DataError(
                f"no boxes for sample {unlabelled[0]}; train on labelled samples or give pseudo labels"
            )
        terms = self.head.loss(output.heads, self.head.targets(boxes))
        if self.config.depth_loss is not None:
            terms["depth"] = self.loss_of_depth(output, batch, self.config.depth_loss)
        return terms

    def loss_of_depth(self, output: DetectorOutput, batch: Batch, config: DepthLossConfig) -> Tensor:
        """The depth term alone; it needs LiDAR points but no labels.

        Raises:
            DataError: the batch has no points.
        """
        if batch.points is None:
            raise DataError("the depth loss needs LiDAR points, this batch has none; load them or drop it")
        assert output.depth_logits is not None
        H, W = output.depth_logits.shape[-2:]
        bins, stride_px = self.config.lift.depth, self.image_encoder.stride
        targets = depth_targets(batch.points, batch.cam2img, batch.cam2lidar, bins, (H, W), stride_px)
        return depth_loss(output.depth_logits, targets, config)

    def decode(self, output: DetectorOutput) -> list[Boxes3D]:
        """Detections of every sample, in the (augmented) LiDAR frame of the batch."""
        return self.head.decode(output.heads)
