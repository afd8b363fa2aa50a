"""BEVDet: cameras to the ground, then a detector as for LiDAR. The student.

With a history it is BEVDet4D, with a depth net and its loss BEVDepth, with both BEVDepth4D.

Sources: BEVDet (arXiv:2112.11790), BEVDet4D (arXiv:2203.17054), BEVDepth (arXiv:2206.10092).
Letters: B batch, N cameras, F earlier frames, C channels, Y X rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..boxes import Boxes3D
from ..config import Config
from ..data.schema import Batch
from ..errors import ConfigError, DataError
from ..grid import BevGrid
from .bev_encoder import (
    AnyBevEncoderConfig,
    BevEncoderConfig,
    BevNeckConfig,
    LssNeckConfig,
    build_bev_encoder,
    build_bev_neck,
    neck_reduction,
)
from .bev_frame import in_ego_frame, move_boxes
from .center_head import CenterHead, CenterHeadConfig
from .history import FrameFusion, HistoryConfig, PastMap, PastStream, scale_velocities
from .image_encoder import ImageEncoder, ImageEncoderConfig
from .lift import DepthLift, DepthLossConfig, LiftConfig, depth_loss, depth_targets
from .outputs import BevMap, DetectorOutput, labelled_boxes


class BevDetConfig(Config, frozen=True):
    """The whole detector; the defaults are the published one with ResNet-50.

    `grid` is that of the lift. `frame` is where it and all maps lie, and the head's boxes with them (x of the
    ego frame points forward); outside of the detector boxes are in the LiDAR frame all the same.
    `depth_loss` needs LiDAR points in training (the term "depth"), never later.
    `history` needs earlier key frames with every batch (the data's `past`), or a `BevDetStream`.
    """

    grid: BevGrid = BevGrid()
    frame: Literal["lidar", "ego"] = "lidar"
    image_encoder: ImageEncoderConfig = ImageEncoderConfig()
    lift: LiftConfig = LiftConfig()
    depth_loss: DepthLossConfig | None = None
    history: HistoryConfig | None = None
    bev_encoder: AnyBevEncoderConfig = BevEncoderConfig()
    bev_neck: BevNeckConfig = LssNeckConfig()
    head: CenterHeadConfig = CenterHeadConfig()

    def __post_init__(self) -> None:
        for grid in (*self.stage_grids, self.head_grid):
            _ = grid.shape

    @property
    def stage_grids(self) -> tuple[BevGrid, ...]:
        """The grid of each stage of the BEV encoder, fine to coarse."""
        grids = []
        grid = self.grid
        for stride in self.bev_encoder.stage_strides:
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
        self.fusion = None
        if config.history is not None:
            self.fusion = FrameFusion(config.history, self.lift.out_channels, config.grid)
        self.bev_encoder = build_bev_encoder(config.bev_encoder, self.lifted_channels)
        self.bev_neck = build_bev_neck(config.bev_neck, self.bev_encoder.out_channels)
        self.head = CenterHead(config.head, self.bev_neck.out_channels, config.head_grid)
        # Convolutions are faster so, in bfloat16 by a seventh; keys, shapes and values stay.
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]: its stub lacks it

    @property
    def lifted_channels(self) -> int:
        """Of the map that enters the BEV encoder."""
        return self.lift.out_channels if self.fusion is None else self.fusion.out_channels

    @property
    def bev_channels(self) -> dict[str, int]:
        """Channels of every named BEV map."""
        stages = {f"stage{i}": channels for i, channels in enumerate(self.bev_encoder.out_channels)}
        return {"lifted": self.lifted_channels, **stages, "head": self.bev_neck.out_channels}

    def forward(self, batch: Batch) -> DetectorOutput:
        """Reads images and matrices only, and with a history the batch's earlier frames.

        Raises:
            DataError: the batch has no images, or fewer earlier frames than the history joins.
        """
        if self.config.frame == "lidar":
            return self.detect_in(batch)
        described, lidar2ego = in_ego_frame(batch)
        return replace(self.detect_in(described), lidar2bev=lidar2ego)

    def detect_in(self, batch: Batch) -> DetectorOutput:
        """The output for a batch whose LiDAR frame stands for the frame of the maps."""
        lifted, depth_logits = self.see(batch)
        if self.fusion is None:
            return self.detect(lifted, depth_logits)
        past, num_frames = batch.past, self.fusion.config.num_frames
        if past is None or len(past.frames) < num_frames:
            raise DataError(
                f"the history joins {num_frames} earlier frames, this batch has "
                f"{len(past.frames) if past else 0}; set data.past, or feed frames one by one to a BevDetStream"
            )
        # After the present frame, never before: autocast would keep the weights cast without gradient for it.
        through = self.fusion.config.train_through_past
        with nullcontext() if through else torch.no_grad():
            maps = [
                self.past_map(self.see(frame, self.fusion.cameras(frame, batch))[0], frame)
                for frame in past.frames[:num_frames]
            ]
        return self.detect_with_past(lifted, depth_logits, batch, maps, past.gaps_s)

    def see(self, batch: Batch, cam2bev: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One frame on its own: (B, C, Y, X), refined where there is a history, and its depth logits.

        `cam2bev` (B, N, 4, 4) puts its rays elsewhere than `batch.cam2lidar` does.
        """
        if batch.images is None:
            raise DataError("this batch has no images, and BEVDet sees nothing else; load images")
        features = self.image_encoder(batch.images)  # (B, N, C, H, W)
        numbers = None if self.lift.depth_net is None else self.lift.depth_net.camera_numbers(batch)
        cam2bev = batch.cam2lidar if cam2bev is None else cam2bev
        lifted, depth_logits = self.lift(features, batch.cam2img, cam2bev, numbers)
        return (lifted if self.fusion is None else self.fusion.refine(lifted)), depth_logits

    @staticmethod
    def past_map(refined: Tensor, batch: Batch) -> PastMap:
        """What later frames need of a frame."""
        return PastMap(refined, batch.lidar2global, batch.bev_aug)

    def detect_with_past(
        self,
        refined: Tensor,
        depth_logits: Tensor,
        batch: Batch,
        past: Sequence[PastMap],
        gaps_s: Tensor,
    ) -> DetectorOutput:
        """The rest of the way with earlier maps, new to old, and the (B, F) seconds that they lie back."""
        assert self.fusion is not None
        output = self.detect(self.fusion.join(refined, past, batch), depth_logits)
        if self.fusion.config.velocity == "displacement":
            output.displacement_s = self.fusion.gap_s(gaps_s)
        return output

    def detect(self, lifted: Tensor, depth_logits: Tensor) -> DetectorOutput:
        """From the map that enters the BEV encoder to the heads."""
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
        boxes = labelled_boxes(batch)
        if output.lidar2bev is not None:
            boxes = move_boxes(boxes, output.lidar2bev)
        if output.displacement_s is not None:
            boxes = scale_velocities(boxes, output.displacement_s)
        terms = self.head.loss(output.heads, self.head.targets(boxes))
        if self.config.depth_loss is not None:
            assert output.depth_logits is not None
            terms["depth"] = self.loss_of_depth(output.depth_logits, batch, self.config.depth_loss)
        return terms

    def loss_of_depth(self, depth_logits: Tensor, batch: Batch, config: DepthLossConfig) -> Tensor:
        """The depth term alone, of (B, N, D, H, W) logits; it needs LiDAR points but no labels.

        Raises:
            DataError: the batch has no points.
        """
        if batch.points is None:
            raise DataError("the depth loss needs LiDAR points, this batch has none; load them or drop it")
        H, W = depth_logits.shape[-2:]
        bins, stride_px = self.config.lift.depth, self.image_encoder.stride
        targets = depth_targets(
            batch.points,
            batch.cam2img,
            batch.cam2lidar,
            bins,
            (H, W),
            stride_px,
            config.labels,
            config.virtual_points,
        )
        return depth_loss(depth_logits, targets, config)

    def decode(self, output: DetectorOutput) -> list[Boxes3D]:
        """Detections of every sample, in the (augmented) LiDAR frame of the batch; velocities in m/s."""
        boxes = self.head.decode(output.heads)
        if output.displacement_s is not None:
            boxes = scale_velocities(boxes, 1 / output.displacement_s)
        if output.lidar2bev is not None:
            boxes = move_boxes(boxes, torch.linalg.inv(output.lidar2bev))
        return boxes


class BevDetStream:
    """A trained BevDet with a history, fed frame by frame as they come; every image is seen once.

    Gives what the detector gives for batches with their earlier frames. Frames come in the order of time, one
    drive in each place of the batch; a drive ends with its scene.

    Args:
        detector: in eval mode.
        step: frames from one joined frame to the next, as the data's `past` has it.
    """

    def __init__(self, detector: BevDet, step: int = 1) -> None:
        if detector.fusion is None:
            raise ConfigError("this BevDet has no history, so there is nothing to remember; call it directly")
        if detector.fusion.config.align == "rays":
            raise ConfigError(
                "this BevDet puts the rays of earlier images on the present ground, and a stream keeps maps; give "
                'batches with their past, or set history.align="map"'
            )
        self.detector = detector
        self.past = PastStream(detector.fusion.config.num_frames, step)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> DetectorOutput:
        """The output for the newest frame; `batch.past` is not read.

        Raises:
            DataError: the batch lacks images, scenes or times, or does not follow the frame before.
        """
        lidar2bev = None
        if self.detector.config.frame == "ego":
            batch, lidar2bev = in_ego_frame(batch)
        refined, depth_logits = self.detector.see(batch)
        present = self.detector.past_map(refined, batch)
        past, gaps_s = self.past.recall(present, batch)
        output = self.detector.detect_with_past(refined, depth_logits, batch, past, gaps_s)
        self.past.remember(present, batch)
        return replace(output, lidar2bev=lidar2bev)
