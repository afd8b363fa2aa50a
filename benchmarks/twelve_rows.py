"""Trains and scores the tiny twins of the paper's twelve rows and of their teachers, and writes the table.

Run: python benchmarks/twelve_rows.py OUT [--steps 500] [--seeds 2] [--table]

Everything goes through the command line, as a user's runs do; finished runs are kept. OUT/twelve_rows.md holds the
table, OUT/summary.json the figures, OUT/logs what each run printed. A student is taught by the teacher of its own seed.
Students with a depth loss start from their own depth run (`task=depth`, no labels), BEVFormer's backbone from that of
BEVDet's depth run: without eyes none of them learns enough in a few hundred steps to be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from distillbev.data.virtual_points import VirtualPointsConfig, prepare_folder
from distillbev.demo.jobs import Job, run_jobs
from distillbev.world import SplitConfig, WorldConfig, simulate
from distillbev.world.settings import Weather

STUDENTS = {
    "tiny_bevdet": ("centerpoint", "mvp"),
    "tiny_bevdet4d": ("centerpoint", "mvp"),
    "tiny_bevdepth": ("centerpoint", "mvp"),
    "tiny_bevformer": ("lidarformer", "mvpformer"),
}
TEACHERS = tuple(dict.fromkeys(teacher for teachers in STUDENTS.values() for teacher in teachers))
# What differs from the named recipes: lifted maps are compressed, a single frame's velocities weigh as much as those
# of two frames, and those that a teacher guesses from one sweep are not imitated.
CONVOLUTIONAL = ("student.lift.compression=10",)
SINGLE_FRAME = ("student.head.code_weights=[1,1,1,1,1,1,1,1,1,1]",)
IMITATING = ("distill.response.velocity=0",)
# What else BEVDet may learn from CenterPoint, one change each.
VARIANTS = {
    "relation": ("distill.taps.0.relation={weight: 100}",),
    "balance": (
        "distill.balance={}",
        "distill.weight=0.03",
        "distill.response.heatmap=0.5",
        "distill.response.boxes=0.25",
    ),
    "raw": ("distill.taps.0.normalise=null",),
    "features": ("distill.response=null",),
}
DEPTH_ONLY = ("task=depth", "labelled_splits=[]", "unlabelled_splits=[train]")
DEPTH_ONLY += ("optim.labelled_per_step=0", "optim.unlabelled_per_step=4")
WORLD = WorldConfig(
    seed=8,
    splits=(SplitConfig(name="train", scenes=80), SplitConfig(name="val", scenes=15)),
    key_frames_per_scene=8,
    image_size_px=(256, 144),
    weathers=(Weather.CLEAR, Weather.OVERCAST),
    lidar_sweeps=0,
    write_masks=True,
)


class Rows:
    """The runs below one folder, all of the same number of steps."""

    def __init__(self, out: Path, steps: int) -> None:
        self.out, self.steps, self.world = out, steps, out / "world"

    def run(self, name: str) -> Path:
        return self.out / "runs" / name

    def train(self, recipe: str, name: str, *more: object, changes: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Arguments of `distillbev train`."""
        settings = (f"optim.steps={self.steps}", *changes)
        flags = [part for setting in settings for part in ("--set", setting)]
        return tuple(
            map(str, ("train", recipe, "--data", self.world, "--out", self.run(name), *more, *flags))
        )

    def scored(self, name: str) -> Path:
        return self.run(name) / "evaluation-val" / "metrics_summary.json"

    def evaluate(self, name: str) -> tuple[str, ...]:
        return ("evaluate", str(self.run(name)), "--data", str(self.world))

    def depth_job(self, recipe: str) -> Job:
        name = f"{recipe}_depth"
        command = self.train(recipe, name, changes=CONVOLUTIONAL + DEPTH_ONLY)
        return Job(name, (command,), self.run(name) / "weights.safetensors", (), self.log(name), self.steps)

    def teacher_job(self, teacher: str, seed: int) -> Job:
        name = f"tiny_{teacher}-seed{seed}"
        commands = (self.train(f"tiny_{teacher}", name, "--seed", seed), self.evaluate(name))
        return Job(name, commands, self.scored(name), (), self.log(name), self.steps)

    def student_job(self, student: str, teacher: str | None, seed: int, variant: str | None = None) -> Job:
        recipe = student if teacher is None else f"{student}_from_{teacher}"
        name = f"{recipe}-seed{seed}" if variant is None else f"{recipe}-{variant}-seed{seed}"
        eyes = student if student != "tiny_bevformer" else "tiny_bevdet"
        needs = [f"{eyes}_depth"]
        more: list[object] = ["--seed", seed]
        if student == "tiny_bevformer":
            changes = (f"student.image_encoder.weights={self.run(f'{eyes}_depth') / 'weights.safetensors'}",)
        else:
            more += ["--start", self.run(f"{eyes}_depth")]
            changes = CONVOLUTIONAL + (SINGLE_FRAME if student == "tiny_bevdet" else ())
            changes += IMITATING if teacher is not None else ()
            changes += VARIANTS[variant] if variant is not None else ()
        if teacher is not None:
            more += ["--teacher", self.run(f"tiny_{teacher}-seed{seed}")]
            needs.append(f"tiny_{teacher}-seed{seed}")
        commands = (self.train(recipe, name, *more, changes=changes), self.evaluate(name))
        return Job(name, commands, self.scored(name), tuple(needs), self.log(name), self.steps)

    def log(self, name: str) -> Path:
        return self.run(name) / "metrics.jsonl"

    def figures(self, name: str) -> dict[str, float]:
        """What one run cost and scored."""
        lines = [json.loads(line) for line in self.log(name).read_text().splitlines()]
        scores = json.loads(self.scored(name).read_text())
        return {
            "seconds_per_step": statistics.median(line["seconds_per_step"] for line in lines),
            "peak_memory_gb": max(line["peak_memory_gb"] for line in lines),
            "mAP": scores["mean_ap"],
            "NDS": scores["nd_score"],
            "mAVE": scores["tp_errors"]["vel_err"],
            "car AVE": scores["label_tp_errors"]["car"]["vel_err"],
        }


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

    seeds = range(arguments.seeds)
    jobs = [rows.depth_job(student) for student in STUDENTS if student != "tiny_bevformer"]
    recipes = [f"tiny_{teacher}" for teacher in TEACHERS]
    for seed in seeds:
        for student, teachers in STUDENTS.items():
            jobs += [rows.teacher_job(teacher, seed) for teacher in teachers]
            jobs += [rows.student_job(student, teacher, seed) for teacher in (None, *teachers)]
    for student, teachers in STUDENTS.items():
        recipes += [student, *(f"{student}_from_{teacher}" for teacher in teachers)]
    for variant in VARIANTS:
        jobs += [rows.student_job("tiny_bevdet", "centerpoint", seed, variant) for seed in seeds]
        recipes.append(f"tiny_bevdet_from_centerpoint-{variant}")
    if not arguments.table:
        run_jobs(list({job.name: job for job in jobs}.values()), slots=2, logs=arguments.out / "logs")

    names = {recipe: [f"{recipe}-seed{seed}" for seed in seeds] for recipe in recipes}
    summary = {
        recipe: [rows.figures(name) for name in runs if rows.scored(name).exists()]
        for recipe, runs in names.items()
    }
    summary = {recipe: runs for recipe, runs in summary.items() if runs}
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2))
    table = table_of(summary, arguments.steps)
    (arguments.out / "twelve_rows.md").write_text(table)
    print(table)


def table_of(summary: dict[str, list[dict[str, float]]], steps: int) -> str:
    """One line per recipe, means over seeds; of mAP and velocity error each seed as well."""
    lines = [
        f"{steps} steps each; seeds 0 to {max(map(len, summary.values())) - 1}.",
        "",
        "| recipe | s per step | peak GB | mAP | by seed | NDS | mAVE m/s | car AVE m/s | by seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe, runs in summary.items():
        mean = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
        by_seed = {key: ", ".join(f"{run[key]:.3f}" for run in runs) for key in ("mAP", "car AVE")}
        lines.append(
            f"| `{recipe}` | {mean['seconds_per_step']:.2f} | {mean['peak_memory_gb']:.1f} | **{mean['mAP']:.3f}** "
            f"| {by_seed['mAP']} | {mean['NDS']:.3f} | {mean['mAVE']:.2f} | {mean['car AVE']:.2f} "
            f"| {by_seed['car AVE']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
