"""The page of one run: what it is, how training went, what it sees."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..boxes import Boxes3D
from ..data.points import load_points
from ..data.schema import Sample
from .camera_views import camera_mosaic
from .page import line_chart, page, picture, read_curve
from .paint import BoxLayer, annotated_boxes
from .top_view import bev_picture

FOUND, TRUTH = (255, 176, 0), (80, 220, 120)


def layers_of(sample: Sample, detections: Boxes3D, name: str = "detections") -> list[BoxLayer]:
    """Ground truth, where the sample has any, below the detections."""
    layers = [BoxLayer(detections, name, FOUND)]
    if sample.annotations is not None:
        boxes = annotated_boxes(sample.annotations)
        layers.insert(0, BoxLayer(boxes[boxes.labels >= 0], "ground truth", TRUTH))
    return layers


def points_to_show(sample: Sample) -> NDArray[np.float32] | None:
    """The LiDAR's points where their files are there: a student detects without them."""
    recorded = sample.sweeps and all(sweep.path.exists() for sweep in sample.sweeps)
    return load_points(sample) if recorded else None


def detection_pictures(sample: Sample, detections: Boxes3D, out: Path, extent_m: float) -> list[Path]:
    """Writes the cameras and the view from above, with detections beside the ground truth."""
    layers = layers_of(sample, detections)
    points = points_to_show(sample)
    title = f"{sample.scene}   {sample.token[:8]}   {len(detections)} detections"
    cameras = camera_mosaic(sample, layers, title=title)
    bev = bev_picture(points, layers, extent_m, title=title)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{sample.token}_cameras.jpg", out / f"{sample.token}_bev.png"]
    cameras.save(paths[0], quality=92)
    bev.save(paths[1])
    return paths


def run_page(
    name: str, run: Path, samples: Sequence[Sample], detections: Mapping[str, Boxes3D], extent_m: float
) -> str:
    """One self-contained HTML page about a run.

    Args:
        name: of the experiment.
        run: its folder, with `metrics.jsonl` and `experiment.yaml`.
        samples: frames to show, with annotations where they have any.
        detections: per token, what is to be drawn.
        extent_m: half the side of the ground that is shown.
    """
    log = run / "metrics.jsonl"
    sections = [
        f"<h1>{html.escape(name)}</h1><p class=soft>{html.escape(run.name)}</p>",
        "<h2>Training</h2>",
        line_chart({"loss": read_curve(log, "loss")}, "step", "sum of all terms"),
        line_chart(
            {
                "seconds per step": read_curve(log, "seconds_per_step"),
                "of it waiting for data": read_curve(log, "data_seconds_per_step"),
            },
            "step",
            "time",
        ),
        "<h2>Detections</h2>",
    ]
    for sample in samples:
        layers = layers_of(sample, detections[sample.token])
        points = points_to_show(sample)
        sections.append(picture(camera_mosaic(sample, layers), f"{sample.scene}, sample {sample.token}"))
        sections.append(picture(bev_picture(points, layers, extent_m, 640), "from above"))
    settings = html.escape((run / "experiment.yaml").read_text())
    sections.append(
        f"<h2>Settings</h2><details><summary>experiment.yaml</summary><pre>{settings}</pre></details>"
    )
    return page(f"distillbev: {name}", sections)
