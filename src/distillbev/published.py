"""The paper's students and teachers at full size: twelve rows of its main table, and the teachers behind them.

Source: DistillBEV (ICCV 2023), tables 1 and 2, with the settings of the release's launch scripts; what these do
not fix (BEVDet and BEVDet4D) follows the script for BEVDepth4D without the parts that they lack. Beside them stands
BEVDepth as its authors published it (arXiv:2206.10092), with depth refinement, for its public weights.
"""

from __future__ import annotations

from msgspec.structs import replace

from .data.appearance import ColourAugConfig, GridMaskConfig
from .data.augment import BevAugConfig, ImageAugConfig
from .data.object_pasting import ObjectPastingConfig
from .data.settings import DataConfig, PastConfig
from .data.virtual_points import VirtualPointsInput
from .distill.settings import DistillConfig, released_bevdepth4d, released_bevformer
from .grid import BevGrid
from .models.bev_encoder import BevResNetConfig, LssNeckConfig
from .models.bevdet import BevDetConfig
from .models.bevformer import BevFormerConfig
from .models.center_head import CenterHeadConfig
from .models.centerpoint import CenterPointConfig
from .models.depth_net import MegviiDepthNetConfig, ReleaseDepthNetConfig
from .models.history import HistoryConfig
from .models.image_encoder import ImageEncoderConfig
from .models.lidar_query_teacher import LidarQueryTeacherConfig
from .models.lift import DepthBins, DepthLossConfig, LiftConfig
from .models.nms import CircleNms, RotatedNms
from .models.pillars import DynamicPillarsConfig
from .models.second import SecondConfig, SecondFpnConfig
from .models.voxels import SparseVoxelsConfig
from .train.experiment import Experiment, LogConfig, OptimConfig
from .train.schedule import ScheduleConfig

KEY_FRAMES = 28130  # of nuScenes' training split, one epoch
BALANCED_FRAMES = 1931 * 64  # one epoch of class-balanced sampling, as the steps of published logs have it
# Masks exist for key frames only; earlier sweeps come as measured.
VIRTUAL = VirtualPointsInput(absent="measured_only")
# The release draws camera sweeps 0.75 to 2.25 s back in training and takes 1.5 s in tests; key frames are 0.5 s apart.
PAST = PastConfig(step=3, training_steps=(2, 4))
# mmdetection3d's cyclic schedule of 20 epochs. Its targets (x 10, then x 1e-4; momentum x 0.85 / 0.95) are factors of
# where it starts, a tenth of our peak rate and AdamW's usual momentum.
CYCLE = ScheduleConfig(
    shape="one_cycle",
    warmup_share=0.4,
    start_factor=0.1,
    final_factor=1e-5,
    momentum=0.9,
    peak_momentum=0.9 * 0.85 / 0.95,
)
# Scale-NMS by class, for the cameras' errors; barriers, which stand in rows, by distance.
SCALE_NMS = (
    RotatedNms(class_scale=(1.0,)),
    RotatedNms(class_scale=(0.7, 0.7)),
    RotatedNms(class_scale=(0.4, 0.55)),
    CircleNms(min_squared_distance_m2=1.0),
    RotatedNms(class_scale=(1.0, 1.0)),
    RotatedNms(max_iou=0.5, class_scale=(4.5, 9.0)),
)


def centerpoint_pillar02() -> Experiment:
    """LiDAR teacher: CenterPoint with dynamic 0.2 m pillars, 10 sweeps."""
    return Experiment(
        name="centerpoint_pillar02",
        teacher=CenterPointConfig(pillars=DynamicPillarsConfig()),
        data=DataConfig(
            load_images=False,
            bev_aug=BevAugConfig(),
            num_sweeps=9,
            max_box_distance_m=51.2,
            object_pasting=ObjectPastingConfig(),
        ),
        optim=OptimConfig(
            steps=20 * BALANCED_FRAMES // 32,  # 20 epochs, 8 devices of 4
            labelled_per_step=32,
            learning_rate=1e-3,
            schedule=CYCLE,
            clip_norm=35.0,
            class_balanced=True,
        ),
        log=LogConfig(log_every=50, checkpoint_every=2000),
        workers=4,
    )


def centerpoint_voxel01() -> Experiment:
    """LiDAR teacher: CenterPoint with 0.1 m voxels and a sparse encoder."""
    return replace(
        centerpoint_pillar02(),
        name="centerpoint_voxel01",
        teacher=CenterPointConfig(
            grid=BevGrid(cell_m=0.1),
            pillars=SparseVoxelsConfig(),
            backbone=SecondConfig(channels=(128, 256), layers=(5, 5), strides=(1, 2)),
            neck=SecondFpnConfig(channels=(256, 256), upsample=(1.0, 2.0)),
        ),
    )


def mvp_pillar02() -> Experiment:
    """LiDAR teacher with virtual points of the cameras' masks (`distillbev virtual-points` first)."""
    pillars = DynamicPillarsConfig(point_features=17, virtual_flag_column=15)
    base = centerpoint_pillar02()
    data = replace(base.data, virtual_points=VIRTUAL)
    return replace(base, name="mvp_pillar02", teacher=CenterPointConfig(pillars=pillars), data=data)


def lidarformer() -> Experiment:
    """LiDAR teacher of BEVFormer: sparse voxels, then a query head on BEVFormer's grid.

    The release slows its "voxel encoder" to a tenth, but means by it the mean of each voxel, which learns nothing;
    so the sparse encoder learns at the full rate, here too (`optim.backbone_lr_factor`).
    """
    base = centerpoint_pillar02()
    return replace(
        base,
        name="lidarformer",
        teacher=LidarQueryTeacherConfig(),
        data=replace(base.data, object_pasting=None),
        optim=replace(base.optim, steps=20 * BALANCED_FRAMES // 16, labelled_per_step=16, learning_rate=5e-4),
    )


def mvpformer() -> Experiment:
    """The same teacher on virtual points (`distillbev virtual-points` first)."""
    points = SparseVoxelsConfig(
        point_features=17, by_origin=True, max_points=None, max_voxels=None, max_voxels_eval=None
    )
    base = lidarformer()
    data = replace(base.data, virtual_points=VIRTUAL)
    optim = replace(base.optim, steps=20 * BALANCED_FRAMES // 24, labelled_per_step=24)
    teacher = LidarQueryTeacherConfig(points=points)
    return replace(base, name="mvpformer", teacher=teacher, data=data, optim=optim)


def bevdet_r50() -> Experiment:
    """Camera student: BEVDet with ResNet-50 at 704x256, alone."""
    return Experiment(
        name="bevdet_r50",
        student=BevDetConfig(
            bev_neck=LssNeckConfig(extra_norm_act=True),
            head=CenterHeadConfig(code_weights=(1.0,) * 10, nms=SCALE_NMS),
        ),
        data=DataConfig(
            image_size_px=(704, 256),
            image_resize_offset=0.04,
            image_aug=ImageAugConfig(),
            bev_aug=BevAugConfig(),
            load_points=False,
            max_box_distance_m=51.2,
        ),
        optim=OptimConfig(
            steps=24 * BALANCED_FRAMES // 64,  # 24 epochs, 8 devices of 8
            labelled_per_step=64,
            learning_rate=2e-4,
            schedule=ScheduleConfig(
                shape="step", warmup_share=500 / (24 * BALANCED_FRAMES // 64), start_factor=1e-3
            ),
            clip_norm=5.0,
            class_balanced=True,
        ),
        log=LogConfig(log_every=50, checkpoint_every=1000),
        workers=4,
    )


def bevdet4d_r50() -> Experiment:
    """Camera student: BEVDet4D, the map of an earlier key frame beside its own."""
    base = bevdet_r50()
    assert base.student is not None
    student = replace(base.student, history=HistoryConfig())
    return replace(base, name="bevdet4d_r50", student=student, data=replace(base.data, past=PAST))


def bevdepth_r50() -> Experiment:
    """Camera student: BEVDepth in the release's form (BEVDepth4D), depth taught by the LiDAR."""
    base = bevdet4d_r50()
    assert base.student is not None
    lift = LiftConfig(
        depth=DepthBins(start_m=1.0, stop_m=60.0, step_m=1.0), depth_net=ReleaseDepthNetConfig()
    )
    # The weight goes with the release's loss. Its labels do not: they belong to features at cell corners.
    depth_loss = replace(DepthLossConfig.release(), labels="centred")
    student = replace(base.student, lift=lift, depth_loss=depth_loss)
    data = replace(base.data, load_points=True)
    return replace(base, name="bevdepth_r50", student=student, data=data)


def bevdepth_r50_megvii() -> Experiment:
    """Camera student: BEVDepth as its authors published it, two key frames, its map in the ego frame."""
    side_by_side = ImageEncoderConfig(
        neck=SecondFpnConfig(channels=(128, 128, 128, 128), upsample=(0.25, 0.5, 1.0, 2.0))
    )
    base = bevdet_r50()
    return replace(
        base,
        name="bevdepth_r50_megvii",
        student=BevDetConfig(
            frame="ego",
            image_encoder=side_by_side,
            lift=LiftConfig(
                channels=80,
                depth=DepthBins(start_m=2.0, stop_m=58.0, step_m=0.5),
                depth_net=MegviiDepthNetConfig(),
                aggregate_depth=True,
                z_range_m=(-5.0, 3.0),
            ),
            depth_loss=DepthLossConfig(),
            history=HistoryConfig(blocks=0, align="rays", velocity="per_second"),
            bev_encoder=BevResNetConfig(),
            bev_neck=SecondFpnConfig(channels=(64, 64, 64, 64), upsample=(1.0, 2.0, 4.0, 8.0)),
            head=CenterHeadConfig(code_weights=(*(1.0,) * 8, 0.5, 0.5)),
        ),
        data=replace(base.data, image_resize_offset=0.0, load_points=True, past=PastConfig()),
        optim=replace(
            base.optim,
            steps=20 * BALANCED_FRAMES // 64,  # 20 epochs, 8 devices of 8
            weight_decay=1e-7,
            schedule=ScheduleConfig(shape="step", warmup_share=0.0, milestones=(16 / 20, 19 / 20)),
            ema_decay=0.999,
        ),
    )


def bevformer_r50() -> Experiment:
    """Camera student: BEVFormer with ResNet-50 at 1600x900, three key frames before."""
    return Experiment(
        name="bevformer_r50",
        student=BevFormerConfig(),
        data=DataConfig(
            image_size_px=(1600, 900),
            colour_aug=ColourAugConfig(),
            grid_mask=GridMaskConfig(),
            past=PastConfig(num_frames=3),
            load_points=False,
            max_box_distance_m=51.2,
        ),
        optim=OptimConfig(
            steps=24 * KEY_FRAMES // 8,  # 24 epochs, 8 devices of 1
            labelled_per_step=8,
            learning_rate=2e-4,
            backbone_lr_factor=0.1,
            schedule=ScheduleConfig(
                shape="cosine",
                warmup_share=500 / (24 * KEY_FRAMES // 8),
                start_factor=1 / 3,
                final_factor=1e-3,
            ),
            clip_norm=35.0,
        ),
        log=LogConfig(log_every=50, checkpoint_every=1000),
        workers=4,
    )


def taught_by(student: Experiment, teacher: Experiment, distill: DistillConfig, name: str) -> Experiment:
    """A student that imitates a teacher, reading that teacher's points, its head started from the teacher's."""
    data = replace(
        student.data,
        load_points=True,
        num_sweeps=teacher.data.num_sweeps,
        virtual_points=teacher.data.virtual_points,
    )
    return replace(student, name=name, teacher=teacher.teacher, distill=distill, inherit_head=True, data=data)


def bevdet_r50_from_centerpoint() -> Experiment:
    """BEVDet from CenterPoint."""
    return taught_by(
        bevdet_r50(), centerpoint_pillar02(), released_bevdepth4d(), "bevdet_r50_from_centerpoint"
    )


def bevdet_r50_from_mvp() -> Experiment:
    """BEVDet from MVP."""
    return taught_by(bevdet_r50(), mvp_pillar02(), released_bevdepth4d(), "bevdet_r50_from_mvp")


def bevdet4d_r50_from_centerpoint() -> Experiment:
    """BEVDet4D from CenterPoint."""
    return taught_by(
        bevdet4d_r50(), centerpoint_pillar02(), released_bevdepth4d(), "bevdet4d_r50_from_centerpoint"
    )


def bevdet4d_r50_from_mvp() -> Experiment:
    """BEVDet4D from MVP."""
    return taught_by(bevdet4d_r50(), mvp_pillar02(), released_bevdepth4d(), "bevdet4d_r50_from_mvp")


def bevdepth_r50_from_centerpoint() -> Experiment:
    """BEVDepth from CenterPoint."""
    return taught_by(
        bevdepth_r50(), centerpoint_pillar02(), released_bevdepth4d(), "bevdepth_r50_from_centerpoint"
    )


def bevdepth_r50_from_mvp() -> Experiment:
    """BEVDepth from MVP."""
    return taught_by(bevdepth_r50(), mvp_pillar02(), released_bevdepth4d(), "bevdepth_r50_from_mvp")


def bevformer_r50_from_lidarformer() -> Experiment:
    """BEVFormer from LiDARFormer, the row "CenterPoint" of the table."""
    return taught_by(bevformer_r50(), lidarformer(), released_bevformer(), "bevformer_r50_from_lidarformer")


def bevformer_r50_from_mvpformer() -> Experiment:
    """BEVFormer from MVPFormer, the row "MVP" of the table."""
    return taught_by(bevformer_r50(), mvpformer(), released_bevformer(), "bevformer_r50_from_mvpformer")


PUBLISHED = (
    centerpoint_pillar02,
    centerpoint_voxel01,
    mvp_pillar02,
    lidarformer,
    mvpformer,
    bevdet_r50,
    bevdet_r50_from_centerpoint,
    bevdet_r50_from_mvp,
    bevdet4d_r50,
    bevdet4d_r50_from_centerpoint,
    bevdet4d_r50_from_mvp,
    bevdepth_r50,
    bevdepth_r50_from_centerpoint,
    bevdepth_r50_from_mvp,
    bevdepth_r50_megvii,
    bevformer_r50,
    bevformer_r50_from_lidarformer,
    bevformer_r50_from_mvpformer,
)
