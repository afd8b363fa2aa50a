from __future__ import annotations

import subprocess
import sys

import msgspec
import numpy as np
import pytest
from eval_cases import Found, Scene, Truth, box, detections_of, flat_poses, random_scenes, samples_of

from distillbev.classes import CLASSES
from distillbev.errors import ConfigError, DataError
from distillbev.evaluation.eval_boxes import detected_boxes, ground_truth_boxes
from distillbev.evaluation.metrics import DetectionEvalConfig, evaluate, evaluate_samples, format_table


def test_half_of_the_boxes_found_gives_the_ap_worked_out_by_hand() -> None:
    truths = [Truth(box(10.0 * i), "vehicle.car", "vehicle.parked") for i in (1, 2)]
    scene = Scene("a", *flat_poses(), truths, [Found(box(10.0), "car", 0.9)])
    metrics = evaluate_samples(samples_of([scene]), detections_of([scene]))
    # Precision 1 at recalls 0.11 to 0.50, that is at 40 of the 90 counted ones.
    np.testing.assert_allclose(metrics.ap[CLASSES.index("car")], 40 / 90)
    assert metrics.mean_ap == pytest.approx(40 / 90 / 10)


def test_a_cap_on_the_range_leaves_out_what_lies_beyond() -> None:
    truths = [Truth(box(10.0), "vehicle.car"), Truth(box(30.0), "vehicle.car")]
    scene = Scene("a", *flat_poses(), truths, [Found(box(10.0), "car", 0.9)])
    config = DetectionEvalConfig(max_range_m=20.0)
    assert evaluate_samples(samples_of([scene]), detections_of([scene]), config).class_ap[
        "car"
    ] == pytest.approx(1)
    assert evaluate_samples(samples_of([scene]), detections_of([scene])).class_ap["car"] < 0.5


def test_the_defaults_are_the_official_ranges() -> None:
    ranges = dict(zip(CLASSES, DetectionEvalConfig().ranges_m().tolist(), strict=True))
    assert ranges["car"] == 50 and ranges["bicycle"] == 40 and ranges["barrier"] == 30
    assert DetectionEvalConfig(max_range_m=35.0).ranges_m().max() == 35


def test_the_order_of_the_samples_in_the_detections_does_not_matter() -> None:
    scenes = random_scenes(np.random.default_rng(0), 5, 20, 5)
    detections = detections_of(scenes)
    backwards = dict(reversed(detections.items()))
    samples = samples_of(scenes)
    assert evaluate_samples(samples, backwards).nds == evaluate_samples(samples, detections).nds


def test_ground_truth_of_other_samples_is_refused() -> None:
    scenes = random_scenes(np.random.default_rng(0), 3, 5, 5)
    samples = samples_of(scenes)
    boxes = detected_boxes(detections_of(scenes), samples)
    with pytest.raises(DataError, match="build both from the same samples"):
        evaluate(ground_truth_boxes(samples[:2]), boxes)
    with pytest.raises(DataError, match="listed more than once"):
        ground_truth_boxes([*samples, samples[0]])


@pytest.mark.parametrize(
    "wrong",
    [
        {"dist_th_tp_m": 3.0},
        {"class_range_m": {"car": 50.0}},
        {"min_precision": 1.0},
        {"max_range_m": 0.0},
    ],
)
def test_settings_that_contradict_themselves_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        msgspec.structs.replace(DetectionEvalConfig(), **wrong)


def test_the_table_has_seven_means_and_a_line_per_class() -> None:
    scene = Scene("a", *flat_poses(), [], [])
    lines = format_table(evaluate_samples(samples_of([scene]), detections_of([scene]))).splitlines()
    assert [line.split(":")[0] for line in lines[:7]] == [
        "mAP",
        "mATE",
        "mASE",
        "mAOE",
        "mAVE",
        "mAAE",
        "NDS",
    ]
    assert [line.split()[0] for line in lines[-10:]] == list(CLASSES)


def test_metrics_do_without_torch() -> None:
    script = "import sys, distillbev.evaluation.results; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
