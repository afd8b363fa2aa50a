"""Detectors put to use: scored on a split, compared, shown on single frames."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from .boxes import Boxes3D
from .config import with_overrides
from .data.findings import Finding
from .data.samples import NuScenes
from .data.schema import Sample
from .errors import DataError
from .evaluation.check import check_results
from .evaluation.compare import compare
from .evaluation.diagnose import diagnose
from .evaluation.eval_boxes import ground_truth_boxes
from .evaluation.metrics import (
    DetectionEvalConfig,
    DetectionMetrics,
    compute_metrics,
    format_table,
    match_boxes,
)
from .evaluation.results import CAMERA_ONLY, LIDAR_ONLY, merge_results, read_results, write_detections
from .grid import BevGrid
from .train.distributed import ending_together, join_processes, wait_for_all
from .train.experiment import Experiment
from .train.inference import detect, detect_batches, finished_weights, load_trained, read_run

RESULTS_FILE = "results_nusc.json"
METRICS_FILE = "metrics_summary.json"
PARTS_FOLDER = ".parts"  # of the results, while processes detect
SHOWN_SCORE = 0.3


@dataclass(frozen=True)
class Scored:
    """Metrics of one run on one split, and the table that is printed."""

    metrics: DetectionMetrics
    table: str


def evaluate_run(run: Path, data: Path, split: str, out: Path) -> Scored | None:
    """Detects on every sample of the split, writes the official results file and the metrics.

    Where `torchrun` started several processes, they share the samples, and the first one scores; the others
    give None. Results and metrics are those of a single process, to the last digit.

    Raises:
        RunError: the run is absent or unfinished, or a process was lost. DataError: unknown split, or damaged
            data.
    """
    rank, world_size, device = join_processes()
    with ending_together(run.name):
        experiment, detector = load_trained(run, device)
        nuscenes = NuScenes(data)
        tokens = tokens_of(nuscenes, split)
        # Damaged labels are told before hours of detecting.
        truth = annotated_samples(nuscenes, split) if rank == 0 else []
        meta = CAMERA_ONLY if experiment.student is not None else LIDAR_ONLY
        found = detect_batches(
            experiment,
            detector,
            nuscenes,
            tokens,
            rank=rank,
            world_size=world_size,
            show_progress=rank == 0,
        )
        with shared_parts(out, rank) as parts:
            # Written down batch by batch: no process ever holds the detections of the whole split.
            for number, detections in enumerate(found):
                samples = [nuscenes.sample(token, read_annotations=False) for token in detections]
                part = parts / f"{number * world_size + rank:08d}.json"
                write_detections(part, detections, samples, meta)
            wait_for_all()
            if rank != 0:
                return None
            merge_results(sorted(parts.iterdir()), out / RESULTS_FILE)
        return score_results(out / RESULTS_FILE, experiment.evaluation, truth, out)


@contextmanager
def shared_parts(out: Path, rank: int) -> Iterator[Path]:
    """The folder of all processes' parts of a result; whatever happens, it is gone afterwards."""
    parts = out / PARTS_FOLDER
    if rank == 0:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
    wait_for_all()
    try:
        yield parts
    finally:
        if rank == 0:
            shutil.rmtree(parts, ignore_errors=True)
            with suppress(OSError):  # holds results
                out.rmdir()


def evaluate_file(results: Path, data: Path, split: str, out: Path, overrides: Sequence[str] = ()) -> Scored:
    """Scores the official results file of any detector; writes the metrics to `out`.

    Args:
        overrides: changes of the official settings, as max_range_m=40.

    Raises:
        DataError: the file is no results file, or holds other samples than the split.
    """
    config = with_overrides(DetectionEvalConfig(), overrides)
    return score_results(results, config, annotated_samples(NuScenes(data), split), out)


def check_file(results: Path, data: Path, split: str) -> list[Finding]:
    """Lists all faults of a results file; the split needs no annotations."""
    return check_results(results, tokens_of(NuScenes(data), split))


def score_results(results: Path, config: DetectionEvalConfig, samples: list[Sample], out: Path) -> Scored:
    """Metrics of a results file on these samples, written to `out`."""
    ground_truth = ground_truth_boxes(samples)
    boxes, _ = read_results(results, ground_truth)
    metrics = compute_metrics(match_boxes(ground_truth, boxes, config))
    warnings = [finding.message for finding in diagnose(ground_truth, boxes, config)]
    table = "\n".join([format_table(metrics), *warnings])
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.txt").write_text(table + "\n")
    _write_whole(out / METRICS_FILE, json.dumps(metrics.to_dict(), indent=2).encode())
    return Scored(metrics, table)


def compare_results(
    first: Path,
    second: Path,
    data: Path,
    split: str,
    out: Path,
    frames: int = 6,
    repeats: int = 1000,
    overrides: Sequence[str] = (),
) -> str:
    """Compares two results files or runs; writes `comparison.html`, `comparison.json` and `table.txt`.

    A run without results of this split is evaluated first. Runs bring the settings that they are scored with.

    Args:
        frames: how many frames to show, of those that differ most.
        repeats: draws of scenes for the intervals.
        overrides: changes of the evaluation's settings, as max_range_m=40.

    Returns:
        the table.

    Raises:
        DataError: a file is absent or no results file of this split, or the runs are scored with unlike
            settings. RunError: a folder is no finished run.
    """
    from .report.comparison import comparison_page, comparison_text, comparison_values

    experiments = [read_run(source) for source in (first, second) if source.is_dir()]
    if len({msgspec.json.encode(experiment.evaluation) for experiment in experiments}) > 1:
        raise DataError(
            f"{first} and {second} are scored with unlike settings (`evaluation` in their experiment.yaml); "
            "compare their results files, and give the settings by --set"
        )
    config = experiments[0].evaluation if experiments else DetectionEvalConfig()
    config = with_overrides(config, overrides)
    files = [_results_of(source, data, split) for source in (first, second)]
    nuscenes = NuScenes(data)
    ground_truth = ground_truth_boxes(annotated_samples(nuscenes, split))
    boxes = [read_results(file, ground_truth)[0] for file in files]
    comparison = compare(ground_truth, boxes[0], boxes[1], config, repeats)
    names = (str(first), str(second))
    text = comparison_text(comparison, names)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.txt").write_text(text + "\n")
    _write_whole(out / "comparison.json", msgspec.json.encode(comparison_values(comparison, names)))
    samples = [nuscenes.sample(frame.token) for frame in comparison.most_different_frames(frames)]
    extent_m = min([float(config.ranges_m().max()), *map(extent_of, experiments)])
    page = comparison_page(comparison, names, samples, extent_m)
    _write_whole(out / "comparison.html", page.encode())
    return text


def _results_of(source: Path, data: Path, split: str) -> Path:
    """The results file that a path means: itself, or that of a run, written now if it is not there yet."""
    if not source.is_dir():
        return source
    out = source / f"evaluation-{split}"
    results = out / RESULTS_FILE
    if not results.exists() or results.stat().st_mtime < finished_weights(source).stat().st_mtime:
        evaluate_run(source, data, split, out)
    return results


def _write_whole(path: Path, content: bytes) -> None:
    """Writes beside the place and renames, so that a reader never meets half a file."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


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
