"""Names, and the box conventions of output layers, of published detectors -> ours.

Which key stands for what is a fact of each project's public code; docs/from_mmdet3d.md says which of these were
held against numbers and which only against names and shapes. Old boxes, before mmdetection3d 1.0, are (width,
length, height) with a clockwise yaw from -y; see docs/frames.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..classes import CLASSES
from ..errors import CheckpointError

Names = tuple[tuple[str, str], ...]  # patterns at the beginning of a name, and what stands there in ours

CENTERPOINT_TRUNK: Names = (
    (r"pts_backbone\.", "backbone."),
    (r"pts_neck\.deblocks\.", "neck.deblocks."),
    (r"pts_bbox_head\.(shared_conv|task_heads)\.", r"head.\1."),
)
CENTERPOINT_PILLARS: Names = ((r"pts_voxel_encoder\.pfn_layers\.", "pillars.pfn_layers."), *CENTERPOINT_TRUNK)
CENTERPOINT_VOXELS: Names = ((r"pts_middle_encoder\.", "pillars."), *CENTERPOINT_TRUNK)
BEVDET_BODY: Names = (
    (r"img_backbone\.", "image_encoder.backbone."),
    (r"img_neck\.lateral_convs\.(\d+)\.conv\.", r"image_encoder.neck.laterals.\1."),
    (r"img_neck\.fpn_convs\.0\.conv\.", "image_encoder.neck.smooth."),
    (r"pre_process_net\.layers\.0\.", "fusion.blocks."),
    (r"img_bev_encoder_backbone\.layers\.", "bev_encoder.layers."),
    (r"img_bev_encoder_neck\.up2\.1\.", "bev_neck.refine.0."),
    (r"img_bev_encoder_neck\.up2\.2\.", "bev_neck.refine.1."),
    (r"img_bev_encoder_neck\.up2\.4\.", "bev_neck.refine.3."),
    (r"img_bev_encoder_neck\.up2\.5\.", "bev_neck.refine.4."),  # the release's extra norm
    (r"img_bev_encoder_neck\.conv\.", "bev_neck.conv."),
    (r"pts_bbox_head\.(shared_conv|task_heads)\.", r"head.\1."),
)
MEGVII_DEPTH_NET: Names = (
    (r"img_view_transformer\.depth_net\.", "lift.depth_net."),
    (r"img_view_transformer\.depth_aggregation_net\.", "lift.aggregation."),
)
BEVDET: Names = (
    (r"img_view_transformer\.depthnet\.", "lift.depth_and_context."),
    *MEGVII_DEPTH_NET,
    *BEVDET_BODY,
)
BEVDET_2: Names = (
    (r"img_view_transformer\.depth_net\.(weight|bias)$", r"lift.depth_and_context.\1"),
    *MEGVII_DEPTH_NET,
    *BEVDET_BODY,
)
BEVDEPTH_OF_BEVDET: Names = (
    (r"img_view_transformer\.featnet\.", "lift.depth_net.context_conv."),
    (r"img_view_transformer\.se\.input_conv\.", "lift.depth_net.reduce_conv."),
    (r"img_view_transformer\.se\.fc\.0\.", "lift.depth_net.camera_norm."),
    (r"img_view_transformer\.se\.fc\.1\.", "lift.depth_net.camera_gate."),
    (r"img_view_transformer\.extra_depthnet\.layers\.0\.", "lift.depth_net.blocks."),
    (r"img_view_transformer\.dcn\.0\.", "lift.depth_net.deform."),
    (r"img_view_transformer\.dcn\.1\.", "lift.depth_net.deform_norm."),
    (r"img_view_transformer\.depthnet\.", "lift.depth_net.depth_conv."),
    *BEVDET_BODY,
)
GEOMETRY = r"img_view_transformer\.(dx|bx|nx|frustum)$"  # ours follows from the configuration
BEVDEPTH_OF_MEGVII: Names = (
    (r"backbone\.img_backbone\.", "image_encoder.backbone."),
    (r"backbone\.img_neck\.", "image_encoder.neck."),
    (r"backbone\.depth_net\.", "lift.depth_net."),
    (r"backbone\.depth_aggregation_net\.", "lift.aggregation."),
    (r"head\.trunk\.(conv1|bn1)\.", r"bev_encoder.\1."),
    *((rf"head\.trunk\.layer{i + 1}\.", f"bev_encoder.layers.{i}.") for i in range(4)),
    (r"head\.neck\.", "bev_neck."),
    (r"head\.(shared_conv|task_heads)\.", r"head.\1."),
)
QUERIES: Names = (  # inside a query head; the attentions of a layer depend on whose layer it is
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
OF_QUERY_HEAD = re.compile(
    r"query_embedding\.|cls_branches\.|reg_branches\.|transformer\.(decoder|reference_points)\."
)
DET3D_HEAD: Names = (
    (r"bbox_head\.shared_conv\.0\.", "head.shared_conv.conv."),
    (r"bbox_head\.shared_conv\.1\.", "head.shared_conv.bn."),
    (r"bbox_head\.tasks\.(\d+)\.hm\.0\.", r"head.task_heads.\1.heatmap.0.conv."),
    (r"bbox_head\.tasks\.(\d+)\.hm\.1\.", r"head.task_heads.\1.heatmap.0.bn."),
    (r"bbox_head\.tasks\.(\d+)\.hm\.3\.", r"head.task_heads.\1.heatmap.1."),
    (r"bbox_head\.tasks\.(\d+)\.(reg|height|dim|rot|vel)\.0\.", r"head.task_heads.\1.\2.0.conv."),
    (r"bbox_head\.tasks\.(\d+)\.(reg|height|dim|rot|vel)\.1\.", r"head.task_heads.\1.\2.0.bn."),
    (r"bbox_head\.tasks\.(\d+)\.(reg|height|dim|rot|vel)\.3\.", r"head.task_heads.\1.\2.1."),
    (r"neck\.deblocks\.", "neck.deblocks."),
)
DET3D_PILLARS: Names = ((r"reader\.pfn_layers\.", "pillars.pfn_layers."), *DET3D_HEAD)
# Its stages begin with the convolution that halves the map; ours, as mmdetection3d's, end with it.
DET3D_VOXELS: Names = (
    (r"backbone\.conv_input\.", "pillars.conv_input."),
    (r"backbone\.extra_conv\.", "pillars.conv_out."),
    (r"backbone\.conv1\.", "pillars.encoder_layers.encoder_layer1."),
    *(
        row
        for i in (2, 3, 4)
        for row in (
            (rf"backbone\.conv{i}\.([01])\.", rf"pillars.encoder_layers.encoder_layer{i - 1}.2.\1."),
            (rf"backbone\.conv{i}\.3\.", f"pillars.encoder_layers.encoder_layer{i}.0."),
            (rf"backbone\.conv{i}\.4\.", f"pillars.encoder_layers.encoder_layer{i}.1."),
        )
    ),
    *DET3D_HEAD,
)
# Convolutions of det3d have biases before batch norms, where ours and mmdetection3d's have none.
BIAS_BEFORE_NORM = r"(.*)\.conv([12]?)\.bias$"

ADAPTERS: Names = (
    (r"channel_wise_adaptations\.(\d+)\.(?:1\.)?conv1\.", r"taps.\1.adapter.layers.0."),
    (r"channel_wise_adaptations\.(\d+)\.(?:1\.)?norm1\.", r"taps.\1.adapter.layers.1."),
    (r"channel_wise_adaptations\.(\d+)\.(?:1\.)?conv2\.", r"taps.\1.adapter.layers.3."),
    (r"channel_wise_adaptations\.(\d+)\.(?:1\.)?norm2\.", r"taps.\1.adapter.layers.4."),
    (r"channel_wise_adaptations\.(\d+)\.(?:1\.)?conv3\.", r"taps.\1.adapter.layers.6."),
    (r"channel_wise_adaptations\.(\d+)\.(?:1\.)?norm3\.", r"taps.\1.adapter.layers.7."),
    (r"channel_wise_adaptations\.(\d+)\.(?:[01]\.)?(weight|bias)$", r"taps.\1.adapter.conv.\2"),
    (r"adaptation_layers\.(\d+)\.(weight|bias)$", r"taps.\1.adapter.conv.\2"),
    (r"spatial_wise_adaptations\.(\d+)\.", r"taps.\1.smooth."),
)
TEACHER = "teacher_model."  # what distill-bev puts before its teacher's names, should a file hold one

# Old entry of each number of our box code (x, y, z, log l, log w, log h, sine and cosine of the yaw, velocity).
# Turning the yaw swaps sine and cosine and their signs.
OLD_ENTRY = (0, 1, 4, 3, 2, 5, 7, 6, 8, 9)
OLD_SIGN = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0)
NEW_ENTRY = (0, 1, 4, 2, 3, 5, 6, 7, 8, 9)  # from mmdetection3d 1.0 on: length first, our yaw

CLASSES_OF_MMDET3D = (  # the order of the rows of its query heads' class scores
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)

EGO_FRAME = "its BEV map lies in the ego frame, so that the model needs frame: ego"


@dataclass(frozen=True)
class Source:
    """A published architecture: its names in ours (None: unknown), and what its authors' code did otherwise.

    `boxes`: convention of the head's outputs; None where it depends on the version of mmdetection3d.
    `pixels`: how its images were normalised, a name of `pixels.PIXELS`; None where it sees none.
    `needless`: names that follow from our configuration, or that nothing reads.
    `biases_before_norms`: to be folded into the norms.
    `deconvs`: kernels of transposed convolutions, which are plain ones here if 1x1.
    `ego_frame`: whether its BEV map lies there.
    """

    title: str
    kind: Literal["student", "teacher"]
    rename: Callable[[str], str | None]
    boxes: Literal["old", "new"] | None = None
    pixels: str | None = None
    needless: str = r"(?!)"
    biases_before_norms: bool = False
    ego_frame: bool = False
    deconvs: str = r"(?!)"

    def is_needless(self, name: str) -> bool:
        return re.match(self.needless, name) is not None

    def knows(self, name: str) -> bool:
        return self.is_needless(name) or self.rename(name) is not None


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
    if name.startswith("img_backbone.") or re.match(r"img_neck\.(lateral|fpn)_convs\.", name):
        return name.replace("img_", "image_encoder.", 1)
    if not name.startswith(HEAD):
        return None
    name = name.removeprefix(HEAD)
    if OF_BEVFORMER_ENCODER.match(name):
        return "encoder." + query_name(name, "temporal", "spatial")
    return (
        "head." + query_name(name, "self_attention", "cross_attention") if OF_QUERY_HEAD.match(name) else None
    )


def lidar_query_name(name: str) -> str | None:
    """A name of a LiDAR teacher with a query head (LiDARFormer, MVPFormer)."""
    if re.match(r"pts_backbone\.|pts_neck\.(lateral|fpn)_convs\.", name):
        return name.removeprefix("pts_")
    if re.match(r"pts_voxel_encoder\.pfn_layers\.|pts_middle_encoder\.", name):
        return "points." + name.split(".", 1)[1]
    if not name.startswith(HEAD):
        return None
    name = name.removeprefix(HEAD)
    if name.startswith("transformer.encoder."):
        return "encoder." + query_name(name, "cross_attention", "none")
    if name.startswith("bev_embedding."):
        return "encoder." + name
    return (
        "head." + query_name(name, "self_attention", "cross_attention") if OF_QUERY_HEAD.match(name) else None
    )


def det3d_name(name: str, table: Names) -> str | None:
    """A name of tianweiy's CenterPoint; its stages count a padding layer that ours do without."""
    if stage := re.match(r"neck\.blocks\.(\d+)\.(\d+)\.(.*)", name):
        return f"backbone.blocks.{stage[1]}.{int(stage[2]) - 1}.{stage[3]}"
    return renamed(name, table)


def adapter_name(name: str) -> str | None:
    """A name of distill-bev's adapters in our `Distiller`."""
    return renamed(name, ADAPTERS)


SOURCES = (  # where several know equally many keys of a file, the first is taken
    Source("CenterPoint with pillars", "teacher", lambda name: renamed(name, CENTERPOINT_PILLARS)),
    Source("CenterPoint with voxels", "teacher", lambda name: renamed(name, CENTERPOINT_VOXELS)),
    Source(
        "BEVDet from version 2 on",
        "student",
        lambda name: renamed(name, BEVDET_2),
        boxes="new",
        pixels="swapped",
        ego_frame=True,
    ),
    Source("BEVDet", "student", lambda name: renamed(name, BEVDET), pixels="rgb", needless=GEOMETRY),
    Source(
        "BEVDepth of BEVDet",
        "student",
        lambda name: renamed(name, BEVDEPTH_OF_BEVDET),
        pixels="rgb",
        needless=GEOMETRY,
    ),
    Source(
        "BEVDepth of Megvii",
        "student",
        lambda name: renamed(name, BEVDEPTH_OF_MEGVII),
        boxes="new",
        pixels="swapped",
        needless=r"backbone\.(voxel_size|voxel_coord|voxel_num|frustum)$",
        ego_frame=True,
        deconvs=r"(backbone\.img_neck|head\.neck)\.deblocks\.\d+\.0\.weight$",
    ),
    Source(
        "BEVFormer",
        "student",
        bevformer_name,
        pixels="rgb",
        needless=r"pts_bbox_head\.code_weights$",
    ),
    Source(
        "LiDAR teacher with a query head",
        "teacher",
        lidar_query_name,
        needless=r"pts_bbox_head\.(code_weights|transformer\.level_embeds)$",
    ),
    Source(
        "CenterPoint of det3d with pillars",
        "teacher",
        lambda name: det3d_name(name, DET3D_PILLARS),
        boxes="old",
        biases_before_norms=True,
    ),
    Source(
        "CenterPoint of det3d with voxels",
        "teacher",
        lambda name: det3d_name(name, DET3D_VOXELS),
        boxes="old",
        biases_before_norms=True,
    ),
)


def recognise(names: Sequence[str]) -> Source:
    """The source that knows most of these names, and at least half of them.

    Raises:
        CheckpointError: none does; says which comes nearest.
    """
    if not names:
        raise CheckpointError(
            "no keys of a detector; expected its weights, with or without those of adapters"
        )
    known = {source.title: sum(map(source.knows, names)) for source in SOURCES}
    best = max(SOURCES, key=lambda source: known[source.title])
    if 2 * known[best.title] >= len(names):
        return best
    first = ", ".join(sorted(names)[:3])
    if any(re.match(r"(conv1|layer[1-4]\.\d+\.conv1|stages\.|patch_embed\.)", name) for name in names):
        raise CheckpointError(
            f"keys of an image backbone alone (first: {first}); expected those of a whole detector, so give this "
            "file as image_encoder.weights of the student"
        )
    raise CheckpointError(
        f"keys of no known detector (first: {first}); the nearest, {best.title}, knows {known[best.title]} of "
        f"{len(names)}; known: " + ", ".join(source.title for source in SOURCES)
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


def turn_classes(name: str, value: Tensor) -> Tensor:
    """The rows of a query head's class scores, from mmdetection3d's order of classes to ours; others as they are."""
    if re.search(r"(^|\.)cls_branches\.\d+\.6\.", name) and len(value) == len(CLASSES):
        return value[[CLASSES_OF_MMDET3D.index(name) for name in CLASSES]]
    return value


def turn_kernel(value: Tensor) -> Tensor:
    """A sparse kernel of spconv 1, (kz, ky, kx, in, out), to ours and spconv 2's, (out, kz, ky, kx, in).

    Which of the two it has is seen from where the window's three extents stand.
    """
    if value.ndim == 5 and tuple(value.shape[:3]) in ((3, 3, 3), (3, 1, 1)):
        return value.permute(4, 0, 1, 2, 3).contiguous()
    return value


def turn_deconv(value: Tensor) -> Tensor:
    """The (in, out, 1, 1) kernel of a transposed convolution to the plain one's (out, in, 1, 1); larger as they are."""
    return value.transpose(0, 1).contiguous() if value.shape[2:] == (1, 1) else value


def widen_origins(value: Tensor) -> Tensor:
    """The first kernel of det3d's MVP, (..., 21), for the 23 columns that ours tells voxels by; others as they are.

    Theirs: x, y, z, intensity, time of measured points; x, y, z, ten classes, score, time, copied or not of those with
    a class. The latter's time has no column in ours, and needs none where virtual points come with key frames only.
    """
    if value.ndim != 5 or value.shape[-1] != 21:
        return value
    wide = value.new_zeros(*value.shape[:-1], 23)
    wide[..., [0, 1, 2, 3, 5, 6, 7, 8, *range(10, 21), 22]] = value[..., [*range(19), 20]]
    return wide
