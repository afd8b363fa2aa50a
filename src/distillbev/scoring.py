"""Trained runs put to use: scored on a split, shown on single frames."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from .boxes import Boxes3D
from .data.samples import NuScenes
from .data.schema import Sample
from .errors import DataError
from .evaluation.diagnose import diagnose
from .evaluation.eval_boxes import ground_truth_boxes
from .evaluation.metrics import DetectionMetrics, compute_metrics, format_table, match_boxes
from .evaluation.results import CAMERA_ONLY, LIDAR_ONLY, read_results, write_detections
from .grid import BevGrid
from .train.experiment import Experiment
from .train.inference import detect, load_trained

RESULTS_FILE = "results_nusc.json"
METRICS_FILE = "metrics_summary.json"
SHOWN_SCORE = 0.3


@dataclass(frozen=True)
class Scored:
    """Metrics of one run on one split, and the table that is printed."""

    metrics: DetectionMetrics
    table: str


def evaluate_run(run: Path, data: Path, split: str, out: Path) -> Scored:
    """Detects on every sample of the split, writes the official results file and the metrics.

    Raises:
        RunError: the run is absent or unfinished. DataError: unknown split, or damaged data.
    """
    experiment, detector = load_trained(run, best_device())
    nuscenes = NuScenes(data)
    samples = annotated_samples(nuscenes, split)
    detections = detect(experiment, detector, nuscenes, [sample.token for sample in samples])
    out.mkdir(parents=True, exist_ok=True)
    meta = CAMERA_ONLY if experiment.student is not None else LIDAR_ONLY
    write_detections(out / RESULTS_FILE, detections, samples, meta)
    return score_results(out / RESULTS_FILE, experiment, samples, out)


def score_results(results: Path, experiment: Experiment, samples: list[Sample], out: Path) -> Scored:
    """Metrics of a results file on these samples; writes them beside it."""
    ground_truth = ground_truth_boxes(samples)
    boxes, _ = read_results(results, ground_truth)
    metrics = compute_metrics(match_boxes(ground_truth, boxes, experiment.evaluation))
    warnings = [finding.message for finding in diagnose(ground_truth, boxes, experiment.evaluation)]
    table = "\n".join([format_table(metrics), *warnings])
    (out / "table.txt").write_text(table + "\n")
    part = out / f".{METRICS_FILE}.part"
    part.write_text(json.dumps(metrics.to_dict(), indent=2))
    part.replace(out / METRICS_FILE)
    return Scored(metrics, table)


def annotated_samples(nuscenes: NuScenes, split: str) -> list[Sample]:
    """All samples of a split, with their annotations."""
    return [nuscenes.sample(token) for token in tokens_of(nuscenes, split)]


def tokens_of(nuscenes: NuScenes, split: str | None) -> list[str]:
    """The key frames of a split, of the whole dataset where None.

    Raises:
        DataError: there are none.
    """
    tokens = nuscenes.sample_tokens(split)
    if not tokens:
        where = nuscenes.folder if split is None else f"split {split!r} of {nuscenes.folder}"
        raise DataError(f"{where} has no samples, expected at least one; choose another split or dataset")
    return tokens


def spread_tokens(nuscenes: NuScenes, split: str | None, count: int) -> list[str]:
    """At most `count` key frames, evenly spread over a split."""
    tokens = tokens_of(nuscenes, split)
    count = min(count, len(tokens))
    return [tokens[i * len(tokens) // count] for i in range(count)]


def predict_sample(run: Path, data: Path, token: str | None, out: Path, threshold: float) -> list[Path]:
    """Detects on one key frame; writes the boxes as JSON and pictures of cameras and BEV.

    Ground truth, where the frame has any, is drawn beside the detections.
    """
    from .report.run_page import detection_pictures

    experiment, detector = load_trained(run, best_device())
    nuscenes = NuScenes(data)
    token = tokens_of(nuscenes, None)[0] if token is None else token
    found = detect(experiment, detector, nuscenes, [token], show_progress=False)[token]
    sample = nuscenes.sample(token)
    pictures = detection_pictures(sample, confident(found, threshold), out, extent_of(experiment))
    boxes_file = out / f"{token}.json"
    boxes_file.write_text(json.dumps(boxes_as_rows(found), indent=1))
    return [boxes_file, *pictures]


def boxes_as_rows(boxes: Boxes3D) -> list[dict[str, object]]:
    """Boxes as plain rows, in the LiDAR frame (metres, radians, m/s), best first."""
    from .boxes import BOX_FIELDS
    from .classes import CLASSES

    scores = boxes.scores if boxes.scores is not None else torch.ones(len(boxes))
    rows = [
        {"class": CLASSES[label], "score": round(score, 4)}
        | {name: round(value, 3) for name, value in zip(BOX_FIELDS, box, strict=True)}
        for box, label, score in zip(
            boxes.boxes.tolist(), boxes.labels.tolist(), scores.tolist(), strict=True
        )
    ]
    return sorted(rows, key=lambda row: -float(str(row["score"])))


def confident(boxes: Boxes3D, threshold: float) -> Boxes3D:
    """The detections with at least this score."""
    assert boxes.scores is not None, "detections carry scores"
    return boxes[boxes.scores >= threshold]


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def show_run(run: Path, data: Path, split: str, frames: int, page: Path) -> Path:
    """Writes one self-contained page about a run: settings, curves, detections beside the ground truth."""
    from .report.run_page import run_page

    experiment, detector = load_trained(run, best_device())
    nuscenes = NuScenes(data)
    chosen = spread_tokens(nuscenes, split, frames)
    found = detect(experiment, detector, nuscenes, chosen)
    detections = {token: confident(boxes, SHOWN_SCORE) for token, boxes in found.items()}
    samples = [nuscenes.sample(token) for token in chosen]
    content = run_page(experiment.name, run, samples, detections, extent_of(experiment))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(content)
    return page


def extent_of(experiment: Experiment) -> float:
    """Half the side of the ground that the detector sees."""
    grid = experiment.student.grid if experiment.student is not None else None
    grid = grid or (experiment.teacher.grid if experiment.teacher is not None else BevGrid())
    return max(abs(edge) for edge in (*grid.x_range_m, *grid.y_range_m))
