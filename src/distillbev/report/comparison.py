"""A comparison of two detectors as text, as plain values, and as a page with the frames that differ most."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from ..boxes import Boxes3D, transform_boxes
from ..classes import CLASSES
from ..data.points import load_points
from ..data.schema import Sample
from ..evaluation.compare import Comparison, Difference, Group, Side, found_boxes
from ..evaluation.eval_boxes import EvalBoxes
from ..geometry import invert_rigid
from .camera_views import camera_mosaic
from .page import interval_chart, page, picture, table
from .paint import BoxLayer
from .top_view import bev_picture

FIRST, SECOND = (255, 176, 0), (92, 168, 255)
FOUND, MISSED = (80, 220, 120), (255, 82, 96)
MOSAIC_TILE_PX, BEV_PX = 480, 620
LETTERS = ("A", "B")


def comparison_text(comparison: Comparison, names: tuple[str, str]) -> str:
    """The tables as plain text, with what looks wrong about each detector below."""
    tables = _tables(comparison)
    wide = max(len(title) for rows in tables.values() for title, _ in rows) + 2
    lines = [f"{letter}: {name}" for letter, name in zip(LETTERS, names, strict=True)]
    for rows in tables.values():
        lines += ["", f"{'':<{wide}}{'A':>8}{'B':>9}{'B - A':>10}   95 % over scenes"]
        for title, difference in rows:
            numbers = f"{difference.first:>8.4f}{difference.second:>9.4f}{difference.value:>+10.4f}"
            lines.append(f"{title:<{wide}}{numbers}   {_interval(difference)}".rstrip())
    return "\n".join([*lines, *_warnings(comparison)])


def comparison_values(comparison: Comparison, names: tuple[str, str]) -> dict[str, object]:
    """Everything as plain values; encoded by msgspec, what is not finite becomes null."""
    values: dict[str, object] = {}
    for key, name, side in zip(
        ("first", "second"), names, (comparison.first, comparison.second), strict=True
    ):
        values[key] = {
            "name": name,
            "metrics": side.metrics.to_dict(),
            "operating_score": side.operating_score,
            "diagnosis": [finding.message for finding in side.findings],
        }
    values["headline"] = {name: _values(value) for name, value in comparison.headline.items()}
    values["class_ap"] = {name: _values(value) for name, value in comparison.class_ap.items()}
    values["groups"] = [
        {
            "aspect": group.aspect,
            "name": group.name,
            "boxes": group.num_boxes,
            "mAP": None if group.mean_ap is None else _values(group.mean_ap),
            "found": _values(group.found),
        }
        for group in comparison.groups
    ]
    values["frames"] = [
        {
            "token": frame.token,
            "scene": frame.scene,
            "mistakes": [frame.first_mistakes, frame.second_mistakes],
        }
        for frame in comparison.most_different_frames(len(comparison.frames))
    ]
    return values


def comparison_page(
    comparison: Comparison, names: tuple[str, str], samples: Sequence[Sample], extent_m: float
) -> str:
    """One self-contained HTML page.

    Args:
        samples: the frames to show, best those of `most_different_frames`.
        extent_m: half the side of the ground that is shown.

    Raises:
        DataError: an image or point file of a frame is absent or damaged.
    """
    metrics = comparison.first.metrics.config
    sections = [
        "<h1>Two detectors compared</h1>",
        f"<p>A is <b>{html.escape(names[0])}</b>, B is <b>{html.escape(names[1])}</b>, scored on "
        f"{len(comparison.frames)} frames of {len(set(comparison.first.paired.scenes))} scenes. Intervals: "
        "95 % of the differences when the scenes are drawn anew, the same for both.</p>",
        "".join(f"<p><b>{html.escape(warning)}</b></p>" for warning in _warnings(comparison)),
        _chart(comparison),
    ]
    for title, rows in _tables(comparison).items():
        cells = [
            [
                html.escape(name),
                f"{difference.first:.4f}",
                f"{difference.second:.4f}",
                f"{difference.value:+.4f}",
                _interval(difference),
            ]
            for name, difference in rows
        ]
        sections.append(f"<h2>{title}</h2>")
        sections.append(table(("", "A", "B", "B - A", "95 % over scenes"), cells))
    scores = " and ".join(
        f"{side.operating_score:.2f} ({letter})"
        for letter, side in zip(LETTERS, _sides(comparison), strict=True)
    )
    sections.append(
        f"<p class=soft>Found: within {metrics.dist_th_tp_m:g} m of a detection with a score of at least "
        f"{scores}, where each has its best F1. Mean AP of a group: over the classes in it; detections that "
        "took a box of another group are left out. In brackets: annotated boxes.</p>"
    )
    if samples:
        sections.append(
            "<h2>Frames that differ most</h2><p class=soft>By missed boxes and false detections, at the scores "
            "above. Boxes that do not count (too far, without points) are not shown.</p>"
        )
    by_token = {frame.token: frame for frame in comparison.frames}
    for sample in samples:
        frame = by_token[sample.token]
        told = (
            f"{sample.scene}, sample {sample.token}: {frame.first_mistakes} mistakes of A, "
            f"{frame.second_mistakes} of B"
        )
        mosaic, *views = frame_pictures(comparison, sample, extent_m)
        sections.append(picture(mosaic, told))
        figures = "".join(
            picture(view, f"{letter}: {name}")
            for letter, name, view in zip(LETTERS, names, views, strict=True)
        )
        sections.append(f"<div class=row>{figures}</div>")
    return page(f"distillbev: {names[0]} and {names[1]}", sections)


def frame_pictures(comparison: Comparison, sample: Sample, extent_m: float) -> list[Image.Image]:
    """The cameras with ground truth and both detectors; from above, ground truth and one detector each."""
    shown = [
        BoxLayer(_of_sample(_sure(side), sample), letter, colour)
        for letter, colour, side in zip(LETTERS, (FIRST, SECOND), _sides(comparison), strict=True)
    ]
    truth = BoxLayer(_of_sample(comparison.first.paired.truth, sample, scored=False), "ground truth", FOUND)
    # Equally opaque: the operating scores have chosen already.
    flat = [replace(layer, boxes=replace(layer.boxes, scores=None)) for layer in shown]
    pictures = [camera_mosaic(sample, [truth, *flat], tile_width_px=MOSAIC_TILE_PX)]
    points = load_points(sample) if sample.sweeps else None
    for side, layer in zip(_sides(comparison), shown, strict=True):
        found = np.isin(np.arange(len(side.paired.truth)), found_boxes(side.paired, side.operating_score))
        layers = [
            BoxLayer(_of_sample(side.paired.truth[found], sample, scored=False), "found", FOUND),
            BoxLayer(_of_sample(side.paired.truth[~found], sample, scored=False), "missed", MISSED),
            layer,
        ]
        pictures.append(bev_picture(points, layers, extent_m, BEV_PX))
    return pictures


def _of_sample(boxes: EvalBoxes, sample: Sample, scored: bool = True) -> Boxes3D:
    """The boxes of one sample, from the global frame to its LiDAR frame."""
    chosen = boxes[boxes.sample_index == boxes.tokens.index(sample.token)]
    size_lwh_m, yaw_rad = chosen.size_wlh_m[:, [1, 0, 2]], chosen.yaw_rad()[:, None]
    rows = np.concatenate([chosen.centre_m, size_lwh_m, yaw_rad, chosen.velocity_m_s], axis=1)
    scores = torch.from_numpy(chosen.scores.clip(0, 1)) if scored else None
    moved = transform_boxes(invert_rigid(sample.lidar2global), rows)
    return Boxes3D(torch.from_numpy(moved), torch.from_numpy(chosen.labels), scores)


def _sure(side: Side) -> EvalBoxes:
    return side.paired.detections[side.paired.detections.scores >= side.operating_score]


def _sides(comparison: Comparison) -> tuple[Side, Side]:
    return comparison.first, comparison.second


def _warnings(comparison: Comparison) -> list[str]:
    return [
        f"{letter}: {finding.message}"
        for letter, side in zip(LETTERS, _sides(comparison), strict=True)
        for finding in side.findings
    ]


def _tables(comparison: Comparison) -> dict[str, list[tuple[str, Difference]]]:
    """Title -> rows of name and difference."""

    def of_groups(kind: str) -> Iterator[tuple[str, Difference]]:
        for group in comparison.groups:
            difference = group.mean_ap if kind == "mAP" else group.found
            if difference is not None:
                yield f"{kind}, {_title(group)}", difference

    return {
        "All classes": list(comparison.headline.items()),
        "Average precision by class": [(name, comparison.class_ap[name]) for name in CLASSES],
        "Average precision by distance and size": list(of_groups("mAP")),
        "Boxes found by distance, size and visibility": list(of_groups("found")),
    }


def _title(group: Group) -> str:
    return f"{group.aspect} {group.name} ({group.num_boxes})"


def _chart(comparison: Comparison) -> str:
    """B - A of mAP and of each class's AP."""
    rows = []
    for name, difference in (("mAP", comparison.headline["mAP"]), *comparison.class_ap.items()):
        interval = difference.interval
        low, high = (interval.low, interval.high) if interval else (difference.value, difference.value)
        rows.append((name, difference.value, (low, high), ()))
    return interval_chart(rows, {}, "average precision, B - A")


def _interval(difference: Difference) -> str:
    interval = difference.interval
    return "" if interval is None else f"{interval.low:+.4f} to {interval.high:+.4f}"


def _values(difference: Difference) -> dict[str, object]:
    interval = difference.interval
    return {
        "first": difference.first,
        "second": difference.second,
        "difference": difference.value,
        "interval": interval and {"level": interval.level, "low": interval.low, "high": interval.high},
    }
