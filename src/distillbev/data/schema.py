"""Samples (what was physically there) and batches (what a network sees)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..boxes import Boxes3D


@dataclass(frozen=True)
class CameraFrame:
    """One image of one camera, not yet read. Matrices are 4x4 float64; the ego pose is the camera's own."""

    channel: str
    path: Path
    timestamp_us: int
    size_wh_px: tuple[int, int]
    cam2img: NDArray[np.float64]
    cam2ego: NDArray[np.float64]
    ego2global: NDArray[np.float64]


@dataclass(frozen=True)
class LidarSweep:
    """One turn of the LiDAR, not yet read: float32 rows of x, y, z (m), intensity (0-255), ring."""

    path: Path
    timestamp_us: int
    lidar2ego: NDArray[np.float64]
    ego2global: NDArray[np.float64]


@dataclass(frozen=True)
class Annotations:
    """Everything annotated in a key frame, all categories, in the LiDAR frame of the key frame.

    boxes: (n, 9) float64 as BOX_FIELDS, velocity NaN where undefined. labels: (n,) int64 into CLASSES, -1 for
    categories outside the detection challenge. attributes: one name or "" each. visibility: 0 unknown, 1 to 4.
    num_lidar_points: -1 where no LiDAR looked, as the devkit has it.
    """

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    categories: tuple[str, ...]
    attributes: tuple[str, ...]
    instance_tokens: tuple[str, ...]
    num_lidar_points: NDArray[np.int64]
    num_radar_points: NDArray[np.int64]
    visibility: NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One annotated key frame: physical facts, no training numbers.

    `sweeps[0]` is the key sweep, earlier ones follow (newest first); empty for a rig without LiDAR, whose
    reference frame is then given by `lidar2ego` and `ego2global` all the same. `annotations` is None for a
    frame that nobody labelled, or whose labels must not be read.
    """

    token: str
    scene: str
    timestamp_us: int
    lidar2ego: NDArray[np.float64]
    ego2global: NDArray[np.float64]
    cameras: tuple[CameraFrame, ...]
    sweeps: tuple[LidarSweep, ...]
    annotations: Annotations | None
    previous_token: str | None

    @property
    def lidar2global(self) -> NDArray[np.float64]:
        return self.ego2global @ self.lidar2ego


@dataclass
class Batch:
    """Tensors of several samples, with all augmentation already in the matrices.

    B samples, N cameras, H x W pixels. The LiDAR frame below is the augmented one: `cam2lidar`, `points` and
    `boxes` have gone through `bev_aug` together. `cam2img` includes the image augmentation.

    Attributes:
        tokens: the samples' tokens.
        images: (B, N, 3, H, W) uint8 RGB, or None for a LiDAR-only detector.
        cam2img: (B, N, 4, 4) camera frame -> pixels of the network's image (u*d, v*d, d, 1).
        cam2lidar: (B, N, 4, 4) camera frame -> LiDAR frame, with the ego motion between the two sensors.
        image_aug: (B, N, 4, 4) source pixels (u*d, v*d, d, 1) -> network pixels; a factor of `cam2img`.
        bev_aug: (B, 4, 4) physical -> augmented LiDAR frame; a factor of `cam2lidar`.
        lidar2global: (B, 4, 4) float64, physical LiDAR frame -> global.
        points: per sample (P, 5): x, y, z (m), intensity (0-255), time (s, 0 now, negative earlier); or None.
        boxes: per sample ground truth (or pseudo labels), None where the sample is unlabelled.
        past: earlier key frames of the same scenes, if they were asked for.
        scenes: name of each sample's scene; None if unknown.
        timestamps_us: of each sample (microseconds); None if unknown.
        lidar2ego: (B, 4, 4) float64, physical LiDAR frame -> ego frame at the LiDAR's time; None if unknown.
    """

    tokens: list[str]
    images: Tensor | None
    cam2img: Tensor
    cam2lidar: Tensor
    image_aug: Tensor
    bev_aug: Tensor
    lidar2global: Tensor
    points: list[Tensor] | None
    boxes: list[Boxes3D | None]
    past: PastFrames | None = None
    scenes: list[str] | None = None
    timestamps_us: list[int] | None = None
    lidar2ego: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, samples: list[int]) -> Batch:
        """Some of the samples, in the order asked for."""

        def some(entries: Any) -> Any:
            if entries is None:
                return None
            return [entries[i] for i in samples] if isinstance(entries, list) else entries[samples]

        return replace(self, **{field.name: some(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device | str) -> Batch:
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            images=move(self.images),
            cam2img=self.cam2img.to(device),
            cam2lidar=self.cam2lidar.to(device),
            image_aug=self.image_aug.to(device),
            bev_aug=self.bev_aug.to(device),
            points=None if self.points is None else [points.to(device) for points in self.points],
            boxes=[None if boxes is None else boxes.to(device) for boxes in self.boxes],
            past=None if self.past is None else self.past.to(device),
        )


@dataclass
class PastFrames:
    """Earlier key frames of a batch's samples, with the augmentation of the present ones.

    Where a scene has no frame so far back, its oldest one stands in, and at its start the present one. F frames.

    Attributes:
        frames: from new to old, each a batch of the same samples in the same order, without points and boxes;
            its LiDAR frame is that of its own time.
        gaps_s: (B, F) seconds from each frame to the present; 0 where the present stands in.
    """

    frames: list[Batch]
    gaps_s: Tensor

    def __getitem__(self, samples: list[int]) -> PastFrames:
        return PastFrames([frame.take(samples) for frame in self.frames], self.gaps_s[samples])

    def to(self, device: torch.device | str) -> PastFrames:
        return PastFrames([frame.to(device) for frame in self.frames], self.gaps_s.to(device))
