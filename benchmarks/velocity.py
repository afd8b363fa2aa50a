"""Can a student read velocity off two maps? Its eyes are replaced by maps that say where things are.

Run: python benchmarks/velocity.py WORLD OUT [--steps 400] [--maps centres,points]

WORLD is a simulated dataset with the splits train and val (that of benchmarks/twelve_rows.py). In place of lifted
images the tiny BEVDet gets, of every frame, either the annotated centres by class ("centres") or the LiDAR points of
the key sweep by height ("points"); everything behind, from the joining of frames to the score, is as ever. Prints a
table of the velocity errors of cars and pedestrians, and writes it to OUT/velocity.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from distillbev.boxes import transform_boxes
from distillbev.classes import CLASSES
from distillbev.data.points import read_sweep
from distillbev.data.samples import NuScenes
from distillbev.data.schema import Batch
from distillbev.evaluation.metrics import ERRORS
from distillbev.grid import BevGrid
from distillbev.models.bevdet import BevDet, BevDetConfig
from distillbev.models.history import HistoryConfig
from distillbev.recipes import tiny_bevdet4d, tiny_head
from distillbev.scoring import evaluate_run
from distillbev.train.experiment import Experiment
from distillbev.train.loop import train

HEIGHTS_M = torch.arange(-2.5, 1.5, 0.4)
SPREAD_M = 0.8
DrawMap = Callable[[str, np.ndarray, BevGrid], Tensor]  # token, BEV augmentation -> (C, Y, X)


def draw_centres(world: NuScenes) -> DrawMap:
    """A bump for each annotated object, one channel per class."""
    annotations = cache(lambda token: world.sample(token).annotations)

    def draw(token: str, bev_aug: np.ndarray, grid: BevGrid) -> Tensor:
        known = annotations(token)
        maps = torch.zeros(len(CLASSES), *grid.shape)
        for box, label in zip(transform_boxes(bev_aug, known.boxes), known.labels, strict=True):
            if label >= 0:
                apart = grid.cell_centres() - torch.tensor(box[:2], dtype=torch.float32)
                bump = torch.exp(-apart.square().sum(dim=-1) / (2 * SPREAD_M**2))
                maps[label] = torch.maximum(maps[label], bump)
        return maps

    return draw


def draw_points(world: NuScenes) -> DrawMap:
    """How many points of the key sweep lie in each cell, one channel per slice of height."""
    points_of = cache(lambda token: np.asarray(read_sweep(world.sample(token).sweeps[0]))[:, :3])

    def draw(token: str, bev_aug: np.ndarray, grid: BevGrid) -> Tensor:
        points = torch.from_numpy(points_of(token) @ bev_aug[:3, :3].T + bev_aug[:3, 3]).float()
        (rows, columns), slices = grid.shape, len(HEIGHTS_M)
        column, row = grid.cell_coordinates(points[:, :2]).floor().long().unbind(dim=1)
        inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
        height = (torch.bucketize(points[:, 2].contiguous(), HEIGHTS_M) - 1).clamp(min=0)
        cell = ((height * rows + row) * columns + column)[inside]
        return torch.bincount(cell, minlength=slices * rows * columns).view(slices, rows, columns).log1p()

    return draw


def replace_eyes(draw: DrawMap) -> None:
    """Every BevDet sees drawn maps from now on."""

    def see(self: BevDet, batch: Batch, cam2bev: Tensor | None = None) -> tuple[Tensor, None]:
        maps = [
            draw(token, batch.bev_aug[i].double().numpy(), self.config.grid)
            for i, token in enumerate(batch.tokens)
        ]
        lifted = torch.zeros(len(batch), self.lift.out_channels, *self.config.grid.shape)
        lifted[:, : maps[0].shape[0]] = torch.stack(maps)
        return (lifted if self.fusion is None else self.fusion.refine(lifted)), None

    BevDet.see = see  # pyright: ignore[reportAttributeAccessIssue]


def student(history: HistoryConfig | None, velocity_weight: float, world: Path, steps: int) -> Experiment:
    """The tiny student, two frames or one; `velocity_weight` is that of its own unit."""
    base = tiny_bevdet4d()
    assert isinstance(base.student, BevDetConfig)
    return replace(
        base,
        student=replace(
            base.student, history=history, depth_loss=None, head=tiny_head(velocity_weight=velocity_weight)
        ),
        data_root=str(world),
        data=replace(base.data, past=base.data.past if history is not None else None),
        optim=replace(base.optim, steps=steps, labelled_per_step=4),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--maps", default="centres,points")
    arguments = parser.parse_args()
    world = NuScenes(arguments.world)
    # A displacement over half a second weighs twice as much as the same velocity in m/s.
    histories = {
        "one frame": (None, 1.0),
        "two frames, velocity weight of one": (HistoryConfig(blocks=1), 0.2),
        "two frames": (HistoryConfig(blocks=1), 2.0),
        "two frames, correlated": (HistoryConfig(blocks=1, correlation_cells=6), 2.0),
    }
    lines = [
        f"{arguments.steps} steps of 4 frames, seed 0.",
        "",
        "| maps | student | mAP | car AVE m/s | pedestrian AVE m/s |",
        "|---|---|---|---|---|",
    ]
    draws = {"centres": draw_centres, "points": draw_points}
    for maps in arguments.maps.split(","):
        replace_eyes(draws[maps](world))
        for name, (history, weight) in histories.items():
            run = arguments.out / f"{maps}, {name}".replace(", ", "-").replace(" ", "_")
            train(student(history, weight, arguments.world, arguments.steps), run)
            scored = evaluate_run(run, arguments.world, "val", run / "evaluation-val")
            assert scored is not None
            car, pedestrian = (
                scored.metrics.tp_errors[CLASSES.index(of), ERRORS.index("vel_err")]
                for of in ("car", "pedestrian")
            )
            lines.append(f"| {maps} | {name} | {scored.metrics.mean_ap:.3f} | {car:.2f} | {pedestrian:.2f} |")
    (arguments.out / "velocity.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
