import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from tiny_nuscenes import edit_table, write_tiny_nuscenes

from distillbev.data.samples import NuScenes
from distillbev.data.schema import Batch
from distillbev.errors import CheckpointError, RunError
from distillbev.recipes import RECIPES, experiment_from
from distillbev.train.checkpoint import Checkpoint, load_weights, read_weights
from distillbev.train.feed import Feed
from distillbev.train.inference import load_trained
from distillbev.train.loop import (
    build_detector,
    build_objective,
    require_finite,
    train,
)
from distillbev.train.step_log import StepLog

STEPS = 6


def experiment(root: Path, recipe: str = "tiny_bevdet", teacher: Path | None = None, *overrides: str):
    short = (
        f"optim.steps={STEPS}",
        "optim.labelled_per_step=1",
        "labelled_splits=[train]",
        "log.checkpoint_every=2",
        "log.log_every=1",
        "data.image_size_px=[64, 32]",
        "optim.precision=fp32",
    )
    return experiment_from(recipe, root, teacher, 3, (*short, *overrides))


@pytest.fixture(scope="module")
def teacher_run(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "teacher"
    train(experiment(tiny_root, "tiny_centerpoint"), run, show_progress=False)
    return run


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


VARIED = ("data.colour_aug={}", "data.grid_mask={}", "optim.schedule.peak_momentum=0.5")


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [("tiny_bevdet", ()), ("tiny_bevdet", VARIED), ("tiny_bevdet_from_centerpoint", ())],
)
def test_an_interrupted_run_resumes_to_the_numbers_of_an_uninterrupted_one(
    tiny_root: Path,
    teacher_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    overrides: tuple[str, ...],
):
    taught = recipe != "tiny_bevdet"
    config = experiment(tiny_root, recipe, teacher_run if taught else None, *overrides)
    whole = train(config, tmp_path / "whole", show_progress=False)

    record = StepLog.record

    def die_at_step_4(self: StepLog, step: int, values: dict[str, float]) -> None:
        record(self, step, values)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StepLog, "record", die_at_step_4)
        train(config, tmp_path / "killed", show_progress=False)
    resumed = train(config, tmp_path / "killed", show_progress=False)

    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")
    first, second = read_weights(whole), read_weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_cycling_momentum_is_what_the_optimiser_steps_by(tiny_root: Path, tmp_path: Path):
    """The first two losses know no momentum yet: AdamW's first step is the same for any."""
    for name, momentum in (("constant", "null"), ("cycling", "0.1")):
        config = experiment(tiny_root, "tiny_bevdet", None, f"optim.schedule.peak_momentum={momentum}")
        train(config, tmp_path / name, show_progress=False)
    constant, cycling = losses_of(tmp_path / "constant"), losses_of(tmp_path / "cycling")
    assert constant[:2] == cycling[:2] and constant[2:] != cycling[2:]


def test_training_lowers_the_loss_and_leaves_a_run_that_loads(tiny_root: Path, tmp_path: Path):
    config = experiment(tiny_root, "tiny_bevdet", None, "optim.steps=30", "optim.learning_rate=0.002")
    train(config, tmp_path / "run", show_progress=False)
    losses = losses_of(tmp_path / "run")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    loaded, detector = load_trained(tmp_path / "run")
    assert loaded == config
    assert not detector.training


def test_a_folder_with_another_run_is_refused(tiny_root: Path, teacher_run: Path):
    with pytest.raises(RunError, match="holds another run"):
        train(experiment(tiny_root, "tiny_bevdet"), teacher_run, show_progress=False)


def test_a_folder_with_something_else_is_refused(tiny_root: Path, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(RunError, match="not empty"):
        train(experiment(tiny_root), tmp_path, show_progress=False)


def test_weights_of_another_architecture_are_refused_with_the_first_difference(
    tiny_root: Path, teacher_run: Path
):
    detector = build_detector(experiment(tiny_root))
    with pytest.raises(CheckpointError, match=r"another architecture than BevDet.*missing \(first: "):
        load_weights(detector, teacher_run / "weights.safetensors")


def test_truncated_weights_are_refused(tiny_root: Path, teacher_run: Path, tmp_path: Path):
    damaged = tmp_path / "weights.safetensors"
    damaged.write_bytes((teacher_run / "weights.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not readable as safetensors"):
        read_weights(damaged)


def test_a_half_written_checkpoint_does_not_count(teacher_run: Path, tmp_path: Path):
    shutil.copytree(teacher_run / "checkpoints", tmp_path / "checkpoints")
    newest = Checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    (tmp_path / "checkpoints" / ".step-0000099.part").mkdir()
    again = Checkpoint.latest(tmp_path / "checkpoints")
    assert again is not None and again.step == newest.step


def test_a_loss_that_is_not_finite_is_named_with_its_samples(tmp_path: Path):
    eye = torch.eye(4)[None]
    batch = Batch(["token-7"], None, eye[None], eye[None], eye[None], eye, eye, None, [None])
    losses = {"heatmap": torch.tensor(1.0), "yaw": torch.tensor(float("nan"))}
    with pytest.raises(RunError, match=r"'yaw' is nan at step 5, samples \['token-7'\]"):
        require_finite(losses, batch, 5, tmp_path)


def test_labels_of_unlabelled_frames_are_never_read(teacher_run: Path, tmp_path: Path):
    """Labels of the unlabelled scenes replaced by nonsense: the same numbers, to the last bit."""
    weights = []
    for name in ("true", "nonsense"):
        root = write_tiny_nuscenes(tmp_path / name)
        scenes = NuScenes(root).scenes()
        splits = {"labelled": scenes[:1], "unlabelled": scenes[1:]}
        (root / "splits.json").write_text(json.dumps(splits))
        if name == "nonsense":
            hidden = {token for token in NuScenes(root).sample_tokens("unlabelled")}

            def spoil(rows: list[dict], hidden: set[str] = hidden) -> None:
                for row in rows:
                    if row["sample_token"] in hidden:
                        row["translation"] = [x + 3.0 for x in row["translation"]]
                        row["size"] = [9.0, 9.0, 9.0]

            edit_table(root, "sample_annotation", spoil)
        config = experiment(
            root,
            "tiny_bevdet_from_unlabelled",
            teacher_run,
            "labelled_splits=[labelled]",
            "distill.pseudo_labels.score_threshold=0.0",
        )
        train(config, tmp_path / f"run-{name}", show_progress=False)
        weights.append(read_weights(tmp_path / f"run-{name}" / "weights.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_every_recipe_builds_on_the_meta_device():
    for recipe in RECIPES.values():
        with torch.device("meta"):
            assert sum(p.numel() for p in build_detector(recipe()).parameters()) > 0


def test_accumulated_parts_see_the_samples_of_the_whole_step(tiny_root: Path, tmp_path: Path):
    seen = []
    for accumulate in (1, 2):
        parts = ("optim.labelled_per_step=2", f"optim.accumulate={accumulate}")
        config = experiment(tiny_root, "tiny_bevdet", None, *parts)
        tokens = [token for batch in Feed(config, NuScenes(tiny_root)) for token in batch.tokens]
        seen.append([sorted(tokens[i : i + 2]) for i in range(0, len(tokens), 2)])
    assert seen[0] == seen[1]


def test_batches_move_between_devices_whole(tiny_root: Path):
    batch = next(iter(Feed(experiment(tiny_root), NuScenes(tiny_root))))
    moved = batch.to("cpu")
    assert [field.name for field in dataclasses.fields(moved)] == [f.name for f in dataclasses.fields(batch)]
    assert replace(experiment(tiny_root), seed=4) != experiment(tiny_root)


def test_depth_is_learned_without_labels_and_gives_detection_its_start(tiny_root: Path, tmp_path: Path):
    depth = experiment(
        tiny_root,
        "tiny_bevdet_depth",
        None,
        "unlabelled_splits=[train]",
        "labelled_splits=[]",
        "optim.labelled_per_step=0",
        "optim.unlabelled_per_step=2",
    )
    start = train(depth, tmp_path / "depth", show_progress=False)
    fresh = build_detector(depth).state_dict()
    learned = read_weights(start)
    assert {name for name in fresh if name.startswith("lift.")} <= learned.keys()
    config = experiment(tiny_root, "tiny_bevdet", None, f"start_weights={start}")
    objective = build_objective(config)
    assert all(torch.equal(tensor, learned[name]) for name, tensor in objective.student.state_dict().items())
