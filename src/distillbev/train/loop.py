"""The training loop: one step after another, written down as it goes, resumable to the same numbers."""

from __future__ import annotations

import json
import logging
import math
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ..config import first_difference, read_config, write_config
from ..data.samples import NuScenes
from ..data.schema import Batch
from ..distill.distiller import Distiller
from ..distill.inheritance import inherit_head
from ..errors import DistillBevError, RunError
from ..models.bevdet import BevDet
from ..models.centerpoint import CenterPoint
from ..models.detectors import Student, Teacher, build_student, build_teacher
from ..models.processes import synchronise_norms
from .checkpoint import Checkpoint, load_weights, save_weights
from .distributed import (
    Ending,
    average_gradients,
    ending_together,
    gather_tokens,
    join_processes,
    seed_step,
    wait_for_all,
)
from .environment import describe_environment
from .experiment import Experiment, OptimConfig
from .feed import Feed
from .schedule import learning_rate_factor, momentum_at
from .step_log import StepLog, forget_log_after

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "weights.safetensors"
MANNER = ("faults", "log", "cache", "workers")  # not what comes out: a resumed run may change these
ADAPTERS_FILE = "adapters.safetensors"  # what learns beside the student and is not needed after training


class DetectionObjective(nn.Module):
    """What a detector without a teacher minimises: its own detection loss."""

    def __init__(self, detector: Student | Teacher) -> None:
        super().__init__()
        self.student = detector

    def forward(self, batch: Batch, step: int | None = None) -> dict[str, Tensor]:
        return self.student.loss(self.student(batch), batch)


class DepthObjective(nn.Module):
    """What a student minimises that only learns depth, from the LiDAR's points and no label."""

    def __init__(self, student: BevDet) -> None:
        super().__init__()
        self.student = student

    def forward(self, batch: Batch, step: int | None = None) -> dict[str, Tensor]:
        config = self.student.config.depth_loss
        assert config is not None, "the experiment has checked this"
        _, depth_logits = self.student.see(batch)
        return {"depth": self.student.loss_of_depth(depth_logits, batch, config)}


def build_detector(experiment: Experiment) -> Student | Teacher:
    """The detector that the experiment trains, with fresh weights."""
    if experiment.student is not None:
        return build_student(experiment.student)
    assert experiment.teacher is not None
    return build_teacher(experiment.teacher)


def load_teacher(experiment: Experiment) -> Teacher:
    """The trained teacher of an experiment, in eval mode.

    Raises:
        RunError: the experiment does not say where the teacher's weights lie.
    """
    assert experiment.teacher is not None
    if experiment.teacher_weights is None:
        raise RunError(
            f"experiment {experiment.name!r} needs a trained teacher, found none; "
            "train one first and give its run folder with --teacher"
        )
    teacher = build_teacher(experiment.teacher)
    load_weights(teacher, Path(experiment.teacher_weights))
    return teacher.eval()


def build_objective(experiment: Experiment) -> DetectionObjective | DepthObjective | Distiller:
    """The detector and what it minimises: its own loss, or a teacher's lessons as well.

    A fresh student starts from the files that the experiment names: its own from an earlier run, its image
    backbone's, its teacher's head.
    """
    detector = build_detector(experiment)
    if isinstance(detector, Student) and (report := detector.image_encoder.load_backbone_weights()):
        logger.info("image backbone: %s", report)
    if experiment.start_weights is not None:
        load_weights(detector, Path(experiment.start_weights))
        logger.info("start: %s", experiment.start_weights)
    if experiment.task == "depth":
        assert isinstance(detector, BevDet), "the experiment has checked this"
        return DepthObjective(detector)
    if not experiment.needs_teacher:
        return DetectionObjective(detector)
    teacher = load_teacher(experiment)
    if experiment.inherit_head:
        logger.info("%s", inherit_head(detector, teacher))
    if experiment.distill is None:
        return DetectionObjective(detector)
    return Distiller(teacher, detector, experiment.distill)


class AveragedWeights:
    """Exponential moving average of the weights; counters and batch-norm statistics are copied as they are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.learned = {name for name, _ in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))  # short memory at first: early weights are far off
        for name, tensor in model.state_dict().items():
            if name in self.learned:
                self.state[name].lerp_(tensor, 1 - decay)
            else:
                self.state[name].copy_(tensor)


def train(experiment: Experiment, run: Path, *, resume: bool = True, show_progress: bool = True) -> Path:
    """Trains what the experiment describes and leaves everything about it in the run folder.

    Continues from the newest checkpoint of the same experiment, to the same numbers as an uninterrupted run.
    Where `torchrun` started several processes, they share each step's samples.

    Returns:
        The file with the resulting weights (the average where the experiment keeps one).

    Raises:
        RunError: the folder holds another run, a loss is not finite (named, with the samples' tokens), or a
            process was lost.
        DataError: a file that the run needs is absent or damaged.
    """
    rank, world_size, device = join_processes()
    with ending_together(run.name) as ending:
        return _train(experiment, run, resume, show_progress, rank, world_size, device, ending)


def _train(
    experiment: Experiment,
    run: Path,
    resume: bool,
    show_progress: bool,
    rank: int,
    world_size: int,
    device: torch.device,
    ending: Ending,
) -> Path:
    weights = run / WEIGHTS_FILE
    require_own_folder(experiment, run, resume)
    if weights.exists():
        return weights

    torch.manual_seed(experiment.seed)
    optim, log = experiment.optim, experiment.log
    nuscenes = NuScenes(Path(experiment.data_root))
    objective = build_objective(experiment).to(device)
    model = objective.student
    optimizer = torch.optim.AdamW(parameter_groups(objective, optim), lr=optim.learning_rate, foreach=True)
    average = AveragedWeights(model, optim.ema_decay) if optim.ema_decay is not None else None
    checkpoint = Checkpoint.latest(run / "checkpoints")
    first_step = checkpoint.step if checkpoint is not None else 0
    feed = Feed(experiment, nuscenes, first_step, rank, world_size)
    batches = iter(feed)
    # Damaged data is told here, before anything is written.
    batches = chain([next(batches)], batches)
    if checkpoint is not None:
        averaged = checkpoint.restore(objective, optimizer)
        if average is not None and averaged is not None:
            average.state = {name: tensor.to(device) for name, tensor in averaged.items()}

    def save_checkpoint(done: int) -> None:
        state = average.state if average is not None else None
        Checkpoint.save(run / "checkpoints", done, objective, optimizer, state, log.keep_checkpoints)

    if world_size > 1:
        synchronise_norms(objective)
    objective.train()
    wait_for_all()  # nobody shall look into a folder that is half claimed
    ending.kept = lambda: what_is_kept(run)
    if rank == 0:
        claim_run_folder(experiment, run)
        forget_log_after(run / "metrics.jsonl", first_step)
        (run / "environment.json").write_text(json.dumps(describe_environment(nuscenes.root), indent=2))
    with StepLog(
        run, experiment, first_step, enabled=rank == 0, show=show_progress and rank == 0
    ) as step_log:
        for step in range(first_step, optim.steps):
            factor = learning_rate_factor(optim.schedule, step, optim.steps)
            momentum = momentum_at(optim.schedule, step, optim.steps)
            for group in optimizer.param_groups:
                group["lr"] = optim.learning_rate * group["lr_factor"] * factor
                group["betas"] = (momentum, group["betas"][1])

            sums: dict[str, float] = {}
            norms: dict[str, float] = {}
            tokens: list[str] = []
            for part in range(optim.accumulate):
                try:
                    with step_log.waiting_for_data():
                        batch = next(batches).to(device)
                except DistillBevError:
                    if rank == 0 and step > first_step:
                        save_checkpoint(step)  # the fault lies in the data, not in what was learned
                    raise
                tokens += batch.tokens
                seed_step(experiment.seed, step, part, rank)
                with autocast(optim.precision, device):
                    losses = objective(batch, step)
                total = torch.stack([loss.float() for loss in losses.values()]).sum()
                require_finite(losses, batch, step, run)
                if part == optim.accumulate - 1 and is_due(step, log.gradient_norms_every):
                    norms = gradient_norms_of(objective)  # by all processes: norms ask for all of them
                (total / optim.accumulate).backward()
                for name, loss in {**losses, "loss": total}.items():
                    sums[name] = sums.get(name, 0.0) + float(loss.detach()) / optim.accumulate

            sums = average_gradients(objective, {**sums, "damaged_samples": feed.num_damaged})
            if sums.pop("damaged_samples") > 0:
                step_log.num_damaged = feed.num_damaged_anywhere(device)
                require_bearable(step_log.num_damaged, experiment, run)
            norm = nn.utils.clip_grad_norm_(objective.parameters(), optim.clip_norm or math.inf)
            if not torch.isfinite(norm):
                raise RunError(
                    f"{run.name}: the gradient norm at step {step} is {float(norm)}, samples "
                    f"{gather_tokens(tokens)}; lower learning_rate ({optim.learning_rate}) or use fp32"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average is not None:
                average.update(model, step)
            step_values = {"gradient_norm": float(norm), "lr": optim.learning_rate * factor}
            step_log.record(step, {**sums, **norms, **step_values})

            done = step + 1
            if rank == 0 and (done % log.checkpoint_every == 0) and done < optim.steps:
                save_checkpoint(done)

    if rank == 0:
        beside = {
            name: tensor for name, tensor in objective.state_dict().items() if not name.startswith("student.")
        }
        if beside:
            save_weights(beside, run / ADAPTERS_FILE)
        save_weights(average.state if average is not None else model.state_dict(), weights)
    wait_for_all()
    return weights


def what_is_kept(run: Path) -> str:
    """The end of a message: from where a run goes on; empty where there is nothing."""
    checkpoint = Checkpoint.latest(run / "checkpoints")
    if checkpoint is None:
        return ""
    return f"; all up to step {checkpoint.step} is kept, and the same command goes on from there"


def require_own_folder(experiment: Experiment, run: Path, resume: bool) -> None:
    """Refuses a folder that holds something else than this experiment; what does not change it may differ.

    Raises:
        RunError: the folder holds another experiment, or the same one while `resume` is off.
    """
    path = run / "experiment.yaml"
    if path.exists():
        same_manner = {name: getattr(experiment, name) for name in MANNER}
        theirs = msgspec.structs.replace(read_config(path, Experiment), **same_manner)
        if difference := first_difference(theirs, experiment):
            key, theirs, ours = difference
            raise RunError(
                f"{run} holds another run: its {key} is {theirs!r}, this one's {ours!r}; choose another --out"
            )
        if not resume:
            raise RunError(f"{run} holds this run already; let it resume, or choose another --out")
    elif run.exists() and any(run.iterdir()):
        raise RunError(f"{run} is not empty and holds no run (no experiment.yaml); choose another --out")


def claim_run_folder(experiment: Experiment, run: Path) -> None:
    """Makes the folder this experiment's own."""
    run.mkdir(parents=True, exist_ok=True)
    write_config(experiment, run / "experiment.yaml")


def parameter_groups(objective: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Weights with decay; biases and norm parameters (one axis) without; the backbone at its own rate."""
    backbone = set(backbone_of(objective.student).parameters()) if optim.backbone_lr_factor != 1 else set()
    groups = []
    for members, factor in ((False, 1.0), (True, optim.backbone_lr_factor)):
        learned = [p for p in objective.parameters() if p.requires_grad and (p in backbone) == members]
        for has_decay in (True, False):
            groups.append(
                {
                    "params": [p for p in learned if (p.ndim > 1) == has_decay],
                    "weight_decay": optim.weight_decay if has_decay else 0.0,
                    "lr_factor": factor,
                }
            )
    return groups if backbone else groups[:2]


def backbone_of(detector: object) -> nn.Module:
    """What looks at the sensor first: a student's image backbone, a teacher's point encoder."""
    if isinstance(detector, Student):
        return detector.image_encoder.backbone
    assert isinstance(detector, Teacher), "an experiment trains one of ours"
    return detector.pillars if isinstance(detector, CenterPoint) else detector.points


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 where it is asked for, or by itself on hardware that computes in it; parameters stay fp32."""
    enabled = precision == "bf16" or (precision == "auto" and has_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16 itself; elsewhere torch emulates it, slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)


def require_finite(losses: dict[str, Tensor], batch: Batch, step: int, run: Path) -> None:
    """Raises RunError naming the first term that is not finite, and the samples it came from."""
    for name, loss in losses.items():
        if not torch.isfinite(loss):
            raise RunError(
                f"{run.name}: loss term {name!r} is {float(loss.detach())} at step {step}, samples {batch.tokens}; "
                "look at these samples with `distillbev inspect`"
            )


def require_bearable(num_damaged: int, experiment: Experiment, run: Path) -> None:
    """Raises RunError where the processes together met more damaged samples than one alone may."""
    limit = experiment.faults.max_damaged_samples
    if num_damaged > limit:
        raise RunError(
            f"{run.name}: the processes found {num_damaged} damaged samples, named in the log; mend the data, or "
            f"let faults.max_damaged_samples={limit} be {num_damaged} or more"
        )


def gradient_norms_of(objective: nn.Module) -> dict[str, float]:
    """Norm of each term's gradient at the student's BEV map, where a distiller can tell."""
    if not isinstance(objective, Distiller):
        return {}
    return {f"gradient/{name}": norm for name, norm in objective.last_gradient_norms().items()}


def is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
