"""Every number and curve equals that of nuscenes-devkit 1.2.0, within 1e-9."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from eval_cases import (
    ATTRIBUTES_OF_CLASS,
    Found,
    Scene,
    Truth,
    assert_same,
    box,
    devkit_metrics,
    flat_poses,
    random_scenes,
    results_json,
    samples_of,
    with_found,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distillbev.classes import CATEGORY_TO_CLASS, CLASSES
from distillbev.errors import DataError
from distillbev.evaluation.eval_boxes import BICYCLE_RACK, ground_truth_boxes
from distillbev.evaluation.metrics import DetectionEvalConfig, DetectionMetrics, evaluate, format_table
from distillbev.evaluation.results import read_results

pytest.importorskip("nuscenes.eval.detection.evaluate", reason="the oracle nuscenes-devkit is not installed")

QUICK = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def both(scenes: list[Scene], folder: Path, config: DetectionEvalConfig | None = None) -> DetectionMetrics:
    """Evaluates with both, asserts that they agree, and returns our metrics."""
    config = config or DetectionEvalConfig()
    path = folder / "results.json"
    path.write_text(results_json(scenes))
    ground_truth = ground_truth_boxes(samples_of(scenes))
    ours = evaluate(ground_truth, read_results(path, ground_truth)[0], config)
    assert_same(ours, *devkit_metrics(scenes, path, config))
    return ours


@pytest.mark.parametrize("seed", range(4))
def test_random_worlds_on_tilted_cars_agree(seed: int, tmp_path: Path) -> None:
    ours = both(random_scenes(np.random.default_rng(seed), 25, 40, 15), tmp_path)
    assert 0.05 < ours.mean_ap < 0.9  # the case says something


def test_a_good_detector_agrees(tmp_path: Path) -> None:
    scenes = random_scenes(np.random.default_rng(9), 25, 40, 3, shake=0.1)
    assert both(scenes, tmp_path).nds > 0.3


def test_other_settings_agree(tmp_path: Path) -> None:
    scenes = random_scenes(np.random.default_rng(5), 20, 40, 10)
    config = DetectionEvalConfig(
        max_range_m=25.6,
        dist_ths_m=(1.0, 3.0),
        dist_th_tp_m=3.0,
        min_recall=0.05,
        min_precision=0.2,
        mean_ap_weight=3,
    )
    both(scenes, tmp_path, config)


# Quarters of a metre on level ground: distances, borders and ties come out exact in both implementations.
quarters = st.integers(-24, 24).map(lambda n: n / 4)
speeds = st.sampled_from([0.0, 0.25, 3.0, float("nan")])
few_classes = st.sampled_from(["car", "barrier", "traffic_cone", "bicycle", "pedestrian"])
category_of = {name: category for category, name in CATEGORY_TO_CLASS.items()}


@st.composite
def crowded_scene(draw: st.DrawFn, token: str) -> Scene:
    """Few places, few classes, few scores: duplicates, ties and contested boxes in plenty."""

    def where() -> np.ndarray:
        size = draw(st.sampled_from([(4.0, 2.0, 1.5), (2.0, 4.0, 1.5), (0.5, 0.5, 1.0)]))
        yaw = draw(st.sampled_from([0.0, np.pi / 2, np.pi, -np.pi, 3.0, -7.0]))
        return box(draw(quarters), draw(quarters), 0.0, *size, yaw, draw(speeds), draw(speeds))

    truths, found = [], []
    for _ in range(draw(st.integers(0, 6))):
        name = draw(st.sampled_from(["car", "barrier", "traffic_cone", "bicycle", "pedestrian", "rack"]))
        attribute = draw(st.sampled_from(["", *ATTRIBUTES_OF_CLASS.get(name, [])]))
        points = draw(st.integers(0, 2))
        category = BICYCLE_RACK if name == "rack" else category_of[name]
        truths.append(Truth(where(), category, attribute, points, draw(st.integers(0, 1))))
    for _ in range(draw(st.integers(0, 8))):
        name = draw(few_classes)
        attribute = draw(st.sampled_from(["", *ATTRIBUTES_OF_CLASS[name]]))
        score = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
        found.append(Found(where(), name, score, attribute))
    return Scene(token, *flat_poses(draw(st.integers(-3, 3)), 0.0), truths, found)


@QUICK
@given(data=st.data(), count=st.integers(1, 4), max_range_m=st.sampled_from([None, 3.0, 5.0]))
def test_crowded_ties_agree(
    data: st.DataObject, count: int, max_range_m: float | None, tmp_path: Path
) -> None:
    """Boxes lie on borders of ranges too: quarters and whole triangles at 3 and 5 m from the car."""
    scenes = [data.draw(crowded_scene(f"sample-{i}")) for i in range(count)]
    both(scenes, tmp_path, DetectionEvalConfig(max_range_m=max_range_m))


@pytest.mark.parametrize("x", [9.0, 11.0])
@pytest.mark.parametrize("yaw", [0.0, np.pi / 2, np.pi, -np.pi / 2])
def test_cycles_on_the_border_of_a_rack_agree(x: float, yaw: float, tmp_path: Path) -> None:
    """In or out is a matter of the last digit there, and is decided alike."""
    rack = Truth(box(10.0, 0.0, 0.0, length=2.0, width=2.0, height=2.0, yaw=yaw), BICYCLE_RACK)
    cycle = Truth(box(x, 0.0), "vehicle.bicycle", "cycle.without_rider")
    found = [Found(box(x, 0.0), "bicycle", 0.9), Found(box(x, 0.0), "motorcycle", 0.9)]
    both([Scene("a", *flat_poses(), [rack, cycle], found)], tmp_path)


def test_500_equal_boxes_agree_and_one_more_is_refused_by_both(tmp_path: Path) -> None:
    truths = [car_at(10.0), car_at(20.0)]
    found = [Found(box(10.0), "car", 0.5), Found(box(20.25), "car", 0.5)] * 250
    scene = Scene("a", *flat_poses(), truths, found)
    both([scene], tmp_path)
    crowded = [with_found(scene, [*found, found[0]])]
    path = tmp_path / "results.json"
    path.write_text(results_json(crowded))
    with pytest.raises(DataError, match="501 detections"):
        read_results(path, ground_truth_boxes(samples_of(crowded)))
    with pytest.raises(AssertionError, match="500"):
        devkit_metrics(crowded, path, DetectionEvalConfig())


def car_at(x: float, y: float = 0.0, **settings) -> Truth:
    return Truth(box(x, y), "vehicle.car", "vehicle.parked", **settings)


def test_boxes_on_the_border_of_the_range_do_not_count(tmp_path: Path) -> None:
    scene = Scene(
        "a",
        *flat_poses(),
        [car_at(50.0), car_at(49.75), car_at(30.0, 40.0), Truth(box(0, 30.0), "movable_object.barrier")],
        [Found(box(50.0), "car", 0.9), Found(box(49.75), "car", 0.8), Found(box(0, 30.0), "barrier", 0.7)],
    )
    ours = both([scene], tmp_path)
    assert ours.class_ap["car"] == pytest.approx(1.0)  # the detection on the border is dropped, no miss
    assert ours.class_ap["barrier"] == 0.0


def test_a_match_at_exactly_the_threshold_is_none(tmp_path: Path) -> None:
    scene = Scene("a", *flat_poses(), [car_at(10.0)], [Found(box(12.0), "car", 0.9)])
    ours = both([scene], tmp_path)
    assert ours.ap[CLASSES.index("car")] == pytest.approx([0.0, 0.0, 0.0, 1.0])


def test_ground_truth_without_points_is_dropped_but_radar_points_count(tmp_path: Path) -> None:
    truths = [car_at(10.0, lidar_points=0), car_at(20.0, lidar_points=0, radar_points=1)]
    ours = both([Scene("a", *flat_poses(), truths, [Found(box(20.0), "car", 0.9)])], tmp_path)
    assert ours.class_ap["car"] == pytest.approx(1.0)


def test_cycles_in_a_rack_are_dropped_on_both_sides_and_other_classes_are_not(tmp_path: Path) -> None:
    rack = Truth(box(10.0, 0.0, 0.0, length=6.0, width=2.0, height=2.0, yaw=np.pi / 2), BICYCLE_RACK)
    inside, outside = box(10.0, 2.5), box(12.5, 0.0)  # the rack stands across: long in y
    truths = [
        rack,
        Truth(inside, "vehicle.bicycle", "cycle.without_rider"),
        Truth(outside, "vehicle.bicycle", "cycle.without_rider"),
        Truth(inside, "human.pedestrian.adult", "pedestrian.standing"),
    ]
    found = [
        Found(inside, "bicycle", 0.9),
        Found(outside, "bicycle", 0.5),
        Found(inside, "motorcycle", 0.9),
        Found(inside, "pedestrian", 0.9),
    ]
    ours = both([Scene("a", *flat_poses(), truths, found)], tmp_path)
    assert ours.class_ap["bicycle"] == pytest.approx(1.0)
    assert ours.class_ap["pedestrian"] == pytest.approx(1.0)


def test_samples_without_boxes_agree(tmp_path: Path) -> None:
    seen = Scene("a", *flat_poses(), [car_at(10.0)], [Found(box(10.25), "car", 0.5)])
    unseen = Scene("b", *flat_poses(), [car_at(10.0)], [])
    empty_road = Scene("c", *flat_poses(), [], [Found(box(10.25), "car", 0.5)])
    nothing = Scene("d", *flat_poses(), [], [])
    both([nothing, seen, unseen, empty_road], tmp_path)
    assert both([with_found(s, []) for s in (seen, unseen)], tmp_path).nds == 0.0


def test_unknown_velocities_and_attributes_agree(tmp_path: Path) -> None:
    nan = float("nan")
    still, unknown = box(10.0), box(20.0, vx=nan, vy=nan)
    truths = [Truth(still, "vehicle.car"), Truth(unknown, "vehicle.car", "vehicle.moving")]
    found = [Found(box(10.0, vx=nan, vy=nan), "car", 0.9), Found(box(20.0), "car", 0.8, "vehicle.moving")]
    ours = both([Scene("a", *flat_poses(), truths, found)], tmp_path)
    assert ours.tp_errors[CLASSES.index("car"), 3] == 1.0  # no velocity pair is known: the worst is assumed


def test_barriers_may_be_turned_by_half_a_turn_and_cars_may_not(tmp_path: Path) -> None:
    truths = [Truth(box(10.0), "movable_object.barrier"), car_at(20.0)]
    found = [Found(box(10.0, yaw=np.pi), "barrier", 0.9), Found(box(20.0, yaw=np.pi), "car", 0.9)]
    ours = both([Scene("a", *flat_poses(), truths, found)], tmp_path)
    assert ours.tp_errors[CLASSES.index("barrier"), 2] == pytest.approx(0.0, abs=1e-9)
    assert ours.tp_errors[CLASSES.index("car"), 2] == pytest.approx(np.pi)


def test_the_table_shows_the_numbers_that_the_devkit_prints(tmp_path: Path) -> None:
    scenes = random_scenes(np.random.default_rng(3), 10, 40, 10)
    path = tmp_path / "results.json"
    ours = both(scenes, tmp_path)
    official = devkit_metrics(scenes, path, ours.config)[0].serialize()
    table = format_table(ours)
    assert f"mAP: {official['mean_ap']:.4f}" in table
    assert f"NDS: {official['nd_score']:.4f}" in table
    for name, error in zip(("mATE", "mASE", "mAOE", "mAVE", "mAAE"), ours.mean_errors, strict=True):
        assert f"{name}: {official['tp_errors'][error]:.4f}" in table
    for name, ap in official["mean_dist_aps"].items():
        line = next(line for line in table.splitlines() if line.startswith(f"{name} "))
        assert f" {ap:.3f} " in line
        assert f"{official['label_tp_errors'][name]['trans_err']:.3f}" in line
    assert official["label_tp_errors"]["car"] == pytest.approx(ours.to_dict()["label_tp_errors"]["car"])  # type: ignore
