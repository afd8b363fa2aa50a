"""The goldens of the query detectors to our names and conventions, and back.

Old boxes are (x, y, z of the bottom, w, l, h, clockwise yaw, velocity); old codes (x, y, log w, log l, z, log
h, sine and cosine of the old yaw, velocity).
"""

import math
import re

import torch
from torch import Tensor

from distillbev.boxes import Boxes3D

# Old entry of each number of our code. Turning the yaw swaps sine and cosine and their signs.
OLD_ENTRY = [0, 1, 4, 3, 2, 5, 7, 6, 8, 9]
SIGN = torch.tensor([1.0, 1, 1, 1, 1, 1, -1, -1, 1, 1])

NAMES = [
    (r"^bev_embedding\.", "bev_embedding."),
    (r"^positional_encoding\.row_embed\.", "row_embedding."),
    (r"^positional_encoding\.col_embed\.", "column_embedding."),
    (r"^transformer\.cams_embeds$", "camera_embedding"),
    (r"^transformer\.level_embeds$", "level_embedding"),
    (r"^transformer\.can_bus_mlp\.norm\.", "motion_embedding.4."),
    (r"^transformer\.can_bus_mlp\.", "motion_embedding."),
    (r"^transformer\.encoder\.layers\.", "layers."),
    (r"^transformer\.decoder\.layers\.", "layers."),
    (r"^transformer\.reference_points\.", "reference_points."),
    (r"^cls_branches\.", "class_branches."),
    (r"^reg_branches\.", "box_branches."),
    (r"\.ffns\.0\.layers\.0\.0\.", ".feed_forward.widen."),
    (r"\.ffns\.0\.layers\.1\.", ".feed_forward.narrow."),
    (r"\.attentions\.1\.deformable_attention\.", ".spatial."),
]


def our_name(old: str, first: str, second: str) -> str:
    """Key of the reference -> ours; `first` and `second` name the layers' attentions."""
    for pattern, new in NAMES:
        old = re.sub(pattern, new, old)
    old = re.sub(r"\.attentions\.0\.(attn\.)?", f".{first}.", old)
    return re.sub(r"\.attentions\.1\.", f".{second}.", old)


def turn_code(values: Tensor, dim: int = -1) -> Tensor:
    """Old codes (or the rows of a layer that gives them) -> ours."""
    shape = [1] * values.ndim
    shape[dim] = 10
    return values.index_select(dim, torch.tensor(OLD_ENTRY)) * SIGN.view(shape)


def turn_weight(old_name: str, weight: Tensor) -> Tensor:
    """Weights of the last layers of the box branches, or their gradients, to our order; others as they
    are."""
    return turn_code(weight, dim=0) if re.search(r"reg_branches\.\d+\.4\.", old_name) else weight


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
