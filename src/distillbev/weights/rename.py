"""Names, layouts and box conventions of published detectors -> ours.

Sources: mmdetection3d (0.17 and from 1.0 on) and its forks BEVDet, BEVFormer and distill-bev, which share names.
Old boxes, before mmdetection3d 1.0, are (width, length, height) with a clockwise yaw from -y; see docs/frames.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError

Names = tuple[tuple[str, str], ...]  # patterns at the beginning of a name, and what stands there in ours

CENTERPOINT_PILLARS: Names = (
    (r"pts_voxel_encoder\.", "pillars."),
    (r"pts_backbone\.", "backbone."),
    (r"pts_neck\.", "neck."),
    (r"pts_bbox_head\.", "head."),
)
CENTERPOINT_VOXELS: Names = ((r"pts_middle_encoder\.", "pillars."), *CENTERPOINT_PILLARS[1:])
BEVDET: Names = (
    (r"img_backbone\.", "image_encoder.backbone."),
    (r"img_neck\.lateral_convs\.(\d+)\.conv\.", r"image_encoder.neck.laterals.\1."),
    (r"img_neck\.fpn_convs\.0\.conv\.", "image_encoder.neck.smooth."),
    (r"img_view_transformer\.depthnet\.", "lift.depth_and_context."),
    (r"img_bev_encoder_backbone\.", "bev_encoder."),
    (r"img_bev_encoder_neck\.up2\.1\.", "bev_neck.refine.0."),
    (r"img_bev_encoder_neck\.up2\.2\.", "bev_neck.refine.1."),
    (r"img_bev_encoder_neck\.up2\.4\.", "bev_neck.refine.3."),
    (r"img_bev_encoder_neck\.conv\.", "bev_neck.conv."),
    (r"pts_bbox_head\.", "head."),
)
QUERIES: Names = (  # inside a query head; the attentions of a layer depend on whose layer it is
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
)
HEAD = "pts_bbox_head."
OF_BEVFORMER_ENCODER = re.compile(
    r"bev_embedding\.|positional_encoding\.|transformer\.(encoder\.|cams_embeds$|level_embeds$|can_bus_mlp\.)"
)

# Old entry of each number of our box code (x, y, z, log l, log w, log h, sine and cosine of the yaw, velocity).
# Turning the yaw swaps sine and cosine and their signs.
OLD_ENTRY = (0, 1, 4, 3, 2, 5, 7, 6, 8, 9)
OLD_SIGN = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0)
NEW_ENTRY = (0, 1, 4, 2, 3, 5, 6, 7, 8, 9)  # from mmdetection3d 1.0 on: length first, our yaw


@dataclass(frozen=True)
class Source:
    """A published architecture: how to know it, its names in ours (None: unknown), what ours does without."""

    title: str
    signs: tuple[str, ...]  # patterns that all must begin some name
    rename: Callable[[str], str | None]
    needless: str = r"(?!)"  # names that follow from our configuration, or that nothing reads

    def is_needless(self, name: str) -> bool:
        return re.match(self.needless, name) is not None


def renamed(name: str, table: Names) -> str | None:
    """A name by the first row of a table that fits its beginning; None where no row fits."""
    for pattern, ours in table:
        if re.match(pattern, name):
            return re.sub(pattern, ours, name, count=1)
    return None


def query_name(name: str, first: str, second: str) -> str:
    """A name inside a query head; `first` and `second` name the two attentions of its layers."""
    for pattern, ours in QUERIES:
        name = re.sub(pattern, ours, name)
    name = re.sub(r"\.attentions\.0\.(attn\.)?", f".{first}.", name)
    return re.sub(r"\.attentions\.1\.", f".{second}.", name)


def bevformer_name(name: str) -> str | None:
    """A name of a whole BEVFormer."""
    if name.startswith(("img_backbone.", "img_neck.")):
        return name.replace("img_", "image_encoder.", 1)
    if not name.startswith(HEAD):
        return None
    name = name.removeprefix(HEAD)
    if OF_BEVFORMER_ENCODER.match(name):
        return "encoder." + query_name(name, "temporal", "spatial")
    return "head." + query_name(name, "self_attention", "cross_attention")


def lidar_query_name(name: str) -> str | None:
    """A name of a LiDAR teacher with a query head (LiDARFormer, MVPFormer)."""
    if name.startswith(("pts_backbone.", "pts_neck.")):
        return name.removeprefix("pts_")
    if name.startswith(("pts_voxel_encoder.", "pts_middle_encoder.")):
        return "points." + name.split(".", 1)[1]
    if not name.startswith(HEAD):
        return None
    name = name.removeprefix(HEAD)
    if name.startswith("transformer.encoder."):
        return "encoder." + query_name(name, "cross_attention", "none")
    if name.startswith("bev_embedding."):
        return "encoder." + name
    return "head." + query_name(name, "self_attention", "cross_attention")


SOURCES = (
    Source(
        "BEVFormer",
        (r"img_backbone\.", r"pts_bbox_head\.transformer\.encoder\."),
        bevformer_name,
        r"pts_bbox_head\.code_weights$",
    ),
    Source(
        "LiDAR teacher with a query head",
        (r"pts_backbone\.", r"pts_bbox_head\.transformer\.decoder\."),
        lidar_query_name,
        r"pts_bbox_head\.(code_weights|transformer\.level_embeds)$",
    ),
    Source(
        "BEVDet",
        (r"img_view_transformer\.depthnet\.weight$",),
        lambda name: renamed(name, BEVDET),
        r"img_view_transformer\.(dx|bx|nx|frustum)$",
    ),
    Source(
        "CenterPoint with voxels",
        (r"pts_middle_encoder\.conv_input\.", r"pts_bbox_head\.task_heads\."),
        lambda name: renamed(name, CENTERPOINT_VOXELS),
    ),
    Source(
        "CenterPoint with pillars",
        (r"pts_voxel_encoder\.pfn_layers\.", r"pts_bbox_head\.task_heads\."),
        lambda name: renamed(name, CENTERPOINT_PILLARS),
    ),
)


def recognise(names: list[str]) -> Source:
    """The source that has keys of these names.

    Raises:
        CheckpointError: none does.
    """
    for source in SOURCES:
        if all(any(re.match(sign, name) for name in names) for sign in source.signs):
            return source
    raise CheckpointError(
        f"keys of no known detector (first: {', '.join(sorted(names)[:3])}); expected those of mmdetection3d for "
        + ", ".join(source.title for source in SOURCES)
    )


def turn_code(values: Tensor, dim: int = -1, old_boxes: bool = True) -> Tensor:
    """Box codes of another query head, or the rows of a layer that gives them, to ours."""
    entry, sign = (OLD_ENTRY, OLD_SIGN) if old_boxes else (NEW_ENTRY, (1.0,) * 10)
    shape = [1] * values.ndim
    shape[dim] = 10
    return values.index_select(dim, torch.tensor(entry)) * values.new_tensor(sign).view(shape)


def turn_weight(name: str, value: Tensor, old_boxes: bool = True) -> Tensor:
    """A weight, or its gradient, from another box convention to ours; others as they are.

    Args:
        name: in the source.
        value: any shape; rows are output channels.
        old_boxes: whether boxes are those before mmdetection3d 1.0.
    """
    if re.search(r"(^|\.)reg_branches\.\d+\.4\.", name):
        return turn_code(value, dim=0, old_boxes=old_boxes)
    if old_boxes and re.search(r"\.dim\.\d+\.(weight|bias)$", name) and len(value) == 3:
        return value[[1, 0, 2]]
    if old_boxes and re.search(r"\.rot\.\d+\.(weight|bias)$", name) and len(value) == 2:
        return -value[[1, 0]]
    return value


def turn_kernel(value: Tensor) -> Tensor:
    """A sparse kernel of spconv 1, (kz, ky, kx, in, out), to ours and spconv 2's, (out, kz, ky, kx, in).

    Which of the two it has is seen from where the window's three extents stand.
    """
    if value.ndim == 5 and tuple(value.shape[:3]) in ((3, 3, 3), (3, 1, 1)):
        return value.permute(4, 0, 1, 2, 3).contiguous()
    return value
