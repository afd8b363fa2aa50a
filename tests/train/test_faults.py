"""Whatever goes wrong on the way ends a run in one line, with what it learned kept, or is borne as allowed."""

import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_student import TINY
from torch import Tensor

from distillbev.data.samples import NuScenes
from distillbev.data.schema import Batch
from distillbev.data.settings import DataConfig
from distillbev.errors import ConfigError, DataError, RunError
from distillbev.models.bevdet import BevDet
from distillbev.recipes import RECIPES
from distillbev.train.checkpoint import save_weights
from distillbev.train.experiment import Experiment, FaultConfig, LogConfig, OptimConfig
from distillbev.train.feed import Feed, ForgivingFrames
from distillbev.train.loop import (
    DetectionObjective,
    build_detector,
    parameter_groups,
    require_bearable,
    train,
)
from distillbev.train.step_log import StepLog


def experiment(root: Path, workers: int = 0, **faults: int) -> Experiment:
    return Experiment(
        name="alone",
        student=TINY,
        data=DataConfig(image_size_px=(64, 32), load_points=False),
        data_root=str(root),
        optim=OptimConfig(steps=6, labelled_per_step=1, precision="fp32"),
        log=LogConfig(log_every=1, checkpoint_every=2),
        faults=FaultConfig(**faults),
        workers=workers,
    )


@pytest.fixture(scope="module")
def undisturbed(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(experiment(tiny_root), run, show_progress=False)
    return losses_of(run)


def lines_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in lines_of(run)]


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Lets something happen after a step, once."""

    def happen(when: int, what: Callable[[], None]) -> None:
        record = StepLog.record
        happened: list[int] = []

        def record_and_do(self: StepLog, step: int, values: dict[str, float]) -> None:
            record(self, step, values)
            if step == when and not happened:
                happened.append(step)
                what()

        monkeypatch.setattr(StepLog, "record", record_and_do)

    return happen


def test_a_file_damaged_on_the_way_stops_the_run_which_then_goes_on_without_that_sample(
    spoilt_root: Path, tmp_path: Path, after_step: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    config = experiment(spoilt_root)
    damaged = NuScenes(spoilt_root).sample_tokens("train")[1]
    image = NuScenes(spoilt_root).sample(damaged).cameras[0].path
    after_step(2, lambda: os.truncate(image, 100))  # one pass is over: every sample was read once
    with pytest.raises(DataError) as caught:
        train(config, tmp_path / "run", show_progress=False)
    told = str(caught.value)
    assert image.name in told and "faults.max_damaged_samples=0" in told
    kept = int(told.split("all up to step ")[1].split()[0])
    assert kept >= 3 and "\n" not in told

    with caplog.at_level(logging.WARNING):
        train(experiment(spoilt_root, max_damaged_samples=1), tmp_path / "run", show_progress=False)
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(6))
    assert lines[-1]["damaged_samples"] == 1
    assert f"damaged sample {damaged} left out (1 of 1)" in caplog.text


def test_one_damaged_sample_more_than_allowed_stops_the_run(spoilt_root: Path) -> None:
    nuscenes = NuScenes(spoilt_root)
    for token in nuscenes.sample_tokens("train")[:2]:
        os.truncate(nuscenes.sample(token).cameras[0].path, 100)
    with pytest.raises(DataError, match=r"let faults\.max_damaged_samples=1 be 2 or more"):
        list(Feed(experiment(spoilt_root, max_damaged_samples=1), nuscenes))


def test_damaged_samples_are_replaced_by_the_same_ones_in_workers(spoilt_root: Path) -> None:
    nuscenes = NuScenes(spoilt_root)
    broken = nuscenes.sample_tokens("train")[0]
    os.truncate(nuscenes.sample(broken).cameras[0].path, 100)
    seen = []
    for workers in (0, 2):
        feed = Feed(experiment(spoilt_root, workers, max_damaged_samples=1), nuscenes)
        seen.append([token for batch in feed for token in batch.tokens])
        assert feed.num_damaged == 1
    assert seen[0] == seen[1] and len(seen[0]) == 6 and broken not in seen[0]


def kill_workers() -> None:
    for child in multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)


def test_a_dead_worker_stops_the_run_with_its_cause(
    tiny_root: Path, tmp_path: Path, after_step: Callable, undisturbed: list[float]
) -> None:
    after_step(2, kill_workers)
    with pytest.raises(
        RunError, match=r"worker \d+ was killed by SIGKILL; lower `workers`.* step \d is kept"
    ) as caught:
        train(experiment(tiny_root, workers=1), tmp_path / "run", show_progress=False)
    assert "\n" not in str(caught.value)
    train(experiment(tiny_root), tmp_path / "run", show_progress=False)
    assert losses_of(tmp_path / "run") == undisturbed


def test_a_worker_that_dies_at_once_is_told_with_its_cause(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ForgivingFrames, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RunError, match=r"before the first batch: .*(signal: Killed|exited unexpectedly)"):
        next(iter(Feed(experiment(tiny_root, workers=1), NuScenes(tiny_root))))


def test_a_dead_worker_is_started_anew_and_no_number_changes(
    tiny_root: Path,
    tmp_path: Path,
    after_step: Callable,
    undisturbed: list[float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    after_step(2, kill_workers)
    with caplog.at_level(logging.WARNING):
        config = experiment(tiny_root, workers=1, max_dead_workers=1)
        train(config, tmp_path / "run", show_progress=False)
    assert losses_of(tmp_path / "run") == undisturbed
    assert "started anew (1 of 1)" in caplog.text


def test_a_loss_that_is_not_finite_stops_the_run_and_the_checkpoint_before_is_kept(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: list[float]
) -> None:
    forward = DetectionObjective.forward

    def spoilt(self: DetectionObjective, batch: Batch, step: int | None = None) -> dict[str, Tensor]:
        losses = forward(self, batch, step)
        return {**losses, "yaw": losses["yaw"] * float("nan")} if step == 3 else losses

    tokens = [batch.tokens for batch in Feed(experiment(tiny_root), NuScenes(tiny_root))]
    with monkeypatch.context() as patch:
        patch.setattr(DetectionObjective, "forward", spoilt)
        with pytest.raises(RunError) as caught:
            train(experiment(tiny_root), tmp_path / "run", show_progress=False)
    assert f"loss term 'yaw' is nan at step 3, samples {tokens[3]}" in str(caught.value)
    assert "up to step 2 is kept" in str(caught.value)
    train(experiment(tiny_root), tmp_path / "run", show_progress=False)
    assert losses_of(tmp_path / "run") == undisturbed


def test_a_policy_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_dead_workers=-1"):
        FaultConfig(max_dead_workers=-1)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_obey_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        save_weights({"w": torch.zeros(2)}, tmp_path / "weights.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(
    ("detector", "backbone"),
    [
        (lambda: BevDet(TINY), "image_encoder.backbone."),
        (lambda: build_detector(RECIPES["tiny_centerpoint"]()), "pillars."),
        (lambda: build_detector(RECIPES["tiny_lidarformer"]()), "points."),
    ],
)
def test_what_looks_at_the_sensor_first_learns_at_its_own_rate(detector, backbone: str) -> None:
    objective = DetectionObjective(detector())
    groups = parameter_groups(objective, OptimConfig(backbone_lr_factor=0.1))
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    slow = {names[id(p)] for group in groups if group["lr_factor"] == 0.1 for p in group["params"]}
    fast = {names[id(p)] for group in groups if group["lr_factor"] == 1.0 for p in group["params"]}
    assert slow == {name for name in names.values() if name.startswith(f"student.{backbone}")}
    assert slow and fast and slow | fast == set(names.values())


def test_bevformer_is_trained_with_the_published_rate_of_its_backbone() -> None:
    for name, recipe in RECIPES.items():
        published_bevformer = name.startswith("bevformer_r50")
        assert recipe().optim.backbone_lr_factor == (0.1 if published_bevformer else 1.0)


def test_processes_together_bear_no_more_than_one_may(tmp_path: Path) -> None:
    config = experiment(tmp_path, max_damaged_samples=2)
    require_bearable(2, config, tmp_path)
    with pytest.raises(RunError, match="3 damaged samples"):
        require_bearable(3, config, tmp_path)
