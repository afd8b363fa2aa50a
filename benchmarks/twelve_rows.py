"""Trains and scores the tiny twins of the paper's twelve rows and of their teachers, and writes the table.

Run: python benchmarks/twelve_rows.py OUT [--steps 500] [--seeds 2] [--table]

Everything goes through the command line, as a user's runs do; finished runs are kept. OUT/twelve_rows.md holds the
table, OUT/students.md its mAP in short, OUT/summary.json the figures, OUT/logs what each run printed. A student is
taught by the teacher of its own seed. Students with a depth loss start from their own depth run (`task=depth`, no
labels), BEVFormer's backbone from that of BEVDet's depth run: without eyes none of them learns enough in a few hundred
steps to be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillbev.data.samples import NuScenes
from distillbev.data.virtual_points import VirtualPointsConfig, prepare_folder
from distillbev.demo.jobs import Job, run_jobs
from distillbev.demo.outcome import Spread
from distillbev.evaluation.bootstrap import bootstrap
from distillbev.evaluation.eval_boxes import ground_truth_boxes
from distillbev.evaluation.metrics import match_boxes
from distillbev.evaluation.results import read_results
from distillbev.scoring import RESULTS_FILE
from distillbev.train.inference import read_run
from distillbev.world import SplitConfig, WorldConfig, simulate
from distillbev.world.settings import Weather

STUDENTS = {
    "tiny_bevdet": ("centerpoint", "mvp"),
    "tiny_bevdet4d": ("centerpoint", "mvp"),
    "tiny_bevdepth": ("centerpoint", "mvp"),
    "tiny_bevformer": ("lidarformer", "mvpformer"),
}
TEACHERS = tuple(dict.fromkeys(teacher for teachers in STUDENTS.values() for teacher in teachers))
LONGER = 4  # no depth is taught to BEVFormer: what the others start with, it has to find out
# What differs from the named recipes: lifted maps are compressed, a single frame's velocities weigh as much as those
# of two frames, and those that a teacher guesses from one sweep are not imitated.
CONVOLUTIONAL = ("student.lift.compression=10",)
SINGLE_FRAME = ("student.head.code_weights=[1,1,1,1,1,1,1,1,1,1]",)
IMITATING = ("distill.response.velocity=0",)


@dataclass(frozen=True)
class Variant:
    """A row, or one change to it. `from_depth`: it reaches the eyes too, which a depth run of its own trains."""

    student: str
    teacher: str | None
    changes: tuple[str, ...] = ()
    from_depth: bool = False
    teacher_changes: tuple[str, ...] = ()

    @property
    def recipe(self) -> str:
        return self.student if self.teacher is None else f"{self.student}_from_{self.teacher}"


VARIANTS = {
    "relation": Variant("tiny_bevdet", "centerpoint", ("distill.taps.0.relation={weight: 100}",)),
    "balance": Variant(
        "tiny_bevdet",
        "centerpoint",
        (
            "distill.balance={}",
            "distill.weight=0.03",
            "distill.response.heatmap=0.5",
            "distill.response.boxes=0.25",
        ),
    ),
    "raw": Variant("tiny_bevdet", "centerpoint", ("distill.taps.0.normalise=null",)),
    "features": Variant("tiny_bevdet", "centerpoint", ("distill.response=null",)),
    "one_frame": Variant(
        "tiny_bevdepth", None, ("student.history=null", "data.past=null", *SINGLE_FRAME), from_depth=True
    ),
    "uncompressed": Variant("tiny_bevdepth", None, ("student.lift.compression=null",)),
    "uncorrelated": Variant(
        "tiny_bevdepth", None, ("student.history.correlation_cells=null",), from_depth=True
    ),
    "unrefined": Variant("tiny_bevdepth", None, ("student.history.blocks=0",), from_depth=True),
    "virtual_depth": Variant(
        "tiny_bevdepth",
        None,
        ("data.virtual_points={}", "student.depth_loss.virtual_points=true"),
        from_depth=True,
    ),
    "sweeps": Variant(
        "tiny_bevdepth",
        "centerpoint",
        ("distill.response.velocity=1",),
        teacher_changes=("data.num_sweeps=4", "teacher.head.code_weights=[1,1,1,1,1,1,1,1,1,1]"),
    ),
}
DEPTH_ONLY = ("task=depth", "labelled_splits=[]", "unlabelled_splits=[train]")
DEPTH_ONLY += ("optim.labelled_per_step=0", "optim.unlabelled_per_step=4")
WORLD = WorldConfig(
    seed=8,
    splits=(SplitConfig(name="train", scenes=80), SplitConfig(name="val", scenes=15)),
    key_frames_per_scene=8,
    image_size_px=(256, 144),
    weathers=(Weather.CLEAR, Weather.OVERCAST),
    lidar_sweeps=4,
    write_masks=True,
)


class Rows:
    """The runs below one folder, of so many steps each; BEVFormer's take `LONGER` times as many."""

    def __init__(self, out: Path, steps: int) -> None:
        self.out, self.steps, self.world = out, steps, out / "world"

    def run(self, name: str) -> Path:
        return self.out / "runs" / name

    def steps_of(self, recipe: str) -> int:
        return self.steps * (LONGER if recipe.startswith("tiny_bevformer") else 1)

    def train(self, recipe: str, name: str, *more: object, changes: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Arguments of `distillbev train`."""
        settings = (f"optim.steps={self.steps_of(recipe)}", *changes)
        flags = [part for setting in settings for part in ("--set", setting)]
        return tuple(
            map(str, ("train", recipe, "--data", self.world, "--out", self.run(name), *more, *flags))
        )

    def scored(self, name: str) -> Path:
        return self.run(name) / "evaluation-val" / "metrics_summary.json"

    def evaluate(self, name: str) -> tuple[str, ...]:
        return ("evaluate", str(self.run(name)), "--data", str(self.world))

    def depth_job(self, student: str, variant: str | None = None) -> Job:
        name = run_name(f"{student}_depth", variant)
        changes = CONVOLUTIONAL + (VARIANTS[variant].changes if variant is not None else ()) + DEPTH_ONLY
        commands = (self.train(student, name, changes=changes),)
        return Job(name, commands, self.run(name) / "weights.safetensors", (), self.log(name), self.steps)

    def teacher_job(self, teacher: str, seed: int, variant: str | None = None) -> Job:
        name = run_name(f"tiny_{teacher}", variant, seed)
        changes = VARIANTS[variant].teacher_changes if variant is not None else ()
        commands = (
            self.train(f"tiny_{teacher}", name, "--seed", seed, changes=changes),
            self.evaluate(name),
        )
        return Job(name, commands, self.scored(name), (), self.log(name), self.steps)

    def student_jobs(
        self, student: str, teacher: str | None, seed: int, variant: str | None = None
    ) -> list[Job]:
        """A student's job, last, and those that it waits for."""
        changed = Variant(student, teacher) if variant is None else VARIANTS[variant]
        jobs = []
        more: list[object] = ["--seed", seed]
        if student == "tiny_bevformer":
            jobs.append(self.depth_job("tiny_bevdet"))
            changes = (f"student.image_encoder.weights={jobs[0].done}",)
        else:
            jobs.append(self.depth_job(student, variant if changed.from_depth else None))
            more += ["--start", self.run(jobs[0].name)]
            changes = CONVOLUTIONAL + (SINGLE_FRAME if student == "tiny_bevdet" else ())
            changes += IMITATING if teacher is not None else ()
        if teacher is not None:
            jobs.append(self.teacher_job(teacher, seed, variant if changed.teacher_changes else None))
            more += ["--teacher", self.run(jobs[1].name)]
        name = run_name(changed.recipe, variant, seed)
        commands = (
            self.train(changed.recipe, name, *more, changes=changes + changed.changes),
            self.evaluate(name),
        )
        needs = tuple(job.name for job in jobs)
        return [*jobs, Job(name, commands, self.scored(name), needs, self.log(name), self.steps_of(student))]

    def log(self, name: str) -> Path:
        return self.run(name) / "metrics.jsonl"

    def costs(self, name: str) -> dict[str, float]:
        """What one run took."""
        lines = [json.loads(line) for line in self.log(name).read_text().splitlines()]
        return {
            "seconds_per_step": statistics.median(line["seconds_per_step"] for line in lines),
            "peak_memory_gb": max(line["peak_memory_gb"] for line in lines),
        }

    def scores(self, name: str) -> dict[str, float]:
        """What one run scored."""
        scores = json.loads(self.scored(name).read_text())
        return {
            "mAP": scores["mean_ap"],
            "NDS": scores["nd_score"],
            "mAVE": scores["tp_errors"]["vel_err"],
            "car AVE": scores["label_tp_errors"]["car"]["vel_err"],
        }

    def scenes_drawn_anew(self, names: Sequence[str]) -> list[NDArray[np.float64]]:
        """mAP of each run, scenes drawn anew 1,000 times, the same draws for all."""
        nuscenes = NuScenes(self.world)
        truth = ground_truth_boxes([nuscenes.sample(token) for token in nuscenes.sample_tokens("val")])
        drawn = []
        for name in names:
            boxes, _ = read_results(self.scored(name).parent / RESULTS_FILE, truth)
            matches = match_boxes(truth, boxes, read_run(self.run(name)).evaluation)
            drawn.append(bootstrap(matches, seed=0).mean_ap.resampled)
        return drawn


def run_name(recipe: str, variant: str | None = None, seed: int | None = None) -> str:
    parts = (recipe, variant, None if seed is None else f"seed{seed}")
    return "-".join(part for part in parts if part is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="run nothing; the table of what is finished")
    arguments = parser.parse_args()
    rows = Rows(arguments.out, arguments.steps)
    if not (rows.world / "virtual_points").is_dir():
        simulate(WORLD, rows.world)
        prepare_folder(rows.world, VirtualPointsConfig(), progress=True)

    # Each recipe and variant, and the one that it is measured against.
    recipes: dict[str, str | None] = {f"tiny_{teacher}": None for teacher in TEACHERS}
    jobs: list[Job] = []
    for student, teachers in STUDENTS.items():
        for teacher in (None, *teachers):
            recipes[Variant(student, teacher).recipe] = None if teacher is None else student
            for seed in range(arguments.seeds):
                jobs += rows.student_jobs(student, teacher, seed)
    for name, variant in VARIANTS.items():
        if variant.teacher_changes:
            recipes[run_name(f"tiny_{variant.teacher}", name)] = f"tiny_{variant.teacher}"
        recipes[run_name(variant.recipe, name)] = variant.recipe
        for seed in range(arguments.seeds):
            jobs += rows.student_jobs(variant.student, variant.teacher, seed, name)
    if not arguments.table:
        run_jobs(list({job.name: job for job in jobs}.values()), slots=2, logs=arguments.out / "logs")

    summary = summarise(rows, recipes, range(arguments.seeds))
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2))
    for name, table in (
        ("students", students_table(summary)),
        ("twelve_rows", table_of(summary, arguments.steps)),
    ):
        (arguments.out / f"{name}.md").write_text(table)
        print(table)


def summarise(rows: Rows, recipes: dict[str, str | None], seeds: Iterable[int]) -> dict[str, dict[str, Any]]:
    """Of every recipe with a finished run: what each seed cost and scored, and how its mAP differs from another's."""
    finished = {
        recipe: [name for seed in seeds if rows.scored(name := run_name(recipe, seed=seed)).exists()]
        for recipe in recipes
    }
    summary: dict[str, dict[str, Any]] = {}
    for recipe, names in finished.items():
        if not names:
            continue
        runs = [rows.costs(name) | rows.scores(name) for name in names]
        summary[recipe] = {"runs": runs}
        other = recipes[recipe]
        pairs = (
            []
            if other is None
            else [(name, twin) for name in names if (twin := name.replace(recipe, other)) in finished[other]]
        )
        if pairs:
            ours, theirs = (rows.scenes_drawn_anew(side) for side in zip(*pairs, strict=True))
            differences = [rows.scores(name)["mAP"] - rows.scores(twin)["mAP"] for name, twin in pairs]
            spread = Spread.of(differences, [a - b for a, b in zip(ours, theirs, strict=True)])
            summary[recipe]["difference"] = {"from": other} | asdict(spread)
    return summary


def table_of(summary: dict[str, dict[str, Any]], steps: int) -> str:
    """One line per recipe, means over seeds; of mAP and velocity error each seed as well."""
    most = max(len(row["runs"]) for row in summary.values())
    lines = [
        f"{steps} steps each, BEVFormer {LONGER * steps}; seeds 0 to {most - 1}; AVE in m/s. "
        "Differences are paired by seed; 95 % is over scenes.",
        "",
        "| recipe | s per step | peak GB | mAP | by seed | more than | by | 95 % | NDS | mAVE | car AVE | by seed |",
        "|---" * 12 + "|",
    ]
    for recipe, row in summary.items():
        runs = row["runs"]
        mean = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
        by_seed = {key: ", ".join(f"{run[key]:.3f}" for run in runs) for key in ("mAP", "car AVE")}
        against = ("", "", "")
        if "difference" in row:
            d = row["difference"]
            against = (f"`{d['from']}`", f"{d['mean']:+.3f}", f"{d['low']:+.3f} to {d['high']:+.3f}")
        cells = (
            f"`{recipe}`",
            f"{mean['seconds_per_step']:.2f}",
            f"{mean['peak_memory_gb']:.1f}",
            f"**{mean['mAP']:.3f}**",
            by_seed["mAP"],
            *against,
            f"{mean['NDS']:.3f}",
            f"{mean['mAVE']:.2f}",
            f"{mean['car AVE']:.2f}",
            by_seed["car AVE"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def students_table(summary: dict[str, dict[str, Any]]) -> str:
    """The paper's twelve rows in short: mAP of each student alone, and what each teacher adds."""
    lines = [
        "| student | alone | from CenterPoint | gain | from MVP | gain |",
        "|---" * 6 + "|",
    ]
    for student, teachers in STUDENTS.items():
        recipes = [Variant(student, teacher).recipe for teacher in (None, *teachers)]
        if not summary.keys() >= set(recipes):  # not finished
            continue
        alone, *taught = (summary[recipe] for recipe in recipes)
        cells = [f"`{student}`", f"{mean_ap(alone):.3f}"]
        for row in taught:
            d = row["difference"]
            cells += [
                f"**{mean_ap(row):.3f}**",
                f"{d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean_ap(row: dict[str, Any]) -> float:
    return statistics.fmean(run["mAP"] for run in row["runs"])


if __name__ == "__main__":
    main()
