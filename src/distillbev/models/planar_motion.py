"""How the car moved since the frame before, from ego poses alone, and the map before turned to the present heading.

Source: BEVFormer (arXiv:2203.17270), which reads the CAN bus for it; nothing here does.
Letters: B batch, C channels, Y X rows and columns of the BEV map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.schema import Batch
from ..errors import DataError
from ..grid import BevGrid

NUM_SIGNALS = 18  # of the motion embedding, as public weights have it


@dataclass
class BevHistory:
    """What is kept of the frame before: hand it to the next call, nothing is remembered inside the model.

    Attributes:
        bev: (B, C, Y, X), the "head" map, without gradient.
        lidar2global: (B, 4, 4) float64, the frame before's.
        bev_aug: (B, 4, 4), the frame before's.
        present: (B,) bool; False where a sample is the first of its scene.
    """

    bev: Tensor
    lidar2global: Tensor
    bev_aug: Tensor
    present: Tensor


@dataclass
class PlanarMotion:
    """How the car moved since the frame before.

    Attributes:
        turn_rad: (B,), change of heading, counter-clockwise.
        forward_m: (B, 2), displacement along the present LiDAR axes x and y.
        signals: (B, 18) for the motion embedding.
    """

    turn_rad: Tensor
    forward_m: Tensor
    signals: Tensor


def standing_still(batch_size: int, device: torch.device | str = "cpu") -> PlanarMotion:
    """The motion of samples without a frame before."""
    return planar_motion(torch.eye(4, device=device).expand(batch_size, -1, -1))


def planar_motion(before2now: Tensor) -> PlanarMotion:
    """(B, 4, 4), LiDAR frame of the frame before -> of now; tilt and height are left to the embedding.

    The embedding's signals stand where public weights have those of the CAN bus, as a car reports them whose
    heading now is the world's x axis: displacement forward, left and up (m), orientation (the identity's
    quaternion), nine of the bus left at zero, heading (zero), change of heading (degrees). Neither the place
    nor the direction in the world is told, for a detector must not learn a city by heart. The change of
    heading is wrapped to +-180 degrees.
    """
    rotation = before2now[:, :3, :3]
    turn = -torch.atan2(rotation[:, 1, 0], rotation[:, 0, 0])
    moved = -before2now[:, :3, 3]  # x right, y forward
    signals = moved.new_zeros(len(moved), NUM_SIGNALS)
    signals[:, 0], signals[:, 1], signals[:, 2] = moved[:, 1], -moved[:, 0], moved[:, 2]
    signals[:, 3] = 1.0
    signals[:, 17] = turn.rad2deg()
    return PlanarMotion(turn.float(), moved[:, :2].float(), signals.float())


def motion_between(history: BevHistory, batch: Batch, grid: BevGrid) -> PlanarMotion:
    """The car's motion from the history's frame to the batch's, in the batch's augmented LiDAR frame.

    Raises:
        DataError: other samples, maps of another shape, another augmentation, or a frame out of sight.
    """
    if len(history.present) != len(batch) or tuple(history.bev.shape[2:]) != grid.shape:
        raise DataError(
            f"the history has {len(history.present)} maps of {tuple(history.bev.shape[2:])} cells, the batch "
            f"{len(batch)} samples on {grid.shape}; keep the history of this model's frame before"
        )
    # In float64: global coordinates are kilometres.
    now2before = torch.linalg.inv(history.lidar2global.double()) @ batch.lidar2global.double()
    aug_now, aug_before = (aug.double().to(now2before.device) for aug in (batch.bev_aug, history.bev_aug))
    before2now = aug_now @ torch.linalg.inv(aug_before @ now2before)
    present = history.present.to(before2now.device)
    before2now = torch.where(present[:, None, None], before2now, torch.eye(4).to(before2now))
    rotation = before2now[:, :3, :3]
    rigid = (rotation.transpose(1, 2) @ rotation - torch.eye(3).to(rotation)).abs().amax(dim=(1, 2)) < 1e-3
    if not bool((rigid & (torch.linalg.det(rotation) > 0)).all()):
        raise DataError(
            "the history was augmented otherwise than the batch; give both frames the same augmentation"
        )
    motion = planar_motion(before2now)
    (x_low, x_high), (y_low, y_high) = grid.x_range_m, grid.y_range_m
    reach = motion.forward_m.new_tensor([x_high - x_low, y_high - y_low])
    far = (motion.forward_m.abs() >= reach).any(dim=1)
    if bool(far.any()):
        sample = int(far.nonzero()[0, 0])
        raise DataError(
            f"sample {batch.tokens[sample]}: its history lies {float(motion.forward_m[sample].norm()):.0f} m "
            "away, so no cell of it is still on the map; a history ends with its scene: set present to False"
        )
    device = history.bev.device
    return PlanarMotion(motion.turn_rad.to(device), motion.forward_m.to(device), motion.signals.to(device))


def rotate_map(bev: Tensor, turn_rad: Tensor, centre_xy: tuple[float, float]) -> Tensor:
    """Turns maps to the heading of a car that has turned by `turn_rad`: the ground turns the other way.

    Nearest cell, zero where nothing was seen; the given maps stay as they are.

    Args:
        bev: (B, C, Y, X).
        turn_rad: (B,), counter-clockwise.
        centre_xy: column and row of the turning point, as real numbers (cell i reaches from i to i + 1).
    """
    Y, X = bev.shape[2:]
    x = torch.arange(X, device=bev.device) + 0.5 - centre_xy[0]
    y = torch.arange(Y, device=bev.device)[:, None] + 0.5 - centre_xy[1]
    cos, sin = turn_rad.float().cos()[:, None, None], turn_rad.float().sin()[:, None, None]
    columns = (cos * x - sin * y + centre_xy[0]).floor().long()  # (B, Y, X)
    rows = (sin * x + cos * y + centre_xy[1]).floor().long()
    inside = (columns >= 0) & (columns < X) & (rows >= 0) & (rows < Y)
    cells = (rows * X + columns).where(inside, 0).flatten(1)
    turned = bev.flatten(2).gather(2, cells[:, None].expand(-1, bev.shape[1], -1)).unflatten(2, (Y, X))
    return turned * inside[:, None]
