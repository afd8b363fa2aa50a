"""Complete experiments by name. A variant calls another recipe and replaces a part.

Recipes named `tiny_` train on a laptop's CPU, in the simulated world or on real nuScenes; the others have the
published sizes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace

from .config import read_config, with_overrides
from .data.augment import BevAugConfig
from .data.settings import DataConfig, PastConfig
from .distill.response import ResponseConfig
from .distill.settings import HALO_IGNORED, DistillConfig, clean
from .distill.teacher import TeacherCacheConfig
from .errors import ConfigError
from .evaluation.metrics import DetectionEvalConfig
from .grid import BevGrid
from .models.bev_encoder import BevEncoderConfig, TopDownNeckConfig
from .models.bevdet import BevDetConfig
from .models.bevformer import BevFormerConfig, EncoderConfig
from .models.center_head import CenterHeadConfig
from .models.centerpoint import CenterPointConfig
from .models.depth_net import ReleaseDepthNetConfig
from .models.history import HistoryConfig
from .models.image_encoder import ImageEncoderConfig, PlainCnnConfig, ResNetConfig
from .models.image_pyramid import ImagePyramidConfig
from .models.lidar_query_teacher import LidarQueryTeacherConfig, QueryEncoderConfig
from .models.lift import DepthBins, DepthLossConfig, LiftConfig
from .models.nms import CircleNms
from .models.pillars import DynamicPillarsConfig
from .models.query_head import QueryHeadConfig
from .models.second import SecondConfig
from .published import PUBLISHED, VIRTUAL, taught_by
from .train.experiment import Experiment, OptimConfig
from .train.inference import finished_weights, read_run

TINY_RANGE_M = (-25.6, 25.6)
TINY_QUERY_GRID = BevGrid(x_range_m=TINY_RANGE_M, y_range_m=TINY_RANGE_M, cell_m=1.6)
TINY_TEACHER_AUG = BevAugConfig(rotation_rad=(-0.4, 0.4), scale=(0.95, 1.05))


def tiny_head(velocity_weight: float) -> CenterHeadConfig:
    """One shared map and 1x1 branches: teacher and student can then share the whole of it.

    Small objects closer than a metre count as one: a camera student places one pedestrian in several cells.
    """
    return CenterHeadConfig(
        shared_channels=96,
        branch_channels=None,
        pool_counts=True,
        code_weights=(1.0,) * 8 + (velocity_weight,) * 2,
        score_threshold=0.02,
        nms=tuple(CircleNms(squared_m2) for squared_m2 in (4.0, 12.0, 10.0, 1.0, 1.0, 1.0)),
        max_detections_per_task=80,
    )


def tiny_centerpoint() -> Experiment:
    """LiDAR teacher of 0.6 M parameters: 0.4 m pillars, ground of 51.2 m, some minutes on a CPU."""
    return Experiment(
        name="tiny_centerpoint",
        teacher=CenterPointConfig(
            grid=BevGrid(x_range_m=TINY_RANGE_M, y_range_m=TINY_RANGE_M, cell_m=0.4),
            pillars=DynamicPillarsConfig(channels=(32,), intensity_scale=1 / 255),
            backbone=SecondConfig(channels=(48, 96, 96), layers=(2, 2, 2), strides=(2, 2, 2)),
            neck=TopDownNeckConfig(out_channels=96),
            head=tiny_head(velocity_weight=0.2),
            norm_momentum=0.1,
        ),
        data=DataConfig(load_images=False, bev_aug=TINY_TEACHER_AUG),
        evaluation=DetectionEvalConfig(max_range_m=24.0),
        optim=OptimConfig(steps=800, labelled_per_step=4, learning_rate=3e-3, ema_decay=0.99),
        cache=True,
    )


def tiny_bevdet() -> Experiment:
    """Camera student of about 1.5 M parameters, trained alone on the labelled frames."""
    return Experiment(
        name="tiny_bevdet",
        student=BevDetConfig(
            grid=BevGrid(x_range_m=TINY_RANGE_M, y_range_m=TINY_RANGE_M, cell_m=0.8),
            image_encoder=ImageEncoderConfig(
                backbone=PlainCnnConfig(widths=(16, 32, 64, 128)), out_channels=96, output_stride=8
            ),
            lift=LiftConfig(depth=DepthBins(start_m=1.0, stop_m=37.0, step_m=0.9), channels=48),
            bev_encoder=BevEncoderConfig(channels=(48, 96, 96), blocks=(2, 2, 2), strides=(1, 2, 2)),
            bev_neck=TopDownNeckConfig(out_channels=96),
            depth_loss=DepthLossConfig(weight=1.0),
            head=tiny_head(velocity_weight=0.2),
        ),
        data=DataConfig(image_size_px=(256, 96)),
        evaluation=DetectionEvalConfig(max_range_m=24.0),
        optim=OptimConfig(steps=1000, labelled_per_step=2, learning_rate=2e-3, ema_decay=0.99),
        cache=True,
    )


def tiny_bevdet_depth() -> Experiment:
    """The same student, learning depth from the LiDAR on every recorded frame; no labels. A start for the others."""
    return replace(depth_first(tiny_bevdet(), ("train", "unlabelled")), name="tiny_bevdet_depth")


def depth_first(student: Experiment, splits: tuple[str, ...]) -> Experiment:
    """The student of an experiment, learning depth alone, with twice the samples per step."""
    optim = replace(
        student.optim, labelled_per_step=0, unlabelled_per_step=2 * student.optim.labelled_per_step
    )
    return replace(student, task="depth", labelled_splits=(), unlabelled_splits=splits, optim=optim)


def tiny_bevdet_from_centerpoint() -> Experiment:
    """The same student, imitating `tiny_centerpoint` on the labelled frames."""
    return replace(
        tiny_bevdet(),
        name="tiny_bevdet_from_centerpoint",
        teacher=tiny_centerpoint().teacher,
        distill=tiny_distillation(),
        inherit_head=True,
    )


def tiny_bevdet_from_unlabelled() -> Experiment:
    """The same student, taught by `tiny_centerpoint` on labelled frames and on frames without labels."""
    labelled_only = tiny_bevdet_from_centerpoint()
    return replace(
        labelled_only,
        name="tiny_bevdet_from_unlabelled",
        unlabelled_splits=("unlabelled",),
        optim=replace(labelled_only.optim, labelled_per_step=1, unlabelled_per_step=1),
    )


def tiny_distillation() -> DistillConfig:
    """Imitation as the demo uses it; how it was chosen stands in docs/experiments.md."""
    return replace(
        clean(("head",), weight=0.003),
        response=ResponseConfig(heatmap=3.0, boxes=0.5),
        cache=TeacherCacheConfig(),
    )


def tiny_mvp() -> Experiment:
    """The tiny teacher on virtual points; run `distillbev virtual-points` on the dataset first."""
    base = tiny_centerpoint()
    assert isinstance(base.teacher, CenterPointConfig)
    pillars = replace(base.teacher.pillars, point_features=17, virtual_flag_column=15)
    data = replace(base.data, virtual_points=VIRTUAL)
    return replace(base, name="tiny_mvp", teacher=replace(base.teacher, pillars=pillars), data=data)


def tiny_bevdet_from_mvp() -> Experiment:
    """The tiny BEVDet, imitating `tiny_mvp`."""
    return taught_by(tiny_bevdet(), tiny_mvp(), tiny_distillation(), "tiny_bevdet_from_mvp")


def tiny_bevdet4d() -> Experiment:
    """The tiny student with the map of the key frame before, and how alike its cells are to the present ones."""
    base = tiny_bevdet()
    assert base.student is not None
    student = replace(
        base.student,
        history=HistoryConfig(blocks=1, correlation_cells=6),
        head=tiny_head(velocity_weight=2.0),  # of displacements over half a second: 1 for m/s
    )
    return replace(base, name="tiny_bevdet4d", student=student, data=replace(base.data, past=PastConfig()))


def tiny_bevdet4d_from_centerpoint() -> Experiment:
    """The tiny BEVDet4D, imitating `tiny_centerpoint`."""
    return taught_by(
        tiny_bevdet4d(), tiny_centerpoint(), tiny_distillation(), "tiny_bevdet4d_from_centerpoint"
    )


def tiny_bevdet4d_from_mvp() -> Experiment:
    """The tiny BEVDet4D, imitating `tiny_mvp`."""
    return taught_by(tiny_bevdet4d(), tiny_mvp(), tiny_distillation(), "tiny_bevdet4d_from_mvp")


def tiny_bevdepth() -> Experiment:
    """The tiny BEVDet4D with a depth net that knows the cameras."""
    base = tiny_bevdet4d()
    assert isinstance(base.student, BevDetConfig)
    lift = replace(base.student.lift, depth_net=ReleaseDepthNetConfig(mid_channels=64))
    return replace(base, name="tiny_bevdepth", student=replace(base.student, lift=lift))


def tiny_bevdepth_from_centerpoint() -> Experiment:
    """The tiny BEVDepth, imitating `tiny_centerpoint`."""
    return taught_by(
        tiny_bevdepth(), tiny_centerpoint(), tiny_distillation(), "tiny_bevdepth_from_centerpoint"
    )


def tiny_bevdepth_from_mvp() -> Experiment:
    """The tiny BEVDepth, imitating `tiny_mvp`."""
    return taught_by(tiny_bevdepth(), tiny_mvp(), tiny_distillation(), "tiny_bevdepth_from_mvp")


def tiny_queries() -> QueryHeadConfig:
    """Two layers of 200 queries, shared by the tiny query teacher and BEVFormer; groups make up for few steps."""
    return QueryHeadConfig(
        num_queries=200, groups=4, layers=2, heads=4, ffn_channels=128, dropout=0.0, max_detections=100
    )


def tiny_lidarformer() -> Experiment:
    """The tiny LiDAR teacher with a query head, on the grid of `tiny_bevformer`."""
    base = tiny_centerpoint()
    assert isinstance(base.teacher, CenterPointConfig)
    teacher = LidarQueryTeacherConfig(
        grid=TINY_QUERY_GRID,
        voxel_grid=base.teacher.grid,
        points=base.teacher.pillars,
        backbone=base.teacher.backbone,
        levels=3,
        channels=64,
        encoder=QueryEncoderConfig(layers=1, heads=4, ffn_channels=128, dropout=0.0, embedding_spread=0.05),
        head=tiny_queries(),
        norm_momentum=0.1,
    )
    return replace(
        base, name="tiny_lidarformer", teacher=teacher, optim=replace(base.optim, learning_rate=2e-3)
    )


def tiny_mvpformer() -> Experiment:
    """The same on virtual points; run `distillbev virtual-points` on the dataset first."""
    base, mvp = tiny_lidarformer(), tiny_mvp()
    assert isinstance(base.teacher, LidarQueryTeacherConfig) and isinstance(mvp.teacher, CenterPointConfig)
    teacher = replace(base.teacher, points=mvp.teacher.pillars)
    data = replace(base.data, virtual_points=VIRTUAL)
    return replace(base, name="tiny_mvpformer", teacher=teacher, data=data)


def tiny_bevformer() -> Experiment:
    """A tiny BEVFormer, one key frame before. Nobody teaches it depth, so it takes longer than the others."""
    base = tiny_bevdet()
    assert isinstance(base.student, BevDetConfig)
    student = BevFormerConfig(
        grid=TINY_QUERY_GRID,
        image_encoder=ImagePyramidConfig(backbone=PlainCnnConfig(widths=(16, 32, 64, 128)), strides=(8, 16)),
        channels=64,
        encoder=EncoderConfig(layers=2, heads=4, ffn_channels=128, dropout=0.0, embedding_spread=0.05),
        head=tiny_queries(),
    )
    data = replace(base.data, past=PastConfig(), load_points=False)
    optim = replace(base.optim, steps=2000)
    return replace(base, name="tiny_bevformer", student=student, data=data, optim=optim)


def tiny_bevformer_from_lidarformer() -> Experiment:
    """The tiny BEVFormer, imitating `tiny_lidarformer`."""
    return taught_by(
        tiny_bevformer(), tiny_lidarformer(), tiny_query_distillation(), "tiny_bevformer_from_lidarformer"
    )


def tiny_bevformer_from_mvpformer() -> Experiment:
    """The tiny BEVFormer, imitating `tiny_mvpformer`."""
    return taught_by(
        tiny_bevformer(), tiny_mvpformer(), tiny_query_distillation(), "tiny_bevformer_from_mvpformer"
    )


def tiny_query_distillation() -> DistillConfig:
    """Imitation of a teacher without heat maps: its features, at objects and elsewhere."""
    (head,) = clean(("head",)).taps
    return DistillConfig(
        taps=(replace(head, false_positive=None),),
        weight=0.01,
        regions=HALO_IGNORED,
        cache=TeacherCacheConfig(),
    )


def large_centerpoint() -> Experiment:
    """LiDAR teacher of the demo's --large: 0.4 m pillars, ground of 102.4 m; for one GPU."""
    tiny = tiny_centerpoint()
    assert tiny.teacher is not None
    return replace(
        tiny,
        name="large_centerpoint",
        teacher=replace(
            tiny.teacher,
            grid=BevGrid(cell_m=0.4),
            pillars=DynamicPillarsConfig(channels=(64,), intensity_scale=1 / 255),
            backbone=SecondConfig(channels=(64, 128, 256), layers=(3, 5, 5), strides=(2, 2, 2)),
        ),
        evaluation=DetectionEvalConfig(),
        optim=replace(tiny.optim, labelled_per_step=8, learning_rate=2e-3),
    )


def large_bevdet() -> Experiment:
    """Camera student of the demo's --large: ResNet-18 at 704x256, ground of 102.4 m; for one GPU."""
    tiny = tiny_bevdet()
    assert tiny.student is not None
    return replace(
        tiny,
        name="large_bevdet",
        student=replace(
            tiny.student,
            grid=BevGrid(cell_m=0.8),
            image_encoder=ImageEncoderConfig(
                backbone=ResNetConfig(depth=18), out_channels=256, output_stride=16
            ),
            lift=LiftConfig(depth=DepthBins(start_m=1.0, stop_m=60.0, step_m=0.5), channels=80),
            bev_encoder=BevEncoderConfig(channels=(96, 192, 384), blocks=(2, 2, 2), strides=(1, 2, 2)),
        ),
        data=replace(tiny.data, image_size_px=(704, 256), bev_aug=BevAugConfig()),
        evaluation=DetectionEvalConfig(),
        optim=replace(tiny.optim, labelled_per_step=8, learning_rate=1e-3),
        workers=8,
    )


RECIPES: dict[str, Callable[[], Experiment]] = {
    recipe.__name__: recipe
    for recipe in (
        tiny_centerpoint,
        tiny_bevdet,
        tiny_bevdet_depth,
        tiny_bevdet_from_centerpoint,
        tiny_bevdet_from_unlabelled,
        large_centerpoint,
        large_bevdet,
        tiny_bevdet4d,
        tiny_bevdet4d_from_centerpoint,
        tiny_bevdet4d_from_mvp,
        tiny_bevdepth,
        tiny_bevdepth_from_centerpoint,
        tiny_bevdepth_from_mvp,
        tiny_bevdet_from_mvp,
        tiny_mvp,
        tiny_lidarformer,
        tiny_mvpformer,
        tiny_bevformer,
        tiny_bevformer_from_lidarformer,
        tiny_bevformer_from_mvpformer,
        *PUBLISHED,
    )
}


def experiment_from(
    recipe: str,
    data: Path,
    teacher: Path | None,
    seed: int | None,
    overrides: Sequence[str],
    start: Path | None = None,
) -> Experiment:
    """The experiment that a command line asks for: a recipe by name or a file, on this data, with changes.

    Args:
        recipe: a name of `RECIPES`, or the path of an experiment.yaml.
        data: root of the dataset.
        teacher: run folder of a trained teacher; its own experiment says what it is.
        seed: of initialisation, order and augmentation; the recipe's own if None.
        overrides: `dotted.key=value` texts.
        start: run folder of a student of the same architecture, whose weights this one starts from.

    Raises:
        ConfigError: no such recipe (the nearest names are given), or an override that does not fit.
    """
    if recipe in RECIPES:
        experiment = RECIPES[recipe]()
    elif recipe.endswith((".yaml", ".yml")):
        experiment = read_config(Path(recipe), Experiment)
    else:
        near = difflib.get_close_matches(recipe, RECIPES, n=2) or RECIPES
        raise ConfigError(f"no recipe {recipe!r}; the nearest: {', '.join(near)} (see `distillbev recipes`)")
    experiment = replace(experiment, data_root=str(data))
    if seed is not None:
        experiment = replace(experiment, seed=seed)
    if teacher is not None:
        experiment = with_teacher(experiment, teacher)
    if start is not None:
        experiment = replace(experiment, start_weights=str(finished_weights(start)))
    return with_overrides(experiment, overrides)


def with_teacher(experiment: Experiment, run: Path) -> Experiment:
    """The experiment, its teacher being the one trained in this run folder, on the points that it was trained on.

    Raises:
        ConfigError: the run trained no teacher, or the experiment takes none.
        RunError: the folder is no run, or its training has not finished.
    """
    trained = read_run(run)
    if trained.student is not None or trained.teacher is None:
        raise ConfigError(f"{run} trained {trained.name!r}, no LiDAR teacher; give the run of a teacher")
    if not experiment.needs_teacher:
        raise ConfigError(
            f"{experiment.name!r} learns from no teacher; drop --teacher or choose another recipe"
        )
    return replace(
        experiment,
        teacher=trained.teacher,
        teacher_weights=str(finished_weights(run)),
        data=replace(
            experiment.data,
            load_points=True,
            num_sweeps=trained.data.num_sweeps,
            virtual_points=trained.data.virtual_points,
        ),
    )
