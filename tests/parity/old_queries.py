"""The goldens of the query detectors to our names and conventions, and back.

Old boxes are (x, y, z of the bottom, w, l, h, clockwise yaw, velocity); old codes (x, y, log w, log l, z, log
h, sine and cosine of the old yaw, velocity).
"""

import math

import torch
from torch import Tensor

from distillbev.boxes import Boxes3D
from distillbev.weights.rename import query_name as our_name
from distillbev.weights.rename import turn_code, turn_weight

__all__ = ["assert_gradient", "ground_truth", "our_boxes", "our_name", "turn_code", "turn_weight"]


def our_boxes(old: Tensor, bottom: bool = True) -> Tensor:
    """(n, 9) old boxes -> ours; `bottom` says whether z is that of the bottom."""
    x, y, z, w, length, h, yaw, vx, vy = old.unbind(dim=-1)
    yaw = -yaw - math.pi / 2
    yaw = torch.atan2(yaw.sin(), yaw.cos())
    return torch.stack([x, y, z + h / 2 if bottom else z, length, w, h, yaw, vx, vy], dim=-1)


def ground_truth(inputs: dict[str, Tensor], samples: int) -> list[Boxes3D]:
    return [Boxes3D(our_boxes(inputs[f"gt_boxes.{b}"]), inputs[f"gt_labels.{b}"]) for b in range(samples)]


def assert_gradient(actual: Tensor | None, expected: Tensor, name: str = "") -> None:
    """The goldens' tolerance for gradients: 1e-3 of the largest entry."""
    assert actual is not None, name
    assert actual.shape == expected.shape, name
    assert float((actual - expected).abs().max()) <= 1e-3 * float(expected.abs().max()), name
