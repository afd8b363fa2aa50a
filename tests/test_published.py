"""The published recipes hold the launch scripts' values, as the tables of docs/method.md tell them."""

import math
from pathlib import Path

import pytest
from msgspec.structs import replace

from distillbev.config import with_overrides
from distillbev.data.appearance import ColourAugConfig
from distillbev.data.augment import BevAugConfig
from distillbev.distill.settings import released_bevdepth4d, released_bevformer
from distillbev.models.bev_encoder import LssNeckConfig
from distillbev.models.bevdet import BevDetConfig
from distillbev.models.bevformer import BevFormerConfig
from distillbev.models.centerpoint import CenterPointConfig
from distillbev.models.image_encoder import ResNetConfig
from distillbev.models.lidar_query_teacher import LidarQueryTeacherConfig
from distillbev.models.nms import RotatedNms
from distillbev.models.second import SecondFpnConfig
from distillbev.models.voxels import SparseVoxelsConfig
from distillbev.published import BALANCED_FRAMES, KEY_FRAMES, PUBLISHED
from distillbev.train.experiment import Experiment, OptimConfig
from distillbev.train.schedule import learning_rate_factor, momentum_at

RECIPES = {recipe.__name__: recipe() for recipe in PUBLISHED}
STUDENTS = ("bevdet_r50", "bevdet4d_r50", "bevdepth_r50", "bevformer_r50")
TEACHERS = ("centerpoint_pillar02", "mvp_pillar02", "lidarformer", "mvpformer")
PAIRS = [
    *((student, teacher) for student in STUDENTS[:3] for teacher in TEACHERS[:2]),
    *((STUDENTS[3], teacher) for teacher in TEACHERS[2:]),
]


def tables() -> dict[str, dict[str, str]]:
    """Recipe -> setting -> what docs/method.md says of it."""
    text = (Path(__file__).parents[1] / "docs" / "method.md").read_text()
    part = text.split("## Published recipes", 1)[1].split("\n## ", 1)[0]
    told: dict[str, dict[str, str]] = {}
    for block in part.split("\n\n"):
        if not block.strip().startswith("|"):
            continue
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().splitlines()]
        for column, name in enumerate(rows[0][1:], start=1):
            told[name] = {row[0]: row[column] for row in rows[2:]}
    return told


def yes(value: bool) -> str:
    return "yes" if value else "no"


def joined(values: tuple[int, ...]) -> str:
    return "/".join(str(value) for value in values)


def rate(value: float) -> str:
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def augmentation(config: BevAugConfig | None) -> str:
    if config is None:
        return "none"
    assert config.rotation_rad[0] == -config.rotation_rad[1]
    assert config.flip_x_probability == config.flip_y_probability
    return "{}, {} to {}, {}".format(config.rotation_rad[1], *config.scale, config.flip_x_probability)


def epochs(optim: OptimConfig) -> str:
    frames = BALANCED_FRAMES if optim.class_balanced else KEY_FRAMES
    return f"{optim.steps * optim.labelled_per_step / frames:.0f} of {optim.labelled_per_step}"


def colours(config: ColourAugConfig | None) -> str:
    if config is None:
        return "none"
    hue = f"{config.hue_deg:g} deg"
    shares = f"{config.contrast[0]} to {config.contrast[1]}, {config.saturation[0]} to {config.saturation[1]}"
    assert config.exchange_channels
    return f"{config.brightness:g}, {shares}, {hue}, {config.probability}"


def facts_of_student(experiment: Experiment) -> dict[str, str]:
    student, data, optim = experiment.student, experiment.data, experiment.optim
    assert student is not None
    schedule, aug, grid, mask = optim.schedule, data.image_aug, student.grid, data.grid_mask
    fit = f"{data.image_size_px[0] / 1600:.2f}"
    if schedule.shape == "step":
        decay = "x 0.1 after " + " and ".join(f"{share * 24:.0f}" for share in schedule.milestones)
    else:
        decay = f"cosine to {schedule.final_factor}"
    facts = {
        "images, pixels": "{} x {}".format(*data.image_size_px),
        "image scale in training": fit
        + (f" + U({aug.resize_range[0]}, {aug.resize_range[1]})" if aug else ""),
        "image scale in tests": fit + (f" + {data.image_resize_offset}" if data.image_resize_offset else ""),
        "image rotation, flip": f"{aug.rotation_deg[1]} deg, {aug.flip_probability}" if aug else "none",
        "brightness, contrast, saturation, hue, each with": colours(data.colour_aug),
        "grid mask: how often, share of bars": f"{mask.probability}, {mask.bar_share}" if mask else "none",
        "BEV augmentation: rotation, scale, flips": augmentation(data.bev_aug),
        "BEV grid": f"{grid.shape[0]} x {grid.shape[1]} of {grid.cell_m} m",
        "range, m": "{} to {}".format(*grid.x_range_m),
        "earlier frames": str(data.past.num_frames if data.past else 0),
        "learning rate, image backbone": f"{rate(optim.learning_rate)}, x {optim.backbone_lr_factor:g}",
        "weight decay": str(optim.weight_decay),
        "gradient norm clipped at": f"{optim.clip_norm:g}",
        "epochs of samples per step": epochs(optim),
        "schedule": decay,
        "warm-up": f"{schedule.warmup_share * optim.steps / 100:.0f}00 steps from {schedule.start_factor:.3g}",
        "averaged weights": "none" if optim.ema_decay is None else str(optim.ema_decay),
        "class-balanced sampling": yes(optim.class_balanced),
    }
    if isinstance(student, BevFormerConfig):
        encoder, head = student.image_encoder, student.head
        assert isinstance(encoder.backbone, ResNetConfig)
        absent = (
            "depth bins",
            "lift channels, height",
            "depth loss weight",
            "depth labels from virtual points",
        )
        facts |= dict.fromkeys((*absent, "BEV stages", "BEV neck"), "none")
        levels = f"{len(encoder.strides)} levels of {student.channels} channels"
        return facts | {
            "image network": f"ResNet-{encoder.backbone.depth}, {levels}",
            "camera-aware depth net": "no",
            "head": f"{head.num_queries} queries, {student.encoder.layers} + {head.layers} layers",
            "velocity weight": "not applicable",
        }
    assert isinstance(student, BevDetConfig)
    encoder, lift = student.image_encoder, student.lift
    stages, neck = student.bev_encoder, student.bev_neck
    assert isinstance(encoder.backbone, ResNetConfig) and isinstance(neck, LssNeckConfig)
    assert len(set(stages.blocks)) == 1 and neck.extra_norm_act
    depth, loss = lift.depth, student.depth_loss
    return facts | {
        "image network": f"ResNet-{encoder.backbone.depth}, {encoder.out_channels} channels",
        "depth bins": f"{depth.start_m:g} to {depth.stop_m:g} m, step {depth.step_m:g}",
        "lift channels, height": "{}, {:g} to {:g} m".format(lift.channels, *lift.z_range_m),
        "camera-aware depth net": yes(lift.depth_net is not None),
        "depth loss weight": "none" if loss is None else f"{loss.weight:g}",
        "depth labels from virtual points": "none" if loss is None else yes(loss.virtual_points),
        "BEV stages": f"{joined(stages.channels)}, {stages.blocks[0]} blocks",
        "BEV neck": f"{neck.out_channels} channels, norm and ReLU",
        "head": ",".join(str(len(task)) for task in student.head.tasks)
        + f" classes, {student.head.shared_channels} shared",
        "velocity weight": str(student.head.code_weights[-1]),
    }


def facts_of_teacher(experiment: Experiment) -> dict[str, str]:
    teacher, data, optim = experiment.teacher, experiment.data, experiment.optim
    schedule = optim.schedule
    if isinstance(teacher, LidarQueryTeacherConfig):
        cells, points, shape, velocity = (
            teacher.voxel_grid,
            teacher.points,
            teacher.grid.shape,
            "not applicable",
        )
        assert isinstance(points, SparseVoxelsConfig) and points.z_cell_m == 0.2
        neck = f"{teacher.levels} levels, {teacher.encoder.layers} layers"
    else:
        assert isinstance(teacher, CenterPointConfig) and isinstance(teacher.neck, SecondFpnConfig)
        cells, points, shape = teacher.grid, teacher.pillars, teacher.head_grid.shape
        neck, velocity = joined(teacher.neck.channels), str(teacher.head.code_weights[-1])
    assert schedule.shape == "one_cycle"
    columns = points.point_features
    return {
        "cells": f"{cells.shape[0]} x {cells.shape[1]} of {cells.cell_m} m",
        "height, m": "{:g} to {:g}".format(*points.z_range_m),
        "points": f"{columns} columns, {data.num_sweeps + 1} sweeps",
        "stages": f"{joined(teacher.backbone.channels)} of {joined(teacher.backbone.layers)} layers",
        "neck": neck,
        "map": f"{shape[0]} x {shape[1]}",
        "velocity weight": velocity,
        "epochs of samples per step": epochs(optim),
        "learning rate": f"{rate(optim.learning_rate * schedule.start_factor)} x "
        f"{1 / schedule.start_factor:g} over {schedule.warmup_share * 100:g} %, then to "
        f"x {rate(schedule.final_factor / schedule.start_factor)}",
        "momentum, back at the end": f"{schedule.momentum} to {schedule.peak_momentum:.3f}",
        "rate of the point encoder": f"x {optim.backbone_lr_factor:g}",
        "weight decay, clip": f"{optim.weight_decay}, {optim.clip_norm:g}",
        "class balance, object pasting": f"{yes(optim.class_balanced)}, {yes(data.object_pasting is not None)}",
        "BEV augmentation: rotation, scale, flips": augmentation(data.bev_aug),
    }


@pytest.mark.parametrize("name", STUDENTS)
def test_published_students_are_what_the_table_says(name: str) -> None:
    assert facts_of_student(RECIPES[name]) == tables()[name]


@pytest.mark.parametrize("name", TEACHERS)
def test_published_teachers_are_what_the_table_says(name: str) -> None:
    assert facts_of_teacher(RECIPES[name]) == tables()[name]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_pair_joins_its_student_and_teacher_by_the_released_settings(
    student: str, teacher: str
) -> None:
    pair, alone, taught = (
        RECIPES[f"{student}_from_{teacher.removesuffix('_pillar02')}"],
        RECIPES[student],
        RECIPES[teacher],
    )
    assert pair.student == alone.student and pair.teacher == taught.teacher
    assert pair.optim == alone.optim and pair.inherit_head
    assert pair.distill == (released_bevformer() if student == "bevformer_r50" else released_bevdepth4d())
    points = {"num_sweeps": taught.data.num_sweeps, "virtual_points": taught.data.virtual_points}
    assert pair.data == replace(alone.data, load_points=True, **points)


def test_teachers_paste_as_many_objects_of_each_class_as_published() -> None:
    """The release's db_sampler: sample_groups, and filter_by_min_points of 5 for every class."""
    for name in ("centerpoint_pillar02", "centerpoint_voxel01", "mvp_pillar02"):
        pasting = RECIPES[name].data.object_pasting
        assert pasting is not None and pasting.min_points == 5 and pasting.stop_after_samples is None
        assert pasting.counts == {
            "car": 2,
            "truck": 3,
            "construction_vehicle": 7,
            "bus": 4,
            "trailer": 6,
            "barrier": 2,
            "motorcycle": 6,
            "bicycle": 6,
            "pedestrian": 2,
            "traffic_cone": 2,
        }


def test_the_teachers_cycle_ends_at_the_published_share_of_its_start() -> None:
    """mmcv's cyclic policy by target_ratio (10, 1e-4) and (0.85 / 0.95, 1), step by step."""
    optim = RECIPES["lidarformer"].optim
    start, steps, up = 5e-5, optim.steps, int(0.4 * optim.steps)

    def anneal(first: float, last: float, share: float) -> float:
        return last + 0.5 * (first - last) * (math.cos(math.pi * share) + 1)

    for step in (0, up // 3, up, up + 1, (up + steps) // 2, steps - 1):
        rising = step < up
        share = step / up if rising else (step - up) / (steps - up)
        rate = anneal(start, 10 * start, share) if rising else anneal(10 * start, 1e-4 * start, share)
        low = 0.9 * 0.85 / 0.95
        momentum = anneal(0.9, low, share) if rising else anneal(low, 0.9, share)
        ours = optim.learning_rate * learning_rate_factor(optim.schedule, step, steps)
        assert ours == pytest.approx(rate, rel=2e-4, abs=1e-10)
        assert momentum_at(optim.schedule, step, steps) == pytest.approx(momentum, abs=1e-5)


def test_the_released_presets_weigh_as_the_launch_scripts_do() -> None:
    """METHOD, published settings: w_fg 6e-3, w_bg 4e-2, w_sp 2.5e-3, w_fp 6e-2; BEVFormer 5e-3, 4e-3, 5e-4."""
    per_tap = {"foreground": 6e-3, "background": 4e-2, "attention": 2.5e-3}
    expected = {
        f"imitate/{tap}/{term}": weight
        for tap in ("stage1", "stage2", "head")
        for term, weight in per_tap.items()
    }
    assert released_bevdepth4d().weights == expected | {"imitate/head/false_positive": 6e-2}
    assert released_bevformer().weights == {
        "imitate/head/foreground": 5e-3,
        "imitate/head/background": 4e-3,
        "imitate/head/attention": 5e-4,
    }
    for preset, share in ((released_bevdepth4d(), 1.0), (released_bevformer(), None)):
        for tap in preset.taps:
            assert tap.attention is not None
            assert (tap.attention.temperature, tap.attention.student_share) == (0.5, share)
            assert tap.affinity is None and tap.relation is None and tap.normalise is None
        assert preset.regions.teacher_threshold == preset.regions.target_threshold == 0.1
        assert preset.reduction == "sum" and preset.response is None and preset.balance is None


def test_earlier_frames_lie_as_far_back_as_published() -> None:
    """Key frames are 0.5 s apart: 1.5 s back in tests, within 0.75 to 2.25 s in training."""
    for name in ("bevdet4d_r50", "bevdepth_r50"):
        past = RECIPES[name].data.past
        assert past is not None and past.training_steps is not None and past.step * 0.5 == 1.5
        assert 0.75 <= past.training_steps[0] * 0.5 < past.training_steps[1] * 0.5 <= 2.25


def test_published_cnn_students_suppress_by_scaled_boxes() -> None:
    student = RECIPES["bevdet_r50"].student
    assert isinstance(student, BevDetConfig)
    scales = [rule.class_scale if isinstance(rule, RotatedNms) else None for rule in student.head.nms]
    assert scales == [(1.0,), (0.7, 0.7), (0.4, 0.55), None, (1.0, 1.0), (4.5, 9.0)]


def test_depth_labels_come_from_measured_points_unless_asked_in_every_pair_with_virtual_ones() -> None:
    with_virtual = [recipe for recipe in RECIPES.values() if recipe.student and recipe.data.virtual_points]
    assert {recipe.name.rsplit("_", 1)[1] for recipe in with_virtual} == {"mvp", "mvpformer"}
    labelled = [
        recipe
        for recipe in with_virtual
        if isinstance(recipe.student, BevDetConfig) and recipe.student.depth_loss
    ]
    assert [recipe.name for recipe in labelled] == ["bevdepth_r50_from_mvp"]
    for recipe in labelled:
        assert isinstance(recipe.student, BevDetConfig) and recipe.student.depth_loss
        assert not recipe.student.depth_loss.virtual_points
        asked = with_overrides(recipe, ["student.depth_loss.virtual_points=true"]).student
        assert isinstance(asked, BevDetConfig) and asked.depth_loss and asked.depth_loss.virtual_points
