"""Rigs of one's own from their recordings to detections: three and four cameras, no LiDAR at run time."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image
from tiny_student import TINY

from distillbev.data.recording_writer import write_dataset
from distillbev.data.recordings import Rig, Scene
from distillbev.data.samples import NuScenes
from distillbev.data.settings import DataConfig
from distillbev.geometry import pose_matrix
from distillbev.models.lift import DepthLossConfig
from distillbev.recipes import experiment_from
from distillbev.report.inspection import inspect_sample
from distillbev.scoring import evaluate_run, predict_sample
from distillbev.train.experiment import Experiment, OptimConfig
from distillbev.train.loop import train

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_rig.py"
spec = importlib.util.spec_from_file_location("own_rig", EXAMPLE)
assert spec is not None and spec.loader is not None
own_rig = importlib.util.module_from_spec(spec)
spec.loader.exec_module(own_rig)

LIDAR2EGO = pose_matrix(np.array([0.9, 0, 1.9]), np.eye(3))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example writes: three cameras, a LiDAR in the training scene only."""
    root = tmp_path_factory.mktemp("rig") / "three"
    subprocess.run([sys.executable, EXAMPLE, root], check=True)
    return root


@pytest.fixture(scope="module")
def four_cameras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four cameras of four sizes and no LiDAR anywhere."""
    cameras = tuple(
        own_rig.camera(f"cam{i}", width, height, 90 * i, 1.0, 0.6 * width)
        for i, (width, height) in enumerate([(160, 90), (128, 128), (96, 144), (200, 100)])
    )
    scenes = [
        Scene(name, split, Rig(cameras), own_rig.drive(Rig(cameras), with_lidar=False))
        for name, split in (("a", "train"), ("b", "val"))
    ]
    return write_dataset(tmp_path_factory.mktemp("rig") / "four", scenes)


def student(root: Path) -> Experiment:
    return Experiment(
        name="student",
        student=TINY,
        data_root=str(root),
        data=DataConfig(image_size_px=(64, 32)),
        optim=OptimConfig(steps=2, labelled_per_step=2, precision="fp32"),
    )


def test_the_example_takes_at_most_sixty_lines():
    assert len(EXAMPLE.read_text().splitlines()) <= 60


def test_the_example_has_a_lidar_in_training_only(example: Path):
    nuscenes = NuScenes(example)
    samples = {split: nuscenes.sample(nuscenes.sample_tokens(split)[0]) for split in ("train", "val")}
    assert [camera.size_wh_px for camera in samples["val"].cameras] == [(640, 360), (480, 400), (320, 240)]
    assert len(samples["train"].sweeps) == 1 and len(samples["val"].sweeps) == 0
    np.testing.assert_allclose(samples["train"].lidar2ego, samples["val"].lidar2ego)


@pytest.mark.parametrize("rig", ["example", "four_cameras"])
def test_a_student_is_trained_and_predicts_without_lidar(
    rig: str, request: pytest.FixtureRequest, tmp_path: Path
):
    root = request.getfixturevalue(rig)
    run = tmp_path / "run"
    train(student(root), run, show_progress=False)
    token = NuScenes(root).sample_tokens("val")[0]
    written = predict_sample(run, root, token, tmp_path / "out", threshold=0.0)
    assert [path.name for path in written] == [f"{token}.json", f"{token}_cameras.jpg", f"{token}_bev.png"]
    if rig == "example":  # the tables name LiDAR files that nobody copied to the car
        bare = shutil.copytree(root, tmp_path / "bare", ignore=shutil.ignore_patterns("LIDAR_TOP"))
        recorded = NuScenes(bare).sample_tokens("train")[0]
        assert predict_sample(run, bare, recorded, tmp_path / "out", threshold=0.0)
    metrics = evaluate_run(run, root, "val", tmp_path / "evaluation").metrics
    assert np.isfinite(metrics.mean_ap)


def test_points_are_loaded_only_for_those_who_look_at_them(four_cameras: Path):
    alone = student(four_cameras)
    assert not alone.training_data.load_points
    lifting = replace(alone, student=replace(TINY, depth_loss=DepthLossConfig()))
    assert lifting.training_data.load_points
    assert experiment_from("tiny_centerpoint", four_cameras, None, None, ()).training_data.load_points


@pytest.mark.parametrize(("rig", "columns"), [("example", 3), ("four_cameras", 2)])
def test_inspect_draws_every_camera_of_the_rig(
    rig: str, columns: int, request: pytest.FixtureRequest, tmp_path: Path
):
    nuscenes = NuScenes(request.getfixturevalue(rig))
    sample = nuscenes.sample(nuscenes.sample_tokens("val")[0])
    paths = {path.name.rsplit("_", 1)[1]: path for path in inspect_sample(sample, tmp_path)}
    assert paths.keys() == {"boxes.jpg", "ground.jpg", "bev.png"}
    assert Image.open(paths["boxes.jpg"]).width == columns * 566 + 6
