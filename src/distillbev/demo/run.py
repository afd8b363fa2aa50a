"""Runs a plan: stages that are kept once finished, then the page, the table and the summary."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..config import first_difference, read_config, write_config
from ..data.samples import NuScenes
from ..errors import RunError
from ..scoring import METRICS_FILE, annotated_samples
from ..train.experiment import Experiment
from ..train.loop import WEIGHTS_FILE
from ..world import SplitConfig, Weather, WorldConfig, simulate
from .arms import LABELLED, UNLABELLED, arm_experiment, depth_experiment
from .jobs import Job, run_jobs
from .outcome import Outcome, evaluation_of, measure, run_of, seeds_of
from .page import demo_page
from .plan import Arm, DemoPlan

PAGE, SUMMARY, SECONDS = "report.html", "summary.json", "seconds.json"


def run_demo(plan: DemoPlan, out: Path) -> Path:
    """Runs the demo in a folder and returns the page; what is finished there already is not done again.

    Raises:
        RunError: the folder holds another plan, or a stage failed.
    """
    console = Console()
    _claim(plan, out)
    world = out / "world"
    with _Stopwatch(out, "simulate"):
        simulate(world_of(plan), world)
    jobs = [_depth_job(plan, out)] + [
        _job(arm, plan, seed, out) for arm in plan.arms for seed in seeds_of(plan, arm)
    ]
    for name, seconds in run_jobs(jobs, _slots(), out / "logs").items():
        _note_seconds(out, name, seconds)
    with _Stopwatch(out, "report"):
        samples = annotated_samples(NuScenes(world), plan.held_out_split)
        teacher = _experiment(Arm.TEACHER, plan, plan.seeds[0], out)
        outcome = measure(plan, out, teacher, samples)
        (out / PAGE).write_text(demo_page(plan, out, outcome, samples, _seconds(out)))
    summary = summarise(plan, outcome, _seconds(out), len(samples))
    (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    print_outcome(console, outcome)
    console.print(f"\nreport: {out / PAGE}\nsummary: {out / SUMMARY}", highlight=False)
    return out / PAGE


def world_of(plan: DemoPlan) -> WorldConfig:
    """The simulated world of a plan. Held-out scenes are the last, so that no other number moves them."""
    return WorldConfig(
        seed=plan.world_seed,
        splits=(
            SplitConfig(name=LABELLED, scenes=plan.labelled_scenes),
            SplitConfig(name=UNLABELLED, scenes=plan.unlabelled_scenes),
            SplitConfig(name=plan.held_out_split, scenes=plan.held_out_scenes),
        ),
        key_frames_per_scene=plan.key_frames_per_scene,
        image_size_px=(704, 396) if plan.size == "large" else (256, 144),
        camera_hz=None,
        lidar_sweeps=0,
        # 16 labelled scenes would hold three of each weather; a day's light is enough to show what helps.
        weathers=(Weather.CLEAR, Weather.OVERCAST),
        write_masks=False,
    )


def summarise(
    plan: DemoPlan, outcome: Outcome, seconds: dict[str, float], held_out_frames: int
) -> dict[str, object]:
    """The content of summary.json."""
    return {
        "arms": {
            str(arm): {
                "mAP": result.mean_ap.mean,
                "NDS": result.nds.mean,
                "mAP_interval": [result.mean_ap.low, result.mean_ap.high],
                "mAP_by_seed": list(result.mean_ap.values),
                "AP": {name: spread.mean for name, spread in result.class_ap.items()},
                "errors": result.errors,
            }
            for arm, result in outcome.arms.items()
        },
        "differences": [
            {
                "second": str(d.second),
                "first": str(d.first),
                "mAP": d.mean_ap.mean,
                "mAP_interval": [d.mean_ap.low, d.mean_ap.high],
                "mAP_by_seed": list(d.mean_ap.values),
                "AP": {name: spread.mean for name, spread in d.class_ap.items()},
            }
            for d in outcome.differences
        ],
        "seed": plan.seeds[0],
        "seeds": list(plan.seeds),
        "seconds": seconds,
        "labelled_frames": plan.labelled_scenes * plan.key_frames_per_scene,
        "unlabelled_frames": plan.unlabelled_scenes * plan.key_frames_per_scene,
        "held_out_frames": held_out_frames,
    }


def print_outcome(console: Console, outcome: Outcome) -> None:
    """The table that the demo ends with, and each difference with its interval."""
    table = Table(title="held-out scenes; 95 % intervals over scenes")
    for column in ("arm", "mAP", "", "NDS", "what it is"):
        table.add_column(column, justify="left" if column in ("arm", "what it is") else "right")
    for arm, result in outcome.arms.items():
        spread = result.mean_ap
        interval = f"[{spread.low:.3f}, {spread.high:.3f}]".replace("[", "\\[")
        table.add_row(str(arm), f"{spread.mean:.3f}", interval, f"{result.nds.mean:.3f}", arm.meaning)
    console.print(table)
    for difference in outcome.differences:
        console.print(str(difference), highlight=False, markup=False)


DEPTH = "depth"


def _experiment(arm: Arm, plan: DemoPlan, seed: int, out: Path) -> Experiment:
    return arm_experiment(arm, plan, seed, out / "world", run_of(out, Arm.TEACHER, 0), out / "runs" / DEPTH)


def _job(arm: Arm, plan: DemoPlan, seed: int, out: Path) -> Job:
    run = run_of(out, arm, seed)
    experiment = _experiment(arm, plan, seed, out)
    evaluation = evaluation_of(run, plan.held_out_split)
    needs = () if arm is Arm.TEACHER else (DEPTH, str(Arm.TEACHER)) if experiment.needs_teacher else (DEPTH,)
    return Job(
        name=run.name,
        commands=(
            _training(experiment, run, out),
            ("evaluate", str(run), *_data(out), "--out", str(evaluation), "--split", plan.held_out_split),
        ),
        done=evaluation / METRICS_FILE,
        needs=needs,
        metrics=run / "metrics.jsonl",
        steps=experiment.optim.steps,
    )


def _depth_job(plan: DemoPlan, out: Path) -> Job:
    run = out / "runs" / DEPTH
    return Job(
        name=DEPTH,
        commands=(_training(depth_experiment(plan, out / "world"), run, out),),
        done=run / WEIGHTS_FILE,
        metrics=run / "metrics.jsonl",
        steps=plan.depth_steps,
    )


def _training(experiment: Experiment, run: Path, out: Path) -> tuple[str, ...]:
    """The command that trains an experiment, which is written beside the runs."""
    recipe = out / "experiments" / f"{run.name}.yaml"
    recipe.parent.mkdir(exist_ok=True)
    write_config(experiment, recipe)
    return ("train", str(recipe), *_data(out), "--out", str(run))


def _data(out: Path) -> tuple[str, str]:
    return "--data", str(out / "world")


def _slots() -> int:
    """One job at a time on a GPU; on a CPU one per two cores at most four, two on two cores.

    Two arms side by side beat one arm on two threads.
    """
    return 1 if torch.cuda.is_available() else max(1, min(os.cpu_count() or 1, 4))


def _claim(plan: DemoPlan, out: Path) -> None:
    path = out / "plan.yaml"
    if path.exists():
        if difference := first_difference(read_config(path, DemoPlan), plan):
            key, theirs, ours = difference
            raise RunError(
                f"{out} holds a demo with another plan: its {key} is {theirs!r}, this one's {ours!r}; "
                "choose another --out"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty and holds no demo (no plan.yaml); choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_config(plan, path)


def _seconds(out: Path) -> dict[str, float]:
    path = out / SECONDS
    return json.loads(path.read_text()) if path.exists() else {}


def _note_seconds(out: Path, stage: str, seconds: float) -> None:
    (out / SECONDS).write_text(json.dumps(_seconds(out) | {stage: round(seconds, 1)}, indent=2))


class _Stopwatch:
    """Writes down how long a stage took, the first time that it was done."""

    def __init__(self, out: Path, stage: str) -> None:
        self.out, self.stage = out, stage

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, error: object, *_: object) -> None:
        if error is None and self.stage not in _seconds(self.out):
            _note_seconds(self.out, self.stage, time.perf_counter() - self.start)
