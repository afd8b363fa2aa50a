"""Every tiny recipe takes two steps in a simulated world; every published one has its published size."""

from pathlib import Path

import pytest
import torch

from distillbev.data.samples import NuScenes
from distillbev.data.virtual_points import VirtualPointsConfig, prepare_folder
from distillbev.distill.distiller import Distiller
from distillbev.models.detectors import build_teacher
from distillbev.recipes import RECIPES, experiment_from
from distillbev.train.inference import detect, load_trained
from distillbev.train.loop import build_detector, train
from distillbev.world import SplitConfig, WorldConfig, simulate

TEACHERS = ("tiny_centerpoint", "tiny_mvp", "tiny_lidarformer", "tiny_mvpformer")
STUDENTS = ("bevdet", "bevdet4d", "bevdepth", "bevformer")
SHORT = ("optim.steps=2", "optim.labelled_per_step=2", "log.gradient_norms_every=1", "cache=false")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipes") / "world"
    config = WorldConfig(
        seed=2,
        splits=(SplitConfig(name="train", scenes=1),),
        key_frames_per_scene=2,
        image_size_px=(256, 144),
        write_masks=True,
        lidar_sweeps=0,
    )
    simulate(config, root, processes=1, progress=False)
    prepare_folder(root, VirtualPointsConfig(), processes=1)
    return root


@pytest.fixture(scope="module")
def teachers(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = tmp_path_factory.mktemp("teachers")
    for name in TEACHERS:
        train(experiment_from(name, world, None, 0, SHORT), runs / name, show_progress=False)
    return {name.removeprefix("tiny_"): runs / name for name in TEACHERS}


@pytest.mark.parametrize("student", STUDENTS)
def test_every_student_learns_alone_and_from_each_of_its_teachers(
    student: str, world: Path, teachers: dict[str, Path], tmp_path: Path
) -> None:
    taught_by = ("lidarformer", "mvpformer") if student == "bevformer" else ("centerpoint", "mvp")
    for teacher in (None, *taught_by):
        name = f"tiny_{student}" + (f"_from_{teacher}" if teacher else "")
        experiment = experiment_from(name, world, teachers[teacher] if teacher else None, 0, SHORT)
        train(experiment, tmp_path / name, show_progress=False)
        trained, detector = load_trained(tmp_path / name)
        nuscenes = NuScenes(world)
        tokens = nuscenes.sample_tokens("train")
        found = detect(trained, detector, nuscenes, tokens, show_progress=False)
        assert set(found) == set(tokens)


@pytest.mark.parametrize(
    ("recipe", "parameters", "adapters"),
    [
        ("bevdepth_r50_from_mvp", None, 923_678),  # METHOD: DistillBEV's three taps
        ("bevformer_r50_from_lidarformer", None, 65_802),
        ("mvp_pillar02", 5_983_558, None),
    ],
)
def test_published_recipes_have_the_published_sizes(
    recipe: str, parameters: int | None, adapters: int | None
) -> None:
    experiment = RECIPES[recipe]()
    with torch.device("meta"):
        detector = build_detector(experiment)
        if parameters is not None:
            assert sum(p.numel() for p in detector.parameters()) == parameters
        if adapters is not None:
            assert experiment.teacher is not None and experiment.distill is not None
            taps = Distiller(build_teacher(experiment.teacher), detector, experiment.distill).taps
            assert sum(p.numel() for p in taps.parameters()) == adapters


def test_a_student_reads_the_points_that_its_teacher_was_trained_on(
    world: Path, teachers: dict[str, Path]
) -> None:
    experiment = experiment_from("tiny_bevdet_from_mvp", world, teachers["mvp"], 0, ())
    assert experiment.data.virtual_points is not None and experiment.data.object_pasting is None
