"""A trained detector over many frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from msgspec.structs import replace
from rich.progress import track

from ..boxes import Boxes3D
from ..config import read_config
from ..data.frames import FrameDataset, frames_of_tokens
from ..data.loader import make_inference_loader
from ..data.samples import NuScenes
from ..errors import RunError
from ..models.detectors import Student, Teacher
from .checkpoint import load_weights
from .experiment import Experiment
from .feed import watched
from .loop import WEIGHTS_FILE, autocast, build_detector


def read_run(run: Path) -> Experiment:
    """The experiment of a run folder.

    Raises:
        RunError: the folder is no run.
    """
    if not (run / "experiment.yaml").exists():
        raise RunError(f"{run}: no experiment.yaml; expected a run folder that `distillbev train` made")
    return read_config(run / "experiment.yaml", Experiment)


def finished_weights(run: Path) -> Path:
    """The file with the weights of a run.

    Raises:
        RunError: its training has not finished.
    """
    if not (run / WEIGHTS_FILE).exists():
        raise RunError(f"{run}: no {WEIGHTS_FILE} yet; let `distillbev train` finish (it resumes by itself)")
    return run / WEIGHTS_FILE


def load_trained(run: Path, device: torch.device | str = "cpu") -> tuple[Experiment, Student | Teacher]:
    """The trained detector of a run folder, ready for use.

    Raises:
        RunError: the folder is no run, or its training has not finished.
        CheckpointError: the weights do not fit the experiment beside them.
    """
    experiment, weights = read_run(run), finished_weights(run)
    detector = build_detector(experiment)
    load_weights(detector, weights)
    return experiment, detector.to(device).eval()


def detect(
    experiment: Experiment,
    detector: Student | Teacher,
    nuscenes: NuScenes,
    tokens: Sequence[str],
    show_progress: bool = True,
) -> dict[str, Boxes3D]:
    """Detections of every sample (token -> boxes in its LiDAR frame), without any augmentation."""
    batches = detect_batches(experiment, detector, nuscenes, tokens, show_progress=show_progress)
    return {token: boxes for batch in batches for token, boxes in batch.items()}


@torch.inference_mode()
def detect_batches(
    experiment: Experiment,
    detector: Student | Teacher,
    nuscenes: NuScenes,
    tokens: Sequence[str],
    batch_size: int = 4,
    rank: int = 0,
    world_size: int = 1,
    show_progress: bool = True,
) -> Iterator[dict[str, Boxes3D]]:
    """Detections of one batch of samples after the other; of several processes each takes its share.

    Batch number i belongs to process i modulo `world_size`. The batches are those of a single process, since
    a sample's numbers may differ in the last digit with what stands beside it.

    Raises:
        DeadWorkerError: a process that reads data was killed.
    """
    device = next(detector.parameters()).device
    data = experiment.data
    if experiment.student is not None:
        data = replace(data, load_points=False)  # at run time a student sees cameras only
    dataset = FrameDataset(nuscenes, frames_of_tokens(tokens), data)
    loader = make_inference_loader(dataset, batch_size, experiment.workers, rank, world_size)
    batches = track(
        watched(iter(loader)), f"detecting ({experiment.name})", len(loader), disable=not show_progress
    )
    for batch in batches:
        with autocast(experiment.optim.precision, device):
            output = detector(batch.to(device))
        found = [boxes.to("cpu") for boxes in detector.decode(output)]
        yield dict(zip(batch.tokens, found, strict=True))
