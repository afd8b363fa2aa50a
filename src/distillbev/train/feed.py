"""The batches of a run, and what is done when files or the processes that read them fail on the way."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import signal
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from multiprocessing.process import BaseProcess

import torch

from ..data.frames import Frame, FrameDataset, frames_of_splits
from ..data.loader import BatchLoader, make_training_loader
from ..data.samples import NuScenes
from ..data.schema import Batch
from ..data.settings import DataConfig
from ..errors import ConfigError, DataError, RunError
from ..models.processes import total_over_processes
from .experiment import Experiment

logger = logging.getLogger(__name__)


class ForgivingFrames(FrameDataset):
    """Frames of a training run; a damaged one is replaced by the next readable one with (or without) labels.

    What was found damaged, at most `limit` samples, is known to all workers of a process.

    Raises:
        DataError: one more sample is damaged than allowed.
    """

    def __init__(
        self,
        nuscenes: NuScenes,
        frames: list[Frame],
        config: DataConfig,
        seed: int,
        cache: bool,
        limit: int,
    ) -> None:
        super().__init__(nuscenes, frames, config, seed, train=True, cache=cache)
        self.limit = limit
        self.damaged = torch.zeros(len(frames), dtype=torch.bool).share_memory_()

    def __getitem__(self, frame_and_draw: tuple[int, int]) -> Batch:
        index, draw = frame_and_draw
        for candidate in self._alike(index):
            if self.damaged[candidate]:
                continue
            try:
                return super().__getitem__((candidate, draw))
            except DataError as error:
                self.damaged[candidate] = True
                found = int(self.damaged.sum())
                if found > self.limit:
                    raise DataError(
                        f"{error}; mend the data, or let faults.max_damaged_samples={self.limit} be {found} or more"
                    ) from None
                token = self.frames[candidate].token
                logger.warning("damaged sample %s left out (%d of %d): %s", token, found, self.limit, error)
        raise DataError(f"sample {self.frames[index].token}: damaged, and so are all others like it")

    def _alike(self, index: int) -> Iterator[int]:
        """The frame, then those behind it (around the end) that are labelled like it."""
        for offset in range(len(self.frames)):
            candidate = (index + offset) % len(self.frames)
            if self.frames[candidate].labelled == self.frames[index].labelled:
                yield candidate


class Feed:
    """Batches of the steps from `first_step` on; each step's samples come in `accumulate` parts.

    Worker processes that die are started anew, as often as the experiment allows, at the batch that was lost.

    Raises:
        DataError: more damaged samples than the experiment allows.
        DeadWorkerError: more often than the experiment allows.
    """

    def __init__(
        self,
        experiment: Experiment,
        nuscenes: NuScenes,
        first_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        require_labels_for_all(experiment, world_size)
        frames, self.groups = frames_of_splits(
            nuscenes, experiment.labelled_splits, experiment.unlabelled_splits
        )
        self.frames = ForgivingFrames(
            nuscenes,
            frames,
            experiment.training_data,
            experiment.seed,
            experiment.cache,
            experiment.faults.max_damaged_samples,
        )
        self.experiment, self.first_step = experiment, first_step
        self.rank, self.world_size = rank, world_size

    @property
    def num_damaged(self) -> int:
        """Different samples that this process has found damaged."""
        return int(self.frames.damaged.sum())

    def num_damaged_anywhere(self, device: torch.device) -> int:
        """Different samples that the processes together have found damaged; all of them have to ask."""
        found = total_over_processes(self.frames.damaged.to(device, torch.int32))
        return int((found > 0).sum())

    def __iter__(self) -> Iterator[Batch]:
        accumulate, allowed = self.experiment.optim.accumulate, self.experiment.faults.max_dead_workers
        taken = deaths = 0
        while True:
            step, parts_done = divmod(taken, accumulate)
            batches = watched(iter(self._loader(self.first_step + step)))
            try:
                for batch in islice(batches, parts_done, None):
                    taken += 1
                    yield batch
                return
            except DeadWorkerError as death:
                reason = str(death)
            # Outside of `except`, which would hold on to the loader and its other workers.
            deaths += 1
            if deaths > allowed:
                raise DeadWorkerError(
                    f"{self.experiment.name}: {reason}; lower `workers` or switch `cache` off if memory ran out, "
                    f"or let faults.max_dead_workers={allowed} be {deaths} or more"
                )
            logger.warning("%s; started anew (%d of %d)", reason, deaths, allowed)

    def _loader(self, step: int) -> BatchLoader:
        optim = self.experiment.optim
        return make_training_loader(
            self.frames,
            self.groups,
            per_step=(optim.labelled_per_step, optim.unlabelled_per_step),
            steps=optim.steps,
            first_step=step,
            accumulate=optim.accumulate,
            rank=self.rank,
            world_size=self.world_size,
            workers=self.experiment.workers,
            class_balanced=optim.class_balanced,
        )


class DeadWorkerError(RunError):
    """A process that reads data was killed, or ended by itself."""


def watched(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches of a loader; that a worker died is raised between batches, with its cause.

    By itself torch raises it wherever the program is, which amid an update would spoil the weights.

    Raises:
        DeadWorkerError: by which signal, or with which exit code.
    """
    others = multiprocessing.active_children()
    batch = reason = None
    try:
        batch = next(batches, None)  # starts the workers, and sets torch's handler
    except (RuntimeError, ConnectionError, EOFError) as error:  # the latter where it died while handing over
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        reason = f"data worker died before the first batch: {' '.join(str(error).split())}"
    workers = [child for child in multiprocessing.active_children() if child not in others]
    handler = None
    if (workers or reason) and threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch still looks every few seconds
    while batch is not None:
        yield batch
        reason = cause_of_death(workers)
        if reason is not None:
            break
        try:
            batch = next(batches, None)
        except (RuntimeError, OSError, EOFError):  # the last two where it died while handing over
            ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=10)
            for worker in workers:  # its end is seen before it can be asked how it ended
                if worker.sentinel in ended:
                    worker.join(timeout=5)
            reason = cause_of_death(workers)
            if reason is None:
                raise
            break
    if reason is not None:
        raise DeadWorkerError(reason)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)


def cause_of_death(workers: Sequence[BaseProcess]) -> str | None:
    """What ended the first worker that did not end well; None where all are well."""
    for worker in workers:
        if code := worker.exitcode:
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            )
            return f"data worker {worker.pid} {how}"
    return None


def require_labels_for_all(experiment: Experiment, world_size: int) -> None:
    """Raises ConfigError where some process would have no sample for the detection loss, and others had."""
    optim, distill = experiment.optim, experiment.distill
    shares = world_size * optim.accumulate
    some_unused = optim.unlabelled_per_step and distill is not None and not distill.pseudo_labels.as_targets
    if world_size > 1 and some_unused and optim.labelled_per_step % shares:
        raise ConfigError(
            f"labelled_per_step={optim.labelled_per_step} cannot be shared evenly by {world_size} processes in "
            f"{optim.accumulate} parts each, and unlabelled frames have no targets; make it a multiple of {shares} "
            "or set distill.pseudo_labels.as_targets"
        )
