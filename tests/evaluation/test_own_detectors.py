"""What the project's own detectors write about a simulated world scores in the devkit as it does here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from eval_cases import assert_same

from distillbev.recipes import experiment_from
from distillbev.scoring import METRICS_FILE, RESULTS_FILE, evaluate_run
from distillbev.train.loop import train
from distillbev.world import SplitConfig, WorldConfig, simulate

pytest.importorskip("nuscenes.eval.detection.evaluate", reason="the oracle nuscenes-devkit is not installed")

WORLD = WorldConfig(
    seed=4,
    splits=(SplitConfig(name="val", scenes=2),),
    key_frames_per_scene=2,
    image_size_px=(96, 54),
    lidar_sweeps=2,
    lidar_azimuth_steps=360,
)
SHORT = (
    "optim.steps=25",
    "optim.labelled_per_step=1",
    "optim.learning_rate=0.005",
    "optim.precision=fp32",
    "optim.ema_decay=0.5",
    "labelled_splits=[val]",
    "data.image_size_px=[64, 32]",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "sim"
    simulate(WORLD, out, processes=1, progress=False)
    return out


def devkit_metrics_of_file(world: Path, results: Path, ranges_m: dict[str, float]):
    """The official evaluation, from the official tables to the official metrics and curves."""
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.common.loaders import (
        add_center_dist,
        filter_eval_boxes,
        load_gt_of_sample_tokens,
        load_prediction,
    )
    from nuscenes.eval.detection.data_classes import DetectionBox
    from nuscenes.eval.detection.evaluate import DetectionEval
    from nuscenes.nuscenes import NuScenes

    nuscenes = NuScenes("v1.0-sim", str(world), verbose=False)
    evaluation = DetectionEval.__new__(DetectionEval)
    evaluation.cfg, evaluation.verbose = config_factory("detection_cvpr_2019"), False
    predicted, _ = load_prediction(str(results), evaluation.cfg.max_boxes_per_sample, DetectionBox)
    truth = load_gt_of_sample_tokens(nuscenes, predicted.sample_tokens, DetectionBox)
    evaluation.pred_boxes, evaluation.gt_boxes = (
        filter_eval_boxes(nuscenes, add_center_dist(nuscenes, boxes), ranges_m)
        for boxes in (predicted, truth)
    )
    return evaluation.evaluate()


@pytest.mark.parametrize(("recipe", "part"), [("tiny_centerpoint", "teacher"), ("tiny_bevdet", "student")])
def test_a_trained_detector_scores_the_same_in_the_devkit(
    world: Path, tmp_path: Path, recipe: str, part: str
) -> None:
    unsure = (f"{part}.head.score_threshold=0.02", f"{part}.head.max_detections_per_task=80")
    experiment = experiment_from(recipe, world, None, 3, (*SHORT, *unsure))
    train(experiment, tmp_path / "run", show_progress=False)
    scored = evaluate_run(tmp_path / "run", world, "val", tmp_path)
    assert scored is not None and (tmp_path / METRICS_FILE).exists()
    metrics = scored.metrics
    assert metrics.mean_ap > 0 and np.isfinite(metrics.ap).all()  # some boxes are found: it says something
    ranges_m = {name: min(r, 24.0) for name, r in metrics.config.class_range_m.items()}
    assert metrics.config.max_range_m == 24.0
    assert_same(metrics, *devkit_metrics_of_file(world, tmp_path / RESULTS_FILE, ranges_m))
