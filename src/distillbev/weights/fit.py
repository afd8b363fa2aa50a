"""The model of ours that weights are for: what their shapes tell of it, and how they differ from it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace
from torch import Tensor

from ..classes import CENTERPOINT_TASKS
from ..errors import CheckpointError, ConfigError
from ..grid import BevGrid
from ..models.bev_encoder import BevEncoderConfig, BevResNetConfig, LssNeckConfig
from ..models.bevdet import BevDetConfig
from ..models.bevformer import BevFormerConfig, EncoderConfig
from ..models.center_head import CenterHeadConfig
from ..models.centerpoint import CenterPointConfig
from ..models.depth_net import DepthNetConfig, MegviiDepthNetConfig, ReleaseDepthNetConfig
from ..models.detectors import StudentConfig, TeacherConfig, build_student, build_teacher
from ..models.history import HistoryConfig
from ..models.image_encoder import RESNET_BLOCKS, ImageEncoderConfig, ResNetConfig
from ..models.image_pyramid import ImagePyramidConfig
from ..models.lidar_query_teacher import LidarQueryTeacherConfig, QueryEncoderConfig
from ..models.lift import DepthBins, LiftConfig
from ..models.nms import RotatedNms
from ..models.pillars import DynamicPillarsConfig, HardPillarsConfig
from ..models.query_head import QueryHeadConfig
from ..models.second import SecondConfig, SecondFpnConfig
from ..models.voxels import MVP_COLUMNS, ORIGIN_COLUMNS, SparseVoxelsConfig
from .rename import CLASSES_OF_MMDET3D

State = dict[str, Tensor]
SCALES_OF_BEVDET = (1.0, 0.7, 0.7, 0.4, 0.55, 1.1, 1.0, 1.0, 4.5, 9.0)  # of its classes' footprints in NMS
HEADS = 8  # of all published attentions; their shapes do not tell
HALF_SIDE_M = 51.2  # of the ground of all published query detectors
# By their number: BEVDet's, those of its finer variants, Megvii's.
DEPTHS = {59: DepthBins(1.0, 60.0, 1.0), 118: DepthBins(1.0, 60.0, 0.5), 112: DepthBins(2.0, 58.0, 0.5)}
FIRST_OF_ENCODER = "bev_encoder.layers.0.0.conv1.weight"


@dataclass
class Misfit:
    """How weights differ from a model; false where they do not."""

    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)  # name, found and expected shape

    def __bool__(self) -> bool:
        return bool(self.missing or self.surplus or self.reshaped)

    def __str__(self) -> str:
        parts = (
            (self.missing, "keys are missing"),
            (self.surplus, "have no place in it"),
            (self.reshaped, "differ in shape"),
        )
        return "; ".join(f"{len(names)} {what} (first: {names[0]})" for names, what in parts if names)


def misfit(state: State, config: StudentConfig | TeacherConfig) -> Misfit:
    """What keeps weights from being loaded into the model of a configuration."""
    model = build_student(config) if isinstance(config, StudentConfig) else build_teacher(config)
    expected = model.state_dict()
    return Misfit(
        sorted(expected.keys() - state.keys()),
        sorted(state.keys() - expected.keys()),
        [
            f"{name}, found {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & state.keys())
            if state[name].shape != expected[name].shape
        ],
    )


def infer_config(
    state: State, new_boxes: bool = False, ego_frame: bool = False
) -> StudentConfig | TeacherConfig:
    """The configuration that weights under our names were made for, as far as their shapes tell it.

    What they do not tell (ranges and cells of grids, strides, depths of bins) is as published.

    Args:
        new_boxes: whether boxes of the source are those from mmdetection3d 1.0 on; its hard pillars differ.
        ego_frame: whether the source's BEV map lies there; such students also tell velocities per second.

    Raises:
        CheckpointError: too little is there to tell.
    """
    try:
        if _any(state, "lift."):
            return _bevdet(state, ego_frame)
        if _any(state, "encoder.camera_embedding"):
            return _bevformer(state)
        if _any(state, "encoder.bev_embedding"):
            return _lidar_query_teacher(state, new_boxes)
        if _any(state, "pillars."):
            return CenterPointConfig(
                grid=BevGrid(cell_m=0.1 if _any(state, "pillars.conv_input.") else 0.2),
                pillars=_points(state, "pillars.", new_boxes),
                backbone=_second(state),
                neck=_second_fpn(state, "neck.", _second(state).strides),
                head=_center_head(state),
            )
    except KeyError as error:
        raise CheckpointError(f"no {error.args[0]}, so its model cannot be told") from None
    except ConfigError as error:
        raise CheckpointError(f"shapes of no model of ours ({error})") from None
    raise CheckpointError("parts of a model only, so which cannot be told")


def _any(state: State, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)


def _count(state: State, pattern: str) -> int:
    """How many numbers stand where a pattern's group does."""
    return len({found[1] for name in state if (found := re.match(pattern, name))})


def _center_head(state: State) -> CenterHeadConfig:
    shared = len(state["head.shared_conv.conv.weight"])
    branch = state["head.task_heads.0.reg.0.conv.weight"]
    tasks = _count(state, r"head\.task_heads\.(\d+)\.")
    widths = [len(_last(state, rf"head\.task_heads\.{task}\.heatmap\.\d+\.weight$")) for task in range(tasks)]
    if widths == [len(CLASSES_OF_MMDET3D)]:  # BEVDet from version 2 on
        tasks_and_nms = {"tasks": (CLASSES_OF_MMDET3D,), "nms": (RotatedNms(class_scale=SCALES_OF_BEVDET),)}
    elif widths == [len(task) for task in CENTERPOINT_TASKS]:
        tasks_and_nms = {}
    else:
        raise CheckpointError(
            f"a head of tasks with {widths} classes; expected {[len(task) for task in CENTERPOINT_TASKS]}, the ten of "
            "nuScenes"
        )
    return CenterHeadConfig(
        **tasks_and_nms,
        shared_channels=shared,
        branch_channels=len(branch),
        branch_convs=_count(state, r"head\.task_heads\.0\.reg\.(\d+)\.conv\."),
        branch_kernel=branch.shape[-1],
    )


def _last(state: State, pattern: str) -> Tensor:
    names = sorted(name for name in state if re.match(pattern, name))
    if not names:
        raise KeyError(pattern.replace("\\", ""))
    return state[names[-1]]


def _points(
    state: State, prefix: str, new_boxes: bool
) -> HardPillarsConfig | DynamicPillarsConfig | SparseVoxelsConfig:
    if f"{prefix}conv_input.0.weight" in state:
        encoder = rf"{re.escape(prefix)}encoder_layers\.encoder_layer"
        config = SparseVoxelsConfig(
            channels=tuple(
                len(state[f"{prefix}encoder_layers.encoder_layer{i + 1}.0.conv1.weight"])
                for i in range(_count(state, rf"{encoder}(\d+)\."))
            ),
            out_channels=len(state[f"{prefix}conv_out.0.weight"]),
            blocks_per_stage=_count(state, rf"{encoder}1\.(\d+)\.conv1\."),
        )
        features = state[f"{prefix}conv_input.0.weight"].shape[-1]
        if features != ORIGIN_COLUMNS - 1:
            return replace(config, point_features=features)
        return replace(
            config,
            point_features=MVP_COLUMNS,
            by_origin=True,
            max_points=None,
            max_voxels=None,
            max_voxels_eval=None,
        )
    if not _any(state, f"{prefix}pfn_layers.0."):
        raise KeyError(f"{prefix}pfn_layers.0")
    layers = _count(state, rf"{re.escape(prefix)}pfn_layers\.(\d+)\.")
    dynamic = f"{prefix}pfn_layers.0.0.weight" in state
    kernels = [state[f"{prefix}pfn_layers.{i}.{0 if dynamic else 'linear'}.weight"] for i in range(layers)]
    further = kernels[0].shape[1] - 5  # columns beside the offsets from the mean and from the centre
    if dynamic:
        with_distance = further in (6, 18)
        features = further - with_distance
        return DynamicPillarsConfig(
            channels=tuple(map(len, kernels)),
            point_features=features,
            with_distance=with_distance,
            virtual_flag_column=15 if features == 17 else None,
        )
    if further == 16:
        raise CheckpointError(
            "pillars of det3d's MVP, whose 16 columns mean other things for measured and virtual points; expected 5, "
            "or the 17 of the release's teachers, so take its voxels or the release's MVP"
        )
    one_more = further == 6
    return HardPillarsConfig(
        channels=(*(2 * len(kernel) for kernel in kernels[:-1]), len(kernels[-1])),
        point_features=further - one_more,
        offset_axes="xyz" if one_more and new_boxes else "xy",
        with_distance=one_more and not new_boxes,
    )


def _second(state: State) -> SecondConfig:
    if not _any(state, "backbone.blocks.0."):
        raise KeyError("backbone.blocks.0")
    stages = _count(state, r"backbone\.blocks\.(\d+)\.")
    convolutions = [
        sum(value.ndim == 4 for name, value in state.items() if name.startswith(f"backbone.blocks.{i}."))
        for i in range(stages)
    ]
    voxels = any(name.endswith("conv_input.0.weight") for name in state)
    return SecondConfig(
        channels=tuple(len(state[f"backbone.blocks.{i}.0.weight"]) for i in range(stages)),
        layers=tuple(n - 1 for n in convolutions),
        strides=(1, *[2] * (stages - 1)) if voxels else (2,) * stages,
    )


def _second_fpn(state: State, prefix: str, stage_strides: Sequence[int]) -> SecondFpnConfig:
    """Windows tell factors up to their sense; only one choice brings all stages to one size.

    Args:
        prefix: of the neck.
        stage_strides: of each stage against the one before.
    """
    kernels = [state[f"{prefix}deblocks.{i}.0.weight"] for i in range(len(stage_strides))]
    strides = [math.prod(stage_strides[1 : i + 1]) for i in range(len(kernels))]
    for first in (0.25, 0.5, 1.0, 2.0, 4.0):
        factors = tuple(first * stride for stride in strides)
        if all(max(f, 1 / f) == k.shape[-1] for f, k in zip(factors, kernels, strict=True)):
            channels = (k.shape[1] if f > 1 else len(k) for f, k in zip(factors, kernels, strict=True))
            return SecondFpnConfig(channels=tuple(channels), upsample=factors)
    raise CheckpointError(
        f"a neck with windows of {[k.shape[-1] for k in kernels]} cells, which bring the stages to no one size"
    )


def _resnet(state: State) -> ResNetConfig:
    prefix = "image_encoder.backbone."
    if f"{prefix}conv1.weight" not in state:
        raise KeyError(f"{prefix}conv1.weight")
    blocks = tuple(_count(state, rf"{re.escape(prefix)}layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
    bottlenecks = f"{prefix}layer1.0.conv3.weight" in state
    deformable = any(name.endswith("conv2.conv_offset.weight") for name in state)
    for depth in (18, 34, 50, 101):
        if RESNET_BLOCKS[depth] == blocks and (depth >= 50) == bottlenecks:
            return ResNetConfig(
                depth=depth,
                base_width=len(state[f"{prefix}conv1.weight"]),
                stride_on="1x1" if deformable else "3x3",  # published deformable ones are of the caffe style
            )
    raise CheckpointError(f"a backbone with stages of {list(blocks)} blocks, which is none of our ResNets")


def _bevdet(state: State, ego_frame: bool) -> BevDetConfig:
    encoder = _bev_encoder(state)
    first = state["bev_encoder.conv1.weight" if isinstance(encoder, BevResNetConfig) else FIRST_OF_ENCODER]
    fused = state.get("fusion.blocks.0.conv1.weight")
    context = state.get("lift.depth_net.context_conv.weight")
    channels = next(len(kernel) for kernel in (fused, context, first.transpose(0, 1)) if kernel is not None)
    earlier = first.shape[1] // channels - 1
    depth_net, bins = _depth_net(state, channels)
    of_megvii = isinstance(encoder, BevResNetConfig)
    return BevDetConfig(
        frame="ego" if ego_frame else "lidar",
        image_encoder=_image_encoder(state),
        lift=LiftConfig(
            channels=channels,
            depth=DEPTHS.get(bins, DepthBins(start_m=1.0, stop_m=1.0 + bins)),
            depth_net=depth_net,
            aggregate_depth=_any(state, "lift.aggregation."),
            z_range_m=(-5.0, 3.0) if ego_frame else (-10.0, 10.0),
            corner_aligned_pixels=True,
            truncate_cells=True,
        ),
        history=None
        if not earlier
        else HistoryConfig(
            num_frames=earlier,
            blocks=_count(state, r"fusion\.blocks\.(\d+)\."),
            align="rays" if of_megvii else "map",
            velocity="per_second" if ego_frame else "displacement",
            lower_corners=True,
        ),
        bev_encoder=encoder,
        bev_neck=_second_fpn(state, "bev_neck.", encoder.stage_strides) if of_megvii else _lss_neck(state),
        head=_center_head(state),
    )


def _bev_encoder(state: State) -> BevEncoderConfig | BevResNetConfig:
    stages = _count(state, r"bev_encoder\.layers\.(\d+)\.")
    convolutions = [state[f"bev_encoder.layers.{i}.0.conv1.weight"] for i in range(stages)]
    build = BevResNetConfig if "bev_encoder.conv1.weight" in state else BevEncoderConfig
    return build(
        channels=tuple(map(len, convolutions)),
        blocks=tuple(_count(state, rf"bev_encoder\.layers\.{i}\.(\d+)\.") for i in range(stages)),
        strides=(2,) * stages,
    )


def _lss_neck(state: State) -> LssNeckConfig:
    joined = len(state["bev_neck.conv.0.weight"])
    refined = state.get("bev_neck.refine.3.weight")
    return LssNeckConfig(
        out_channels=joined if refined is None else len(refined),
        extra_upsample=None if refined is None else 2,
        extra_norm_act="bev_neck.refine.4.weight" in state,
    )


def _image_encoder(state: State) -> ImageEncoderConfig:
    if _any(state, "image_encoder.neck.deblocks."):
        neck = _second_fpn(state, "image_encoder.neck.", (4, 2, 2, 2))
        return ImageEncoderConfig(
            backbone=_resnet(state),
            out_channels=sum(neck.channels),
            output_stride=round(4 / neck.upsample[0]),
            neck=neck,
        )
    laterals = _count(state, r"image_encoder\.neck\.laterals\.(\d+)\.")
    return ImageEncoderConfig(
        backbone=_resnet(state),
        out_channels=len(state["image_encoder.neck.smooth.weight"]),
        output_stride=32 // 2 ** (laterals - 1),
    )


def _depth_net(state: State, channels: int) -> tuple[DepthNetConfig | None, int]:
    """The net that says depth, and its number of bins."""
    if "lift.depth_and_context.weight" in state:
        return None, len(state["lift.depth_and_context.weight"]) - channels
    if "lift.depth_net.camera_gate.weight" in state:
        depth_net = ReleaseDepthNetConfig(mid_channels=len(state["lift.depth_net.camera_gate.weight"]))
        return depth_net, len(state["lift.depth_net.depth_conv.weight"])
    moves, kernel = (
        state["lift.depth_net.depth_conv.4.conv_offset.weight"],
        state["lift.depth_net.depth_conv.4.weight"],
    )
    depth_net = MegviiDepthNetConfig(
        mid_channels=len(kernel), deform_groups=len(kernel) // kernel.shape[1], modulated=len(moves) == 27
    )
    return depth_net, len(state["lift.depth_net.depth_conv.5.weight"])


def _query_head(state: State) -> QueryHeadConfig:
    layer = "head.layers.0"
    return QueryHeadConfig(
        num_queries=len(state["head.query_embedding.weight"]),
        layers=_count(state, r"head\.layers\.(\d+)\."),
        heads=HEADS,
        points=_points_per(state[f"{layer}.cross_attention.attention_weights.bias"], HEADS),
        ffn_channels=len(state[f"{layer}.feed_forward.widen.weight"]),
    )


def _points_per(weights: Tensor, shares: int) -> int:
    if len(weights) % shares:
        raise CheckpointError(
            f"attention to {len(weights)} points, which do not divide among {shares}; expected {HEADS} heads, "
            "--recipe names another model"
        )
    return len(weights) // shares


def _square(cells: Sequence[int]) -> BevGrid:
    """The published ground in these rows and columns; cells are square."""
    rows, columns = cells
    cell_m = 2 * HALF_SIDE_M / columns
    half = rows * cell_m / 2
    return BevGrid(y_range_m=(-half, half), cell_m=cell_m)


def _bevformer(state: State) -> BevFormerConfig:
    levels = len(state["encoder.level_embedding"])
    laterals = _count(state, r"image_encoder\.neck\.lateral_convs\.(\d+)\.")
    finest = 32 // 2 ** (laterals - 1)
    layer = "encoder.layers.0"
    offsets = r"image_encoder\.backbone\.layer(\d)\..*conv_offset"
    return BevFormerConfig(
        grid=_square(
            (len(state["encoder.row_embedding.weight"]), len(state["encoder.column_embedding.weight"]))
        ),
        image_encoder=ImagePyramidConfig(
            backbone=_resnet(state),
            strides=tuple(finest * 2**i for i in range(levels)),
            deformable_stages=tuple(
                sorted({int(found[1]) - 1 for name in state if (found := re.match(offsets, name))})
            ),
        ),
        num_cameras=len(state["encoder.camera_embedding"]),
        channels=state["encoder.camera_embedding"].shape[1],
        encoder=EncoderConfig(
            layers=_count(state, r"encoder\.layers\.(\d+)\."),
            heads=HEADS,
            temporal_points=_points_per(state[f"{layer}.temporal.attention_weights.bias"], 2 * HEADS),
            spatial_points=_points_per(state[f"{layer}.spatial.attention_weights.bias"], HEADS * levels),
            ffn_channels=len(state[f"{layer}.feed_forward.widen.weight"]),
        ),
        head=_query_head(state),
    )


def _lidar_query_teacher(state: State, new_boxes: bool) -> LidarQueryTeacherConfig:
    side = math.isqrt(len(state["encoder.bev_embedding.weight"]))
    points = _points(state, "points.", new_boxes)
    layer = "encoder.layers.0"
    levels = LidarQueryTeacherConfig().levels
    return LidarQueryTeacherConfig(
        grid=_square((side, side)),
        voxel_grid=BevGrid(cell_m=0.064 if isinstance(points, SparseVoxelsConfig) else 0.2),
        points=points,
        backbone=_second(state),
        levels=levels,
        channels=len(state["neck.lateral_convs.0.conv.weight"]),
        encoder=QueryEncoderConfig(
            layers=_count(state, r"encoder\.layers\.(\d+)\."),
            heads=HEADS,
            points=_points_per(state[f"{layer}.cross_attention.attention_weights.bias"], HEADS * levels),
            ffn_channels=len(state[f"{layer}.feed_forward.widen.weight"]),
        ),
        head=_query_head(state),
    )
