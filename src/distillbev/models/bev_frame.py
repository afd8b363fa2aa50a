"""Bird's-eye views in the ego frame: how a batch looks from there, and the way of boxes there and back.

The ego frame is the car's at the time of the LiDAR (x forward), see docs/frames.md. Public weights of Megvii and of
BEVDet from version 2 on live there. BEV augmentation acts about the origin of whichever frame the map lies in.
Letters: B batch, N cameras.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..boxes import Boxes3D
from ..data.schema import Batch, PastFrames
from ..errors import DataError


def in_ego_frame(batch: Batch) -> tuple[Batch, Tensor]:
    """A batch described in the ego frame wherever a batch says LiDAR frame; without points and boxes.

    Returns:
        batch: images and cameras, earlier frames too.
        lidar2ego: (B, 4, 4) float32 rigid motions, both frames with the batch's BEV augmentation.

    Raises:
        DataError: the batch does not tell where the LiDAR sits.
    """
    if batch.lidar2ego is None:
        raise DataError(
            f"samples {batch.tokens} come without lidar2ego, and this detector's map lies in the ego frame; set "
            "it (the loader does)"
        )
    past = batch.past and PastFrames(
        [in_ego_frame(frame)[0] for frame in batch.past.frames], batch.past.gaps_s
    )
    aug = batch.bev_aug.double()  # which autocast leaves alone
    lidar2ego = aug @ batch.lidar2ego.to(aug) @ torch.linalg.inv(aug)
    described = replace(
        batch,
        cam2lidar=(lidar2ego[:, None] @ batch.cam2lidar.double()).float(),
        lidar2global=batch.lidar2global @ torch.linalg.inv(batch.lidar2ego.to(batch.lidar2global)),
        lidar2ego=torch.eye(4).expand(len(batch), 4, 4).to(batch.lidar2ego),
        points=None,
        boxes=[None] * len(batch),
        past=past,
    )
    return described, lidar2ego.float()


def move_boxes(boxes: Sequence[Boxes3D], motions: Tensor) -> list[Boxes3D]:
    """Boxes of every sample by the sample's (B, 4, 4) rigid motion, as `boxes.transform_boxes` moves them."""
    moved = []
    for sample, motion in zip(boxes, motions.to(boxes[0].boxes), strict=True):
        centre, size, yaw, velocity = sample.boxes.split([3, 3, 1, 2], dim=1)
        with torch.autocast(motion.device.type, enabled=False):
            heading = torch.cat([yaw.cos(), yaw.sin()], dim=1) @ motion[:2, :2].T
            turned = torch.atan2(heading[:, 1:], heading[:, :1])
            rows = [centre @ motion[:3, :3].T + motion[:3, 3], size, turned, velocity @ motion[:2, :2].T]
        moved.append(replace(sample, boxes=torch.cat(rows, dim=1)))
    return moved
