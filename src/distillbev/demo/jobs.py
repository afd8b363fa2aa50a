"""Runs jobs that wait for one another, side by side, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..errors import RunError


@dataclass(frozen=True)
class Job:
    """A few `distillbev` commands in a row.

    Attributes:
        name: shown in the progress display and used in messages.
        commands: argument lists of the command line.
        done: file that the last command writes; a job whose file exists is not run again.
        needs: names of jobs that must have finished before.
        metrics: the run's metrics.jsonl, for the progress bar; None where the job trains nothing.
        steps: how many steps the training takes.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    done: Path
    needs: tuple[str, ...] = ()
    metrics: Path | None = None
    steps: int = 1


def run_jobs(jobs: Sequence[Job], slots: int, logs: Path) -> dict[str, float]:
    """Runs all jobs, at most `slots` at a time, the cores shared out evenly among them.

    Returns:
        Wall seconds of every job that ran now.

    Raises:
        RunError: a command failed; the others are stopped and what they have done is kept.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // slots)
    waiting = [job for job in jobs if not job.done.exists()]
    finished = {job.name for job in jobs if job.done.exists()}
    running: dict[str, _Running] = {}
    seconds: dict[str, float] = {}
    with Progress(TextColumn("{task.description:>28}"), BarColumn(), TimeElapsedColumn()) as progress:
        try:
            while waiting or running:
                for job in [job for job in waiting if finished.issuperset(job.needs)]:
                    if len(running) < slots:
                        waiting.remove(job)
                        task = progress.add_task(job.name, total=job.steps)
                        running[job.name] = _Running(job, logs / f"{job.name}.log", threads, task)
                assert running, f"jobs wait for jobs that do not exist: {[job.name for job in waiting]}"
                time.sleep(0.2)
                for name, run in list(running.items()):
                    progress.update(run.task, completed=run.steps_done())
                    if run.advance():
                        progress.update(run.task, completed=run.job.steps)
                        seconds[name] = time.perf_counter() - run.since
                        finished.add(name)
                        del running[name]
        finally:
            for run in running.values():
                run.stop()
    return seconds


class _Running:
    """One job under way: the command it is at, and the process of that command."""

    def __init__(self, job: Job, log: Path, threads: int, task: TaskID) -> None:
        self.job, self.log_path, self.task = job, log, task
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.remaining = list(job.commands)
        self.since = time.perf_counter()
        self.log = log.open("w")
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "distillbev", *self.remaining.pop(0)]
        return subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log
        )

    def advance(self) -> bool:
        """Starts the next command when one has ended; true when the job is done."""
        code = self.process.poll()
        if code is None:
            return False
        if code != 0:
            self.log.flush()
            lines = [line for line in self.log_path.read_text().splitlines() if line.strip()]
            reason = lines[-1].removeprefix("error: ") if lines else "no output"
            raise RunError(f"{self.job.name}: stopped with exit code {code}: {reason} (log: {self.log_path})")
        if self.remaining:
            self.process = self._start()
            return False
        self.log.close()
        return True

    def steps_done(self) -> int:
        if self.job.metrics is None or not self.job.metrics.exists():
            return 0
        *lines, _half_written = self.job.metrics.read_bytes().split(b"\n")
        return json.loads(lines[-1])["step"] + 1 if lines else 0

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
