"""Each test makes the mistake that users make, on detections that are otherwise good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from eval_cases import ATTRIBUTES_OF_CLASS, Found, Scene, Truth, box, detections_of, samples_of, with_found

from distillbev.classes import CATEGORY_TO_CLASS
from distillbev.evaluation.diagnose import Finding, diagnose
from distillbev.evaluation.eval_boxes import EvalBoxes, detected_boxes, ground_truth_boxes
from distillbev.evaluation.metrics import evaluate
from distillbev.geometry import pose_matrix, rotation_about_z

SIZES_LWH = {
    "vehicle.car": (4.6, 1.9, 1.7),
    "vehicle.truck": (7.0, 2.5, 2.8),
    "human.pedestrian.adult": (0.7, 0.7, 1.8),
    "vehicle.bicycle": (1.7, 0.6, 1.3),
    "movable_object.barrier": (0.5, 2.5, 1.0),
}


@pytest.fixture
def scenes() -> list[Scene]:
    """Two drives through a bend at two speeds; detections some centimetres and degrees off, some false."""
    rng = np.random.default_rng(0)
    scenes = []
    for drive, step_m in enumerate((2.0, 7.0)):
        place, heading = rng.uniform(-500, 500, 2), rng.uniform(-3, 3)
        for index in range(12):
            ego2global = pose_matrix(np.array([*place, 0.0]), rotation_about_z(heading))
            lidar2ego = pose_matrix(np.array([0.94, 0.0, 1.84]), rotation_about_z(-np.pi / 2))
            truths, found = [], []
            for category, size in SIZES_LWH.items():
                for _ in range(3):
                    spot = place + rng.uniform(-22, 22, 2)
                    row = box(
                        *spot, size[2] / 2, *(rng.normal(1, 0.08, 3) * size), rng.uniform(-np.pi, np.pi), 2, 1
                    )
                    name = CATEGORY_TO_CLASS[category]
                    truths.append(Truth(row, category, (ATTRIBUTES_OF_CLASS[name] or [""])[0]))
                    near = row + rng.normal(0, [0.2, 0.2, 0.05, 0.05, 0.05, 0.05, 0.1, 0.2, 0.2])
                    near[3:6] = np.maximum(near[3:6], 0.2)
                    found.append(Found(near, name, float(rng.uniform(0.4, 1))))
                    far = row + rng.normal(0, [15, 15, 0.1, 0, 0, 0, 1, 0, 0])
                    found.append(Found(far, name, float(rng.uniform(0, 0.5))))
            scenes.append(Scene(f"{drive}-{index}", lidar2ego, ego2global, truths, found, f"scene-{drive}"))
            place = place + step_m * np.array([np.cos(heading), np.sin(heading)])
            heading += 0.1
    return scenes


def with_mistake(scenes: list[Scene], mistake: Callable[[torch.Tensor], None] | None) -> EvalBoxes:
    """The detections after `mistake` changed their rows (in place) in the LiDAR frame."""
    detections = detections_of(scenes)
    for boxes in detections.values():
        if mistake is not None:
            mistake(boxes.boxes)
    return detected_boxes(detections, samples_of(scenes))


def findings(scenes: list[Scene], mistake: Callable[[torch.Tensor], None] | None) -> tuple[Finding, ...]:
    return diagnose(ground_truth_boxes(samples_of(scenes)), with_mistake(scenes, mistake))


def the_finding(scenes: list[Scene], mistake: Callable[[torch.Tensor], None]) -> Finding:
    (finding,) = findings(scenes, mistake)
    return finding


def test_good_detections_have_nothing_wrong(scenes: list[Scene]) -> None:
    assert findings(scenes, None) == ()


def test_noise_and_nothing_have_no_findings(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(1)
    noise = [
        with_found(
            s, [Found(f.box + rng.normal(0, 25, 9) * ([1] * 2 + [0] * 7), f.name, f.score) for f in s.found]
        )
        for s in scenes
    ]
    assert findings(noise, None) == ()
    assert findings([with_found(s, []) for s in scenes], None) == ()


def test_quarter_turned_headings_are_recognised(scenes: list[Scene]) -> None:
    def mistake(rows: torch.Tensor) -> None:
        rows[:, 6] -= np.pi / 2

    ground_truth = ground_truth_boxes(samples_of(scenes))
    errors = evaluate(ground_truth, with_mistake(scenes, mistake)).tp_errors
    assert errors[0, 2] == pytest.approx(np.pi / 2, abs=0.1)  # the fingerprint that users report
    finding = the_finding(scenes, mistake)
    assert finding.fault == "heading" and "yaw + pi/2" in finding.message and "1.5" in finding.message


def test_headings_from_rear_to_front_are_recognised(scenes: list[Scene]) -> None:
    def mistake(rows: torch.Tensor) -> None:
        rows[:, 6] += np.pi

    errors = evaluate(ground_truth_boxes(samples_of(scenes)), with_mistake(scenes, mistake)).tp_errors
    assert errors[0, 2] == pytest.approx(np.pi, abs=0.2)  # the fingerprint that users report
    finding = the_finding(scenes, mistake)
    assert finding.fault == "heading" and "front and rear" in finding.message


def test_the_old_mmdetection3d_box_convention_is_recognised_in_all_its_parts(scenes: list[Scene]) -> None:
    def mistake(rows: torch.Tensor) -> None:
        rows[:, 2] -= rows[:, 5] / 2
        rows[:, [3, 4]] = rows[:, [4, 3]]
        rows[:, 6] = -rows[:, 6] - np.pi / 2

    found = {finding.fault: finding.message for finding in findings(scenes, mistake)}
    assert set(found) == {"height", "size_order", "heading"}
    assert "mmdetection3d before 1.0" in found["heading"]


def test_headings_right_but_for_front_and_rear_are_told(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(2)

    def mistake(rows: torch.Tensor) -> None:
        rows[:, 6] += np.pi * torch.from_numpy(rng.integers(0, 2, len(rows)))

    assert the_finding(scenes, mistake).fault == "heading_sense"


def test_swapped_length_and_width_are_recognised(scenes: list[Scene]) -> None:
    def mistake(rows: torch.Tensor) -> None:
        rows[:, [3, 4]] = rows[:, [4, 3]]

    errors = evaluate(ground_truth_boxes(samples_of(scenes)), with_mistake(scenes, mistake)).tp_errors
    assert errors[0, 1] == pytest.approx(0.72, abs=0.04)  # the fingerprint that users report
    finding = the_finding(scenes, mistake)
    assert finding.fault == "size_order" and "width is what was given as length" in finding.message


def test_z_of_the_bottom_and_of_the_top_are_recognised(scenes: list[Scene]) -> None:
    def bottom(rows: torch.Tensor) -> None:
        rows[:, 2] -= rows[:, 5] / 2

    def top(rows: torch.Tensor) -> None:
        rows[:, 2] += rows[:, 5] / 2

    assert "add h/2" in the_finding(scenes, bottom).message
    assert "subtract h/2" in the_finding(scenes, top).message


def test_another_origin_of_height_is_not_taken_for_half_a_height(scenes: list[Scene]) -> None:
    def mistake(rows: torch.Tensor) -> None:
        rows[:, 2] += 1.84

    finding = the_finding(scenes, mistake)
    assert finding.fault == "height" and "+1.8" in finding.message and "h/2" not in finding.message


def test_the_ego_origin_taken_for_the_lidar_is_recognised(scenes: list[Scene]) -> None:
    def mistake(rows: torch.Tensor) -> None:
        rows[:, 1] += 0.94  # the LiDAR sits 0.94 m ahead of the ego origin, y is forward

    finding = the_finding(scenes, mistake)
    assert finding.fault == "origin" and "LiDAR and ego origin" in finding.message


def test_any_other_constant_offset_is_told(scenes: list[Scene]) -> None:
    def mistake(rows: torch.Tensor) -> None:
        rows[:, :2] += 0.4

    finding = the_finding(scenes, mistake)
    assert finding.fault == "origin" and "(+0.4" in finding.message and "ego origin" not in finding.message


def test_an_ego_pose_of_another_time_is_recognised(scenes: list[Scene]) -> None:
    late = []
    for index, scene in enumerate(scenes):
        previous = scenes[max(index - 1, 0)]
        same = previous.scene == scene.scene
        lag = 0.3 * (scene.ego2global[:2, 3] - previous.ego2global[:2, 3]) * same
        shift = np.array([*lag, *[0.0] * 7])
        late.append(with_found(scene, [Found(f.box - shift, f.name, f.score) for f in scene.found]))
    finding = the_finding(late, lambda rows: None)
    assert finding.fault == "ego_motion" and "-0.3" in finding.message


@pytest.mark.parametrize(("seconds", "told"), [(-0.3, "behind"), (0.3, "ahead of")])
def test_a_sweep_of_another_time_is_recognised(scenes: list[Scene], seconds: float, told: str) -> None:
    def mistake(rows: torch.Tensor) -> None:
        rows[:, :2] += seconds * rows[:, 7:9]

    finding = the_finding(going_everywhere(scenes), mistake)
    assert finding.fault == "time" and told in finding.message and "0.3" in finding.message


def going_everywhere(scenes: list[Scene]) -> list[Scene]:
    """The same with objects that move along their headings, at up to 8 m/s, and detections that know it."""
    moved = []
    rng = np.random.default_rng(3)
    for scene in scenes:
        truths, found = [], []
        for truth, (near, far) in zip(
            scene.truths, zip(scene.found[::2], scene.found[1::2], strict=True), strict=True
        ):
            yaw = truth.box[6]
            velocity = rng.uniform(0, 8) * np.array([np.cos(yaw), np.sin(yaw)])
            truths.append(replace(truth, box=np.concatenate([truth.box[:7], velocity])))
            known = velocity + rng.normal(0, 0.2, 2)
            found += [replace(f, box=np.concatenate([f.box[:7], known])) for f in (near, far)]
        moved.append(replace(scene, truths=truths, found=found))
    return moved


def negated(rows: torch.Tensor) -> None:
    rows[:, 7:9] *= -1


def per_key_frame(rows: torch.Tensor) -> None:
    rows[:, 7:9] *= 0.5


def exchanged(rows: torch.Tensor) -> None:
    rows[:, [7, 8]] = rows[:, [8, 7]]


@pytest.mark.parametrize(
    ("mistake", "told"), [(negated, "negated"), (per_key_frame, "per key frame"), (exchanged, "exchanged")]
)
def test_velocities_of_another_convention_are_recognised(
    scenes: list[Scene], mistake: Callable[[torch.Tensor], None], told: str
) -> None:
    finding = the_finding(going_everywhere(scenes), mistake)
    assert finding.fault == "velocity" and told in finding.message


def test_velocities_left_in_the_lidar_frame_and_relative_ones_are_recognised(scenes: list[Scene]) -> None:
    scenes = going_everywhere(scenes)
    assert findings(scenes, None) == ()
    ground_truth, boxes = ground_truth_boxes(samples_of(scenes)), with_mistake(scenes, None)
    turn = ground_truth.lidar2global[boxes.sample_index, :2, :2]
    in_lidar = np.einsum("nji,nj->ni", turn, boxes.velocity_m_s)
    (finding,) = diagnose(ground_truth, replace(boxes, velocity_m_s=in_lidar))
    assert finding.fault == "velocity" and "left in the LiDAR frame" in finding.message

    way = np.diff(ground_truth.ego_xy_m, axis=0, append=ground_truth.ego_xy_m[-1:] + 1)
    ego = way[boxes.sample_index] / 0.5
    (finding,) = diagnose(ground_truth, replace(boxes, velocity_m_s=boxes.velocity_m_s - ego))
    assert finding.fault == "velocity" and "relative to the ego vehicle" in finding.message


def test_mirrored_x_is_recognised_and_headings_are_judged_behind_it(scenes: list[Scene]) -> None:
    def mirrored(rows: torch.Tensor) -> None:
        rows[:, 0] *= -1
        rows[:, 6] = np.pi - rows[:, 6]

    def centres_only(rows: torch.Tensor) -> None:
        rows[:, 0] *= -1

    finding = the_finding(scenes, mirrored)
    assert finding.fault == "placement" and "mirrored left to right" in finding.message
    assert [f.fault for f in findings(scenes, centres_only)] == ["placement", "heading"]


def test_boxes_of_the_ego_frame_given_as_lidar_are_recognised(scenes: list[Scene]) -> None:
    def mistake(rows: torch.Tensor) -> None:
        forward, left = rows[:, 1].clone(), -rows[:, 0].clone()
        rows[:, 0], rows[:, 1] = forward, left
        rows[:, 6] -= np.pi / 2

    finding = the_finding(scenes, mistake)
    assert finding.fault == "placement" and "turned by -90 degrees" in finding.message


def test_boxes_never_carried_to_the_global_frame_are_recognised(scenes: list[Scene]) -> None:
    samples = samples_of(scenes)
    ground_truth = ground_truth_boxes(samples)
    for sample in samples:
        object.__setattr__(sample, "lidar2ego", np.eye(4))
        object.__setattr__(sample, "ego2global", np.eye(4))
    left_behind = detected_boxes(detections_of(scenes), samples)
    (finding,) = diagnose(ground_truth, left_behind)
    assert finding.fault == "placement" and "left in the LiDAR frame" in finding.message
