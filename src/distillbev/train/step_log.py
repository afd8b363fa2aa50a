"""What a run writes down and shows while it goes: `metrics.jsonl`, the progress bar, TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import RunError
from .experiment import Experiment


def forget_log_after(path: Path, step: int) -> None:
    """Drops log lines of steps that a resumed run will take again, and a last line that was cut off.

    Raises:
        RunError: a line is no JSON object with a step.
    """
    if not path.exists():
        return
    *lines, _cut_off = path.read_text(errors="replace").split("\n")
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            raise RunError(
                f"{path}, line {number}: found {line[:40]!r}, expected a JSON object with a step; "
                "delete the line (only the training curves need it)"
            ) from None
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(kept))
    part.replace(path)


class StepLog:
    """Writes `metrics.jsonl`, shows progress with the time left, and tells data time from step time."""

    def __init__(self, run: Path, experiment: Experiment, first_step: int, enabled: bool, show: bool) -> None:
        self.run, self.experiment, self.enabled = run, experiment, enabled
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            disable=not show,
        )
        self.task = self.progress.add_task(
            experiment.name, total=experiment.optim.steps, completed=first_step, note=""
        )
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.data_seconds = 0.0
        self.num_damaged = 0
        self.steps = 0
        self.since = time.perf_counter()

    def __enter__(self) -> StepLog:
        if self.enabled:
            self.file = (self.run / "metrics.jsonl").open("a")
            if self.experiment.log.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(self.run / "tensorboard"))
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        if self.enabled:
            self.file.close()

    def waiting_for_data(self) -> _Stopwatch:
        return _Stopwatch(self)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Averages the values of the steps since the last line, and writes one when it is due."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.steps += 1
        self.progress.update(self.task, completed=step + 1)
        last = step + 1 == self.experiment.optim.steps
        if not self.enabled or not (last or (step + 1) % self.experiment.log.log_every == 0):
            return
        now = time.perf_counter()
        line: dict[str, float] = {name: self.sums[name] / self.counts[name] for name in self.sums}
        line |= {
            "seconds_per_step": (now - self.since) / self.steps,
            "data_seconds_per_step": self.data_seconds / self.steps,
            "peak_memory_gb": peak_memory_bytes() / 1e9,
        }
        if self.num_damaged:
            line["damaged_samples"] = self.num_damaged
        self.file.write(json.dumps({"step": step, **line}) + "\n")
        self.file.flush()
        if self.experiment.log.tensorboard:
            for name, value in line.items():
                self.writer.add_scalar(name, value, step)
        note = f"loss {line['loss']:.3f}  {line['seconds_per_step']:.2f} s/step"
        self.progress.update(self.task, note=f"{note} (data {line['data_seconds_per_step']:.2f})")
        self.sums, self.counts, self.data_seconds, self.steps, self.since = {}, {}, 0.0, 0, now


def peak_memory_bytes() -> int:
    """The most that this process has held so far, on its GPU if it has one, else in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class _Stopwatch:
    """Adds the time spent inside to the log's data time."""

    def __init__(self, log: StepLog) -> None:
        self.log = log

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.log.data_seconds += time.perf_counter() - self.start
