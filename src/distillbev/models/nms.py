"""Non-maximum suppression: of several boxes on one object, the surest stays.

All functions take boxes in descending order of score and give back the indices that survive, in that order.
Letters: n boxes, p pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Config
from ..errors import ConfigError


class CircleNms(Config, frozen=True):
    """Suppresses by distance between centres: CenterPoint's cheap rule.

    `min_squared_distance_m2` is the SQUARE of a distance: published values (4 for cars) mean 2 m.
    """

    min_squared_distance_m2: float = 4.0
    max_boxes: int = 83

    def __post_init__(self) -> None:
        if self.min_squared_distance_m2 < 0 or self.max_boxes < 1:
            raise ConfigError(
                f"min_squared_distance_m2={self.min_squared_distance_m2}, max_boxes={self.max_boxes}; "
                "expected a square of metres and at least one box"
            )


class RotatedNms(Config, frozen=True):
    """Suppresses by overlap of the footprints, optionally scaled by class.

    `class_scale` has one factor per class of the task: above 1 for small objects, whose footprints never meet
    at the localisation errors of cameras (Scale-NMS, BEVDet, arXiv:2112.11790, section 3.2). Sizes are scaled
    for the test only, never in the result.
    """

    max_iou: float = 0.2
    class_scale: tuple[float, ...] | None = None
    max_candidates: int = 1000
    max_boxes: int = 83

    def __post_init__(self) -> None:
        if not 0 <= self.max_iou <= 1 or self.max_candidates < 1 or self.max_boxes < 1:
            raise ConfigError(
                f"max_iou={self.max_iou}, max_candidates={self.max_candidates}, max_boxes={self.max_boxes}; "
                "expected an IoU in [0, 1] and at least one box"
            )
        if self.class_scale is not None and any(factor <= 0 for factor in self.class_scale):
            raise ConfigError(f"class_scale={self.class_scale}; expected positive factors, one per class")


Nms = CircleNms | RotatedNms


def suppress(config: Nms, boxes: Tensor, class_in_task: Tensor) -> Tensor:
    """Runs the rule that the configuration names, over all classes of a task together.

    Args:
        boxes: (n, >=7) as BOX_FIELDS, in descending order of score.
        class_in_task: (n,) int64, position of each box's class within its task.
    """
    if isinstance(config, CircleNms):
        return circle_nms(boxes[:, :2], config.min_squared_distance_m2)[: config.max_boxes]
    footprints = boxes[: config.max_candidates, [0, 1, 3, 4, 6]].clone()
    if config.class_scale is not None:
        factors = footprints.new_tensor(config.class_scale)[class_in_task[: config.max_candidates]]
        footprints[:, 2:4] *= factors[:, None]
    return rotated_nms(footprints, config.max_iou)[: config.max_boxes]


def circle_nms(centres_m: Tensor, min_squared_distance_m2: float) -> Tensor:
    """(n, 2) centres -> survivors: a box goes when a surer survivor lies at the distance or nearer."""
    return greedy_survivors(squared_distances(centres_m) <= min_squared_distance_m2)


def rotated_nms(footprints: Tensor, max_iou: float) -> Tensor:
    """(n, 5) footprints x, y, length, width, yaw -> survivors: a box goes when a surer one overlaps more."""
    n = len(footprints)
    conflicts = torch.zeros(n, n, dtype=torch.bool, device=footprints.device)
    # Most pairs are far apart: only boxes whose circumscribed circles meet are worth the exact area.
    radius = footprints[:, 2:4].norm(dim=1) / 2
    near = squared_distances(footprints[:, :2]) < (radius[:, None] + radius) ** 2
    first, second = near.triu(diagonal=1).nonzero(as_tuple=True)
    conflicts[first, second] = footprint_iou(footprints[first], footprints[second]) > max_iou
    return greedy_survivors(conflicts)


def greedy_survivors(conflicts: Tensor) -> Tensor:
    """(n, n) bool, row i and column j > i True where box i would suppress box j -> indices of the survivors.

    A box survives when no surviving earlier box conflicts with it. Applying that sentence to all boxes at
    once, again and again from "all survive", settles the first k boxes after k rounds at the latest, in
    practice all of them after a few; the result is that of the sequential rule, which the test states as a
    loop.
    """
    earlier = conflicts.triu(diagonal=1).float()  # as a product, "any conflict" runs at the speed of a matrix
    alive = torch.ones(len(conflicts), dtype=torch.bool, device=conflicts.device)
    while True:
        settled = alive.float() @ earlier == 0
        if torch.equal(settled, alive):
            return alive.nonzero().squeeze(1)
        alive = settled


def squared_distances(centres_m: Tensor) -> Tensor:
    """(n, 2) -> (n, n) in m^2, by differences: the expanded product of `cdist` loses the small ones."""
    x, y = centres_m.unbind(dim=1)
    return (x[:, None] - x).square() + (y[:, None] - y).square()


def rotated_iou(first: Tensor, second: Tensor) -> Tensor:
    """(n, 5) and (m, 5) footprints x, y, length, width, yaw (counter-clockwise) -> (n, m) IoU."""
    n, m = len(first), len(second)
    pairs = footprint_iou(first.repeat_interleave(m, dim=0), second.repeat(n, 1))
    return pairs.view(n, m)


def footprint_iou(first: Tensor, second: Tensor) -> Tensor:
    """(p, 5) and (p, 5) footprints -> (p,) IoU of each pair, 0 where both are empty."""
    overlap = footprint_intersection(first, second)
    areas = (first[:, 2] * first[:, 3] + second[:, 2] * second[:, 3]).double()
    union = (areas - overlap).clamp(min=1e-12)
    return (overlap / union).to(first.dtype)


def footprint_intersection(first: Tensor, second: Tensor) -> Tensor:
    """(p, 5) and (p, 5) footprints -> (p,) float64, exact area of the overlap of each pair in m^2.

    In the frame of `second` its footprint is the upright window |x| <= l/2, |y| <= w/2. Seen from below,
    `first` is bounded by four edges; each contributes, over the stretch of x that it shares with the window,
    the integral of its height clamped to the window, positive for edges that run towards -x and negative for
    the others. The four sum up to the overlap, without any case of which corners lie where, and without
    sorting of corners.
    """
    first, second = first.double(), second.double()
    relative = first[:, 4] - second[:, 4]
    cos, sin = second[:, 4].cos(), second[:, 4].sin()
    dx, dy = (first[:, :2] - second[:, :2]).unbind(dim=1)
    centre = torch.stack([cos * dx + sin * dy, cos * dy - sin * dx], dim=1)

    signs = first.new_tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]])  # counter-clockwise
    u, v = (signs * first[:, None, 2:4] / 2).unbind(dim=-1)  # (p, 4)
    cos, sin = relative.cos()[:, None], relative.sin()[:, None]
    corners = centre[:, None] + torch.stack([cos * u - sin * v, sin * u + cos * v], dim=-1)  # (p, 4, 2)

    half_l, half_w = (second[:, 2:4] / 2)[:, :, None].unbind(dim=1)  # (p, 1)
    x0, y0 = corners.unbind(dim=-1)
    x1, y1 = corners.roll(-1, dims=1).unbind(dim=-1)
    run = torch.where(x1 == x0, 1.0, x1 - x0)
    from_x = torch.maximum(torch.minimum(x0, half_l), -half_l)
    to_x = torch.maximum(torch.minimum(x1, half_l), -half_l)
    from_y = y0 + (y1 - y0) * (from_x - x0) / run
    to_y = y0 + (y1 - y0) * (to_x - x0) / run
    return ((from_x - to_x) * _mean_clamped(from_y, to_y, half_w)).sum(dim=1).clamp(min=0)


def _mean_clamped(start: Tensor, end: Tensor, limit: Tensor) -> Tensor:
    """Mean of clamp(y, -limit, limit) while y moves evenly from start to end."""

    def integral(y: Tensor) -> Tensor:
        inside = torch.maximum(torch.minimum(y, limit), -limit)
        return inside * (y - inside / 2)  # y^2 / 2 within the limits, a tangent outside

    flat = (
        end - start
    ).abs() < 1e-6  # there the quotient would lose its digits, and the middle is exact enough
    middle = torch.maximum(torch.minimum((start + end) / 2, limit), -limit)
    return torch.where(flat, middle, (integral(end) - integral(start)) / torch.where(flat, 1.0, end - start))
