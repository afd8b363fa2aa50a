from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_cases import (
    Found,
    Scene,
    Truth,
    box,
    detections_of,
    flat_poses,
    random_scenes,
    results_json,
    samples_of,
    tilted_poses,
    with_found,
)

from distillbev.boxes import Boxes3D
from distillbev.classes import CATEGORY_TO_CLASS, CLASSES
from distillbev.errors import DataError
from distillbev.evaluation.eval_boxes import (
    ATTRIBUTES,
    NO_ATTRIBUTE,
    choose_attributes,
    detected_boxes,
    ground_truth_boxes,
)
from distillbev.evaluation.metrics import evaluate
from distillbev.evaluation.results import LIDAR_ONLY, read_results, write_detections, write_results
from distillbev.geometry import quaternion_to_rotation, rotation_about_z


@pytest.fixture
def scenes() -> list[Scene]:
    return random_scenes(np.random.default_rng(1), 6, 20, 10)


def test_what_is_written_is_read_back_and_scores_the_same(scenes: list[Scene], tmp_path: Path) -> None:
    samples = samples_of(scenes)
    ground_truth = ground_truth_boxes(samples)
    boxes = detected_boxes(detections_of(scenes), samples)
    path = tmp_path / "results.json"
    write_results(path, boxes, LIDAR_ONLY)
    again, meta = read_results(path, ground_truth)
    assert meta == LIDAR_ONLY
    for name in (
        "sample_index",
        "centre_m",
        "size_wlh_m",
        "quat_wxyz",
        "velocity_m_s",
        "labels",
        "scores",
        "attributes",
    ):
        np.testing.assert_array_equal(getattr(again, name), getattr(boxes, name), err_msg=name)
    assert evaluate(ground_truth, again).nds == evaluate(ground_truth, boxes).nds


def test_the_file_is_what_the_task_asks_for(tmp_path: Path) -> None:
    scene = Scene(
        "a", *flat_poses(100.0, 50.0, np.pi / 2), [], [Found(box(110.0, 50.0, 1.0, vx=2.0), "car", 0.5)]
    )
    path = tmp_path / "results.json"
    write_detections(path, detections_of([scene]), samples_of([scene]))
    content = json.loads(path.read_text())
    assert content["meta"] == {
        "use_camera": True,
        "use_lidar": False,
        "use_radar": False,
        "use_map": False,
        "use_external": False,
    }
    (row,) = content["results"]["a"]
    assert row["translation"] == pytest.approx([110.0, 50.0, 1.0])
    assert row["size"] == pytest.approx([2.0, 4.0, 1.5])  # w, l, h
    assert row["velocity"] == pytest.approx([2.0, 0.0], abs=1e-12)
    assert row["rotation"] == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=1e-12)
    assert (row["detection_name"], row["attribute_name"]) == ("car", "vehicle.moving")


def test_the_quaternion_carries_the_full_rotation_of_a_tilted_car() -> None:
    lidar2ego, ego2global = tilted_poses(np.random.default_rng(0))
    scene = Scene("a", lidar2ego, ego2global, [], [])
    yaw = 0.7
    found = {
        "a": Boxes3D(
            torch.tensor([[1.0, 2, 0, 4, 2, 1.5, yaw, 0, 0]]), torch.tensor([0]), torch.tensor([0.5])
        )
    }
    boxes = detected_boxes(found, samples_of([scene]))
    expected = (ego2global @ lidar2ego)[:3, :3] @ rotation_about_z(yaw)
    np.testing.assert_allclose(quaternion_to_rotation(boxes.quat_wxyz[0]), expected, atol=1e-6)


def test_a_nan_velocity_survives_the_file(tmp_path: Path) -> None:
    nan = float("nan")
    scene = Scene("a", *flat_poses(), [], [Found(box(5.0, vx=nan, vy=nan), "car", 0.5)])
    path = tmp_path / "results.json"
    write_detections(path, detections_of([scene]), samples_of([scene]))
    boxes, _ = read_results(path, ground_truth_boxes(samples_of([scene])))
    assert np.isnan(boxes.velocity_m_s).all()


def test_attributes_follow_class_and_speed() -> None:
    labels = np.array(
        [CLASSES.index(name) for name in ("car", "car", "bus", "pedestrian", "bicycle", "barrier", "car")]
    )
    velocity = np.array([[3.0, 0], [0.1, 0.1], [0, 0], [0, 0.5], [0, 0], [3, 3], [np.nan, np.nan]])
    names = [ATTRIBUTES[i] if i != NO_ATTRIBUTE else "" for i in choose_attributes(labels, velocity)]
    assert names == [
        "vehicle.moving",
        "vehicle.parked",
        "vehicle.stopped",
        "pedestrian.moving",
        "cycle.without_rider",
        "",
        "vehicle.parked",
    ]


@pytest.mark.parametrize("tilted", [False, True])
def test_ground_truth_as_detections_scores_full_marks(tilted: bool) -> None:
    rng = np.random.default_rng(2)
    scenes = []
    for index in range(3):
        truths = [
            Truth(row, category, attribute)
            for category, name in CATEGORY_TO_CLASS.items()
            for moving in (False, True)
            for row, attribute in [attributed(rng, name, moving)]
        ]
        poses = tilted_poses(rng) if tilted else flat_poses(yaw=rng.uniform(-3, 3))
        for truth in truths:
            truth.box[:3] += poses[1][:3, 3]
        found = [Found(t.box, CATEGORY_TO_CLASS[t.category], float(rng.random())) for t in truths]
        scenes.append(Scene(f"s{index}", *poses, truths, found))
    samples = samples_of(scenes)
    metrics = evaluate(ground_truth_boxes(samples), detected_boxes(detections_of(scenes), samples))
    assert metrics.mean_ap == pytest.approx(1.0, abs=1e-12)
    # Detections stand upright on the car, annotations on the ground: a small second-order turn.
    assert metrics.nds == pytest.approx(1.0, abs=2e-4 if tilted else 1e-9)


def attributed(rng: np.random.Generator, name: str, moving: bool) -> tuple[np.ndarray, str]:
    """A box somewhere near, moving or not, and the attribute that the rule gives it."""
    row = box(*rng.uniform(-20, 20, 2), 0.0, 4.0, 2.0, 1.5, rng.uniform(-3, 3), 1.5 * moving, 0.0)
    chosen = choose_attributes(np.array([CLASSES.index(name)]), row[None, 7:9])[0]
    return row, ATTRIBUTES[chosen] if chosen != NO_ATTRIBUTE else ""


def write_and_read(scenes: list[Scene], content: str, folder: Path) -> None:
    path = folder / "results.json"
    path.write_text(content)
    read_results(path, ground_truth_boxes(samples_of(scenes)))


def test_a_file_of_another_split_is_refused_naming_a_missing_sample(
    scenes: list[Scene], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"1 of 6 samples are not among the detections.*sample-2"):
        write_and_read(scenes, results_json(scenes[:2] + scenes[3:]), tmp_path)
    with pytest.raises(DataError, match=r"1 detected samples are not evaluated.*sample-5"):
        write_and_read(scenes[:5], results_json(scenes), tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("detection_name", "lorry", "'lorry'"),
        ("attribute_name", "vehicle.flying", "vehicle.flying"),
        ("sample_token", "other", "'other'"),
        ("size", [1.0, 0.0, 1.0], "size is not positive"),
        ("rotation", [0.0, 0.0, 0.0, 0.0], "not a quaternion"),
        ("translation", [float("nan"), 0.0, 0.0], "centre is not finite"),
        ("detection_score", float("nan"), "score is not a number"),
        ("velocity", [0.0], "velocity"),
    ],
)
def test_a_damaged_box_is_refused_and_named(field: str, value: object, told: str, tmp_path: Path) -> None:
    scenes = [Scene("a", *flat_poses(), [], [Found(box(5.0), "car", 0.5)])]
    content = json.loads(results_json(scenes))
    content["results"]["a"][0][field] = value
    with pytest.raises(DataError, match=told):
        write_and_read(scenes, json.dumps(content), tmp_path)


def test_no_json_no_results_and_no_file_are_refused(scenes: list[Scene], tmp_path: Path) -> None:
    for content in ("{", "[]", '{"results": {}}'):
        with pytest.raises(DataError, match="no nuScenes results file"):
            write_and_read(scenes, content, tmp_path)
    with pytest.raises(DataError, match="no such results file"):
        read_results(tmp_path / "absent.json", ground_truth_boxes(samples_of(scenes)))


def test_more_than_500_boxes_in_a_sample_are_refused(tmp_path: Path) -> None:
    scene = Scene("a", *flat_poses(), [], [Found(box(5.0), "car", 0.5)] * 501)
    with pytest.raises(DataError, match="501 detections"):
        write_detections(tmp_path / "results.json", detections_of([scene]), samples_of([scene]))
    with pytest.raises(DataError, match="501 detections"):
        write_and_read([scene], results_json([scene]), tmp_path)
    write_detections(
        tmp_path / "results.json", detections_of([with_found(scene, scene.found[1:])]), samples_of([scene])
    )


def test_an_unlabelled_sample_is_refused(scenes: list[Scene]) -> None:
    samples = samples_of(scenes)
    object.__setattr__(samples[1], "annotations", None)
    with pytest.raises(DataError, match=r"sample-1 .* has no annotations"):
        ground_truth_boxes(samples)


def test_detections_without_scores_are_refused(scenes: list[Scene]) -> None:
    detections = detections_of(scenes)
    token = next(token for token, boxes in detections.items() if len(boxes))
    detections[token].scores = None
    with pytest.raises(DataError, match="have no scores"):
        detected_boxes(detections, samples_of(scenes))
