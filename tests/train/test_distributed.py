"""Two processes are one: the same norms, losses, weights and results, and one end."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from msgspec.structs import replace
from ranks import FORK, end_of, run_ranks, start_ranks
from tiny_nuscenes import write_tiny_nuscenes
from tiny_student import TINY
from torch import Tensor

from distillbev.boxes import Boxes3D
from distillbev.config import read_config, write_config
from distillbev.data.samples import NuScenes
from distillbev.data.schema import Batch
from distillbev.data.settings import DataConfig
from distillbev.distill.settings import clean
from distillbev.errors import ConfigError
from distillbev.evaluation.results import merge_results, write_detections
from distillbev.grid import BevGrid
from distillbev.models.bev_encoder import TopDownNeckConfig
from distillbev.models.center_head import CenterHeadConfig
from distillbev.models.centerpoint import CenterPointConfig
from distillbev.models.detectors import build_teacher
from distillbev.models.lift import DepthLossConfig
from distillbev.models.pillars import DynamicPillarsConfig, PointNorm
from distillbev.models.processes import synchronise_norms
from distillbev.models.second import SecondConfig
from distillbev.train.checkpoint import read_weights, save_weights
from distillbev.train.distributed import average_gradients
from distillbev.train.experiment import Experiment, LogConfig, OptimConfig
from distillbev.train.feed import Feed, require_labels_for_all
from distillbev.train.loop import build_objective, gradient_norms_of
from distillbev.train.step_log import StepLog

TEACHER = CenterPointConfig(
    grid=BevGrid(x_range_m=(-12.8, 12.8), y_range_m=(-12.8, 12.8), cell_m=0.4),
    pillars=DynamicPillarsConfig(channels=(8,)),
    backbone=SecondConfig(channels=(8, 8, 10), layers=(1, 1, 1), strides=(2, 2, 2)),
    neck=TopDownNeckConfig(out_channels=8),
    head=CenterHeadConfig(shared_channels=8, branch_channels=None),
    norm_momentum=0.1,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_tiny_nuscenes(tmp_path_factory.mktemp("distributed") / "tiny")
    scenes = NuScenes(root).scenes()
    splits = {"train": scenes, "labelled": scenes[:1], "unlabelled": scenes[1:]}
    (root / "splits.json").write_text(json.dumps(splits))
    return root


@pytest.fixture(scope="module")
def distilling(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment with every part that looks at a whole batch: norms, divisors, the teacher's statistics."""
    folder = tmp_path_factory.mktemp("experiment")
    torch.manual_seed(5)
    save_weights(build_teacher(TEACHER).state_dict(), folder / "teacher.safetensors")
    experiment = Experiment(
        name="distilling",
        teacher=TEACHER,
        student=replace(TINY, depth_loss=DepthLossConfig(weight=1.0)),
        distill=clean(("head",)),
        teacher_weights=str(folder / "teacher.safetensors"),
        data=DataConfig(image_size_px=(64, 32)),
        labelled_splits=("labelled",),
        unlabelled_splits=("unlabelled",),
        optim=OptimConfig(
            steps=5,
            labelled_per_step=2,
            unlabelled_per_step=2,
            # Low, for AdamW makes whole steps of the rounding noise that is the gradient of a bias before a norm.
            learning_rate=1e-4,
            ema_decay=0.9,
            precision="fp32",
        ),
        log=LogConfig(log_every=1, checkpoint_every=2, gradient_norms_every=2),
    )
    write_config(experiment, folder / "experiment.yaml")
    return folder / "experiment.yaml"


@pytest.fixture(scope="module")
def runs(root: Path, distilling: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same experiment by one process and by two."""
    runs = [tmp_path_factory.mktemp("runs") / str(world_size) for world_size in (1, 2)]
    for world_size, run in enumerate(runs, start=1):
        command = ["train", str(distilling), "--data", str(root), "--out", str(run)]
        run_ranks(command, world_size, run.with_name(f"logs-{world_size}"))
    return runs


def losses_of(run: Path) -> list[dict[str, float]]:
    """Step, rate and loss terms of every line of the log."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    apart = ("seconds", "memory", "gradient")
    return [
        {name: value for name, value in line.items() if not any(word in name for word in apart)}
        for line in lines
    ]


def test_two_processes_have_the_losses_of_one(runs: list[Path]) -> None:
    require_same_losses(*runs)


def require_same_losses(first: Path, second: Path) -> None:
    one, two = losses_of(first), losses_of(second)
    assert len(one) == len(two) == 5 and "imitate/head/foreground" in one[0]
    assert one[0] == pytest.approx(two[0], rel=2e-5)
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


def test_two_processes_have_the_gradients_of_one(root: Path, distilling: Path, tmp_path: Path) -> None:
    """In double precision, where rounding hides nothing."""
    experiment = replace(read_config(distilling, Experiment), data_root=str(root))

    def compute(rank: int, world_size: int, out: Path) -> None:
        torch.set_num_threads(1)
        if world_size > 1:
            store = f"file://{tmp_path}/store"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        torch.manual_seed(0)
        objective = build_objective(experiment).double().train()
        synchronise_norms(objective)
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double  # losses and norms ask for fp32
        batch = in_double(next(iter(Feed(experiment, NuScenes(root), 0, rank, world_size))))
        total = torch.stack(list(objective(batch, 0).values())).sum()
        norms = gradient_norms_of(objective)
        total.backward()
        average_gradients(objective, {})
        if rank == 0:
            named = objective.named_parameters()
            gradients = {name: p.grad for name, p in named if p.grad is not None}
            save_weights({**gradients, **{name: torch.tensor(norm) for name, norm in norms.items()}}, out)

    gradients = []
    for world_size in (1, 2):
        out = tmp_path / f"{world_size}.safetensors"
        run_functions(compute, world_size, out)
        gradients.append(read_weights(out))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-9)


def in_double(batch: Batch) -> Batch:
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    tensors = {
        name: value.double()
        for name, value in fields.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    assert batch.points is not None
    boxes = [b and dataclasses.replace(b, boxes=b.boxes.double()) for b in batch.boxes]
    return dataclasses.replace(batch, **tensors, points=[p.double() for p in batch.points], boxes=boxes)


def run_functions(function: Callable[..., None], world_size: int, *arguments: object) -> None:
    """Calls `function(rank, world_size, *arguments)` in processes of their own."""
    ranks = [FORK.Process(target=function, args=(rank, world_size, *arguments)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    assert [process.exitcode for process in ranks] == [0] * world_size


def test_killing_one_process_ends_all_with_one_line_and_any_number_goes_on(
    root: Path, distilling: Path, runs: list[Path], tmp_path: Path
) -> None:
    def die_at_step_2(rank: int) -> None:
        record = StepLog.record

        def record_or_die(self: StepLog, step: int, values: dict[str, float]) -> None:
            record(self, step, values)
            if rank == 1 and step == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        StepLog.record = record_or_die

    killed, logs = tmp_path / "killed", tmp_path / "logs"
    command = ["train", str(distilling), "--data", str(root), "--out"]
    output, exit_codes = end_of(start_ranks([*command, str(killed)], 2, logs, die_at_step_2), logs)
    assert exit_codes == [2, -signal.SIGKILL]
    lines = [line for line in "".join(output).splitlines() if line and "s/step" not in line]
    assert len(lines) == 1, lines
    assert "killed: another process of this run was killed or lost" in lines[0]
    assert "up to step 2 is kept" in lines[0]

    for world_size, whole in enumerate(runs, start=1):
        again = tmp_path / f"again-{world_size}"
        shutil.copytree(killed, again)
        run_ranks([*command, str(again)], world_size, tmp_path / f"logs-{world_size}")
        require_same_losses(again, whole)
    assert losses_of(again) == losses_of(whole), "two processes go on exactly where two stopped"


def test_two_processes_evaluate_to_the_last_digit_as_one(root: Path, runs: list[Path]) -> None:
    found = []
    for world_size in (1, 2):
        out = runs[0] / f"evaluation-{world_size}"
        command = ["evaluate", str(runs[0]), "--data", str(root), "--split", "train", "--out", str(out)]
        printed = run_ranks(command, world_size, out.with_name(f"logs-evaluation-{world_size}"))
        assert "NDS" in printed[0] and not any(printed[1:])
        found.append([(out / name).read_bytes() for name in ("results_nusc.json", "metrics_summary.json")])
        assert sorted(path.name for path in out.iterdir()) == [
            "metrics_summary.json",
            "results_nusc.json",
            "table.txt",
        ]
    assert found[0] == found[1]
    assert json.loads(found[0][0])["results"].keys() == set(NuScenes(root).sample_tokens("train"))


@pytest.mark.parametrize("speed", [1.5, float("nan")])
def test_joined_parts_are_the_results_written_at_once(root: Path, tmp_path: Path, speed: float) -> None:
    samples = [NuScenes(root).sample(token) for token in NuScenes(root).sample_tokens("train")]
    found = {}
    for number, sample in enumerate(samples):  # the first without a box
        boxes = torch.rand(number, 9) + 1
        boxes[:, 7:] = speed
        found[sample.token] = Boxes3D(boxes, torch.zeros(number, dtype=torch.long), torch.rand(number))
    write_detections(tmp_path / "whole.json", found, samples)
    parts = [tmp_path / f"{number}.json" for number in range(len(samples))]
    for sample, part in zip(samples, parts, strict=True):
        write_detections(part, {sample.token: found[sample.token]}, [sample])
    merge_results(parts, tmp_path / "joined.json")
    whole, joined = ((tmp_path / name).read_text() for name in ("whole.json", "joined.json"))
    assert json.dumps(json.loads(joined)) == json.dumps(json.loads(whole))
    assert joined == whole or speed != speed


def test_torchrun_trains_without_warnings(root: Path, distilling: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "distillbev",
        "train",
        str(distilling),
        "--data",
        str(root),
        "--out",
        str(tmp_path / "r"),
    ]
    done = subprocess.run(
        [*command, "--set", "optim.steps=1"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r" / "weights.safetensors").exists()
    assert "Warning" not in done.stderr, done.stderr


def test_an_uneven_share_of_labels_is_refused(distilling: Path) -> None:
    experiment = read_config(distilling, Experiment)
    require_labels_for_all(experiment, 4)
    pseudo = replace(experiment.distill.pseudo_labels, as_targets=False)
    uneven = replace(experiment, distill=replace(experiment.distill, pseudo_labels=pseudo))
    require_labels_for_all(uneven, 2)
    with pytest.raises(ConfigError, match="labelled_per_step=2 cannot be shared evenly by 4 processes"):
        require_labels_for_all(uneven, 4)


@pytest.mark.parametrize("shares", [(5, 3), (7, 0)])
def test_norms_over_two_processes_are_norms_over_all_samples(shares: tuple[int, int], tmp_path: Path) -> None:
    """Processes may hold unlike numbers of samples, also none."""
    torch.manual_seed(0)
    samples = torch.randn(sum(shares), 3, 4, dtype=torch.float64) * 2 + 1
    weights = torch.randn(sum(shares), 3, 4, dtype=torch.float64)
    expected = norm_and_gradients(samples, weights)

    def compute(rank: int, world_size: int) -> None:
        torch.set_num_threads(1)
        store = f"file://{tmp_path}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        start = shares[0] * rank
        part = slice(start, start + shares[rank])
        save_weights(norm_and_gradients(samples[part], weights[part]), tmp_path / f"{rank}.safetensors")

    run_functions(compute, 2)
    first, second = (read_weights(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(first[name], expected[name])
        torch.testing.assert_close(second[name], expected[name])
    for name in ("weight", "bias"):
        torch.testing.assert_close(first[name] + second[name], expected[name])
    for name in ("output", "input"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), expected[name])


def norm_and_gradients(samples: Tensor, weights: Tensor) -> dict[str, Tensor]:
    norm = PointNorm(3, momentum=0.3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    if dist.is_initialized():
        synchronise_norms(norm)
    samples = samples.clone().requires_grad_()
    output = norm(samples)
    (output * weights).sum().backward()
    gradients = {"input": samples.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return {**norm.state_dict(), "output": output, **gradients}
