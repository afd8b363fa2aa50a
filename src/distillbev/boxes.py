"""Upright 3-D boxes: (x, y, z, l, w, h, yaw, vx, vy).

Gravity centre and sizes in metres (length along the heading), yaw in radians counter-clockwise from +x,
velocity over ground in m/s. This is the only convention inside the project; nuScenes (w, l, h) with
quaternions and the bottom-centred boxes of mmdetection3d are converted where they enter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .geometry import wrap_angle

BOX_FIELDS = ("x", "y", "z", "l", "w", "h", "yaw", "vx", "vy")


@dataclass
class Boxes3D:
    """The boxes of one sample, in one frame (the LiDAR frame unless said otherwise).

    `boxes` (n, 9) as BOX_FIELDS; velocity may be NaN where unknown. `labels` (n,) int64 into `CLASSES`.
    `scores` (n,) in [0, 1] for detections, None for ground truth.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.boxes.ndim == 2 and self.boxes.shape[1] == len(BOX_FIELDS), self.boxes.shape
        assert self.labels.shape == self.boxes.shape[:1], (self.labels.shape, self.boxes.shape)

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, keep: Tensor | slice) -> Boxes3D:
        """The boxes that a mask, an index tensor or a slice selects."""
        scores = None if self.scores is None else self.scores[keep]
        return Boxes3D(self.boxes[keep], self.labels[keep], scores)

    def to(self, device: torch.device | str) -> Boxes3D:
        scores = None if self.scores is None else self.scores.to(device)
        return Boxes3D(self.boxes.to(device), self.labels.to(device), scores)

    @staticmethod
    def empty(device: torch.device | str = "cpu") -> Boxes3D:
        return Boxes3D(
            torch.zeros(0, len(BOX_FIELDS), device=device), torch.zeros(0, dtype=torch.int64, device=device)
        )


def box_corners(boxes: NDArray[np.floating]) -> NDArray[np.float64]:
    """(n, >=7) boxes -> (n, 8, 3) corners: the four of the bottom, then the four of the top.

    Within each face: front left, front right, rear right, rear left (front is where the yaw points).
    """
    boxes = np.asarray(boxes, dtype=np.float64)
    signs = np.array(
        [[1, 1, -1], [1, -1, -1], [-1, -1, -1], [-1, 1, -1], [1, 1, 1], [1, -1, 1], [-1, -1, 1], [-1, 1, 1]]
    )
    offsets = signs * boxes[:, None, 3:6] / 2
    cos, sin = np.cos(boxes[:, 6, None]), np.sin(boxes[:, 6, None])
    x = cos * offsets[..., 0] - sin * offsets[..., 1]
    y = sin * offsets[..., 0] + cos * offsets[..., 1]
    return boxes[:, None, :3] + np.stack([x, y, offsets[..., 2]], axis=-1)


def transform_boxes(a2b: NDArray[np.floating], boxes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Boxes of frame a -> frame b: centre and heading move with the rigid motion; they stay upright in b.

    A tilt between the frames is dropped from the box (as every upright representation does), not from its
    centre. Velocities (m/s) are turned, with z taken as zero; NaN stays NaN.
    """
    boxes = np.array(boxes, dtype=np.float64)
    rotation = np.asarray(a2b, dtype=np.float64)[:3, :3]
    boxes[:, :3] = boxes[:, :3] @ rotation.T + a2b[:3, 3]
    heading = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], axis=-1) @ rotation[:2, :2].T
    boxes[:, 6] = wrap_angle(np.arctan2(heading[:, 1], heading[:, 0]))
    boxes[:, 7:9] = boxes[:, 7:9] @ rotation[:2, :2].T
    return boxes
