"""How the inside of an object relates to itself, imitated: similarities between its points or its channels.

A similarity is a cosine, so it does not change when a map is multiplied by a number: weights outlive a change
of teacher. Source: TiG-BEV (arXiv:2212.13979), here on a grid of points that turns with the box.
Letters: B batch, M boxes (padded), P points of a box, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..boxes import Boxes3D
from ..config import Config
from ..errors import ConfigError
from ..grid import BevGrid
from .masks import pad_boxes


class RelationConfig(Config, frozen=True):
    """What is compared inside a box.

    Attributes:
        between: "points": each with each, over channels; "channels": each with each, over points.
        points_per_side: points along a box and across it.
        enlarge: the points span the box times this, so that they see its border from both sides.
    """

    between: Literal["points", "channels"] = "points"
    points_per_side: int = 5
    enlarge: float = 1.2

    def __post_init__(self) -> None:
        if self.points_per_side < 2:
            raise ConfigError(f"points_per_side={self.points_per_side} relates nothing; choose 2 or more")
        if self.enlarge <= 0:
            raise ConfigError(f"enlarge={self.enlarge}; choose a positive number")


def points_in_boxes(padded: Tensor, per_side: int, enlarge: float = 1.0) -> Tensor:
    """(B, M, 9) boxes -> (B, M, P, 2) metres, P = per_side^2 points at the centres of equal parts of each."""
    steps = ((torch.arange(per_side, device=padded.device) + 0.5) / per_side - 0.5) * enlarge
    along, across = (part.flatten() for part in torch.meshgrid(steps, steps, indexing="ij"))  # (P,)
    x, y, _, length, width, _, yaw = padded[..., :7, None].unbind(2)  # (B, M, 1) each
    along, across = along * length, across * width
    cos, sin = yaw.cos(), yaw.sin()
    return torch.stack([x + along * cos - across * sin, y + along * sin + across * cos], dim=-1)


def relation_term(
    teacher: Tensor, student: Tensor, boxes: Sequence[Boxes3D], grid: BevGrid, config: RelationConfig
) -> Tensor:
    """L_rel = mean over boxes and pairs p, q of  (cos(S_p, S_q) - cos(Z_p, Z_q))^2.

    p, q are the points of a box (features over channels) or the channels (over points); maps are read between
    their cells, with zeros off the grid.

    Args:
        teacher: (B, C, Y, X) teacher map over the grid's ground.
        student: the same of the adapted student.
        boxes: one per sample; a box whose centre lies off the grid does not count.

    Returns:
        (B,), zero for a sample without boxes.
    """
    padded, valid = pad_boxes(boxes)
    columns_rows = torch.tensor([grid.shape[1], grid.shape[0]], device=padded.device)
    centres = grid.cell_coordinates(padded[..., :2])  # (B, M, 2) column, row
    valid = valid & ((centres >= 0) & (centres < columns_rows)).all(dim=-1)
    points = points_in_boxes(padded, config.points_per_side, config.enlarge)
    where = grid.cell_coordinates(points) / columns_rows * 2 - 1  # (B, M, P, 2), the map is [-1, 1]

    def read(features: Tensor) -> Tensor:
        vectors = functional.grid_sample(features.float(), where, align_corners=False)  # (B, C, M, P)
        vectors = vectors.permute(0, 2, 3, 1)  # (B, M, P, C)
        return functional.normalize(vectors, dim=3 if config.between == "points" else 2)

    z, s = read(teacher), read(student)
    if config.between == "points":
        distance = (s @ s.mT - z @ z.mT).square().mean(dim=(2, 3))  # (B, M)
    else:
        # |S^T S - Z^T Z|^2 by P x P products: C x C ones of every box would not fit the memory.
        def product(a: Tensor, b: Tensor) -> Tensor:
            return (a @ b.mT).square().sum(dim=(2, 3))

        distance = (product(s, s) - 2 * product(s, z) + product(z, z)) / z.shape[3] ** 2
    return (distance * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)
