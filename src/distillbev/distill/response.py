"""What a head says, imitated: the teacher's heat maps and boxes as soft targets for the student's.

Both heads must have the same tasks on the same grid. Sources: CenterNet's focal loss made continuous as in
Generalized Focal Loss (arXiv:2006.04388, equation 4); dense box imitation where the teacher sees an object, as
in MonoDistill (arXiv:2201.10830) and UniDistill (arXiv:2303.15083).
Letters: B batch, K classes of a task, Y X rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..config import Config
from ..errors import ConfigError

BOX_MAPS = ("reg", "height", "dim", "rot", "vel")
Heads = Sequence[dict[str, Tensor]]


class ResponseConfig(Config, frozen=True):
    """Weights of the two terms, None to leave one out; boxes count in cells whose teacher score reaches tau.

    `velocity` weighs velocities among the numbers of a box: 0 for a teacher that sees a single sweep, in which
    nothing moves.
    """

    heatmap: float | None = 1.0
    boxes: float | None = 0.25
    teacher_threshold: float = 0.1
    velocity: float = 1.0

    def __post_init__(self) -> None:
        if self.heatmap is None and self.boxes is None:
            raise ConfigError(
                "a response without terms; give heatmap or boxes a weight, or set response=None"
            )
        for name in ("heatmap", "boxes"):
            weight = getattr(self, name)
            if weight is not None and weight <= 0:
                raise ConfigError(f"response.{name}={weight}; choose a positive weight, or None for none")
        if self.velocity < 0:
            raise ConfigError(f"response.velocity={self.velocity}; choose a weight of 0 or more")

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the terms that there are."""
        weights = {"heatmap": self.heatmap, "boxes": self.boxes}
        return {name: weight for name, weight in weights.items() if weight is not None}


def response_terms(
    student: Heads, teacher: Heads, config: ResponseConfig, displacement_s: Tensor | None = None
) -> dict[str, Tensor]:
    """Unweighted terms of a batch, each (B,).

    Args:
        student, teacher: their head maps; the teacher's velocities in m/s.
        displacement_s: (B,) seconds over which the student's velocities are displacements; None where m/s.

    Raises:
        ConfigError: the heads differ in tasks, classes or grid.
    """
    require_same_heads(student, teacher)
    student_heat, teacher_heat = (
        torch.cat([maps["heatmap"].float() for maps in heads], dim=1) for heads in (student, teacher)
    )
    scores = teacher_heat.sigmoid()
    terms: dict[str, Tensor] = {}
    if config.heatmap is not None:
        terms["heatmap"] = heatmap_response(student_heat, scores)
    if config.boxes is not None:
        if displacement_s is not None:
            teacher = scale_velocity_maps(teacher, displacement_s)
        terms["boxes"] = box_response(student, teacher, config.teacher_threshold, config.velocity)
    return terms


def heatmap_response(student_logits: Tensor, teacher_scores: Tensor) -> Tensor:
    """Focal cross-entropy to soft targets: sum of |p - q|^2 BCE(p, q) over the teacher's score mass.

    The mass, the sum of q^2 and at least one, stands for the number of objects: a heat map's floor of many
    cells near zero hardly counts. Both (B, K, Y, X) -> (B,).
    """
    gap = (student_logits.sigmoid() - teacher_scores).square()
    entropy = functional.binary_cross_entropy_with_logits(student_logits, teacher_scores, reduction="none")
    mass = teacher_scores.square().sum(dim=(1, 2, 3)).clamp(min=1)
    return (gap * entropy).sum(dim=(1, 2, 3)) / mass


def box_response(student: Heads, teacher: Heads, threshold: float, velocity: float = 1.0) -> Tensor:
    """Mean absolute difference of the box numbers, each cell weighed by the teacher's score. (B,)."""
    distance, weight = [], []
    for ours, theirs in zip(student, teacher, strict=True):
        score = theirs["heatmap"].float().sigmoid().amax(dim=1)  # (B, Y, X)
        seen = score * (score > threshold)
        gaps = {name: (ours[name].float() - theirs[name].float()).abs().sum(dim=1) for name in BOX_MAPS}
        gaps["vel"] = velocity * gaps["vel"]
        distance.append((sum(gaps.values()) * seen).sum(dim=(1, 2)))
        weight.append(seen.sum(dim=(1, 2)))
    return torch.stack(distance).sum(dim=0) / torch.stack(weight).sum(dim=0).clamp(min=1)


def scale_velocity_maps(heads: Heads, factors: Tensor) -> list[dict[str, Tensor]]:
    """Head maps with each sample's velocities times its (B,) factor: m/s times a gap are displacements."""
    return [{**maps, "vel": maps["vel"] * factors.to(maps["vel"])[:, None, None, None]} for maps in heads]


def require_same_heads(student: Heads, teacher: Heads) -> None:
    """Raises ConfigError where two heads cannot be compared cell by cell."""
    shapes = [
        [
            {name: tuple(maps[name].shape[1:]) for name in ("heatmap", *BOX_MAPS) if name in maps}
            for maps in heads
        ]
        for heads in (student, teacher)
    ]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ConfigError(
            f"response: the student's head gives {shapes[0]} and the teacher's {shapes[1]}; give both the same "
            "tasks and grid, or set response=None"
        )
