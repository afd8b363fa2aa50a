"""Two detectors side by side on the same samples: what differs, where, and how sure that is.

Differences are second - first; their intervals come from scenes drawn again and again, the same for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..geometry import Array
from .bootstrap import Interval, draw_scenes, paired_bootstrap, scene_indices, weighted_ap
from .diagnose import Finding, diagnose
from .eval_boxes import EvalBoxes, GroundTruth
from .matching import UNMATCHED
from .metrics import (
    DetectionEvalConfig,
    DetectionMetrics,
    Matches,
    PairedBoxes,
    compute_metrics,
    gather_matches,
    pair_boxes,
)

Aspect = Literal["distance", "visibility", "size"]

DISTANCE_EDGES_M = (0.0, 10.0, 20.0, 30.0, 40.0, 50.0, np.inf)
SIZE_EDGES_M = (0.0, 1.0, 3.0, 6.0, np.inf)  # of the longer side of the footprint
VISIBILITIES = {1: "up to 40 %", 2: "40 to 60 %", 3: "60 to 80 %", 4: "over 80 %", 0: "unknown"}
ERROR_NAMES = {
    "trans_err": "mATE",
    "scale_err": "mASE",
    "orient_err": "mAOE",
    "vel_err": "mAVE",
    "attr_err": "mAAE",
}


@dataclass(frozen=True)
class Difference:
    """One number of both; `interval` of second - first, None where it cannot be told (a single scene)."""

    first: float
    second: float
    interval: Interval | None

    @property
    def value(self) -> float:
        return self.second - self.first


@dataclass(frozen=True)
class Group:
    """The annotated boxes of one range of distance, visibility or size.

    Attributes:
        mean_ap: over the classes that occur in the group. Detections that took a box outside of it are left
            out; false ones count by their own distance or size. They have no visibility: None there.
        found: share of the boxes with a detection within `dist_th_tp_m`, at each detector's operating score.
    """

    aspect: Aspect
    name: str
    num_boxes: int
    mean_ap: Difference | None
    found: Difference


@dataclass(frozen=True)
class FrameDifference:
    """Mistakes (missed boxes and false detections at the operating score) of both in one sample."""

    token: str
    scene: str
    first_mistakes: int
    second_mistakes: int

    @property
    def value(self) -> int:
        return self.second_mistakes - self.first_mistakes


@dataclass(frozen=True)
class Side:
    """One of the two detectors.

    `operating_score` is the one with the best F1 over all boxes and classes, so that detectors which are sure
    and unsure by habit are looked at alike; infinite where nothing is found.
    """

    metrics: DetectionMetrics
    findings: tuple[Finding, ...]
    operating_score: float
    paired: PairedBoxes
    matches: Matches


@dataclass(frozen=True)
class Comparison:
    """Everything that two detectors differ in; `frames` in the order of the samples."""

    first: Side
    second: Side
    headline: dict[str, Difference]
    class_ap: dict[str, Difference]
    groups: tuple[Group, ...]
    frames: tuple[FrameDifference, ...]

    def most_different_frames(self, count: int) -> list[FrameDifference]:
        """At most `count` frames with unequal numbers of mistakes, the most unequal first."""
        unequal = [frame for frame in self.frames if frame.value]
        return sorted(unequal, key=lambda frame: -abs(frame.value))[:count]


def compare(
    ground_truth: GroundTruth,
    first: EvalBoxes,
    second: EvalBoxes,
    config: DetectionEvalConfig | None = None,
    repeats: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Scores both against the same ground truth, and their differences.

    Args:
        repeats, seed: of the draws of scenes; with one scene there are no intervals.

    Raises:
        DataError: the samples differ, or a sample holds more boxes than allowed.
        ConfigError: fewer than one repeat.
    """
    config = config or DetectionEvalConfig()
    sides = [_side(ground_truth, boxes, config) for boxes in (first, second)]
    single_scene = len(set(ground_truth.scenes)) < 2
    times = None if single_scene else draw_scenes(sides[0].paired, repeats, seed)
    return Comparison(
        first=sides[0],
        second=sides[1],
        **_whole_set(sides, None if single_scene else repeats, seed),
        groups=_groups(ground_truth.visibility[sides[0].paired.truth_rows], sides, times),
        frames=_frames(sides),
    )


def operating_score(paired: PairedBoxes) -> float:
    """The score from which on detections have the best F1, over all classes at `dist_th_tp_m`."""
    is_match = _taken(paired)[paired.order] != UNMATCHED
    if not is_match.any():
        return np.inf
    scores = paired.detections.scores[paired.order]
    f1 = 2 * np.cumsum(is_match) / (paired.counted.sum() + np.arange(1, len(scores) + 1))
    whole = np.append(scores[1:] != scores[:-1], True)  # equal scores are taken all or not at all
    return float(scores[np.argmax(np.where(whole, f1, 0))])


def _side(ground_truth: GroundTruth, boxes: EvalBoxes, config: DetectionEvalConfig) -> Side:
    paired = pair_boxes(ground_truth, boxes, config)
    matches = gather_matches(paired)
    findings = diagnose(ground_truth, boxes, config)
    return Side(compute_metrics(matches), findings, operating_score(paired), paired, matches)


def _whole_set(sides: Sequence[Side], repeats: int | None, seed: int) -> dict[str, dict[str, Difference]]:
    first, second = (side.metrics for side in sides)
    values = [
        {"mAP": metrics.mean_ap, "NDS": metrics.nds}
        | {ERROR_NAMES[name]: value for name, value in metrics.mean_errors.items()}
        for metrics in (first, second)
    ]
    intervals: dict[str, Interval] = {}
    class_intervals: dict[str, Interval] = {}
    if repeats is not None:
        drawn = paired_bootstrap(sides[0].matches, sides[1].matches, repeats, seed)
        intervals = {"mAP": drawn.mean_ap, "NDS": drawn.nds}
        intervals |= {ERROR_NAMES[name]: interval for name, interval in drawn.mean_errors.items()}
        class_intervals = drawn.class_ap
    return {
        "headline": {
            name: Difference(value, values[1][name], intervals.get(name)) for name, value in values[0].items()
        },
        "class_ap": {
            name: Difference(value, second.class_ap[name], class_intervals.get(name))
            for name, value in first.class_ap.items()
        },
    }


def _groups(
    visibility: NDArray[np.int64], sides: Sequence[Side], times: NDArray[np.int64] | None
) -> tuple[Group, ...]:
    """The groups in which there are annotated boxes."""
    groups = []
    for aspect, name, inside, false_inside in _parts(visibility, *(side.paired for side in sides)):
        if not inside.any():
            continue
        mean_ap = None
        if false_inside is not None:
            mean_ap = _difference(
                *(_mean_ap(s.paired, inside, f, times) for s, f in zip(sides, false_inside, strict=True))
            )
        found = _difference(*(_share_found(s.paired, inside, s.operating_score, times) for s in sides))
        groups.append(Group(aspect, name, int(inside.sum()), mean_ap, found))
    return tuple(groups)


def _parts(
    visibility: NDArray[np.int64], first: PairedBoxes, second: PairedBoxes
) -> Iterator[tuple[Aspect, str, NDArray[np.bool_], list[NDArray[np.bool_]] | None]]:
    """Aspect, name, annotated boxes inside, and per detector the detections inside (None: not known)."""
    all_boxes = (first.truth, first.detections, second.detections)
    distances = [boxes.ego_distance_m for boxes in all_boxes]
    sizes = [boxes.size_wlh_m[:, :2].max(axis=1) for boxes in all_boxes]
    ranges: tuple[tuple[Aspect, tuple[float, ...], list[Array]], ...] = (
        ("distance", DISTANCE_EDGES_M, distances),
        ("size", SIZE_EDGES_M, sizes),
    )
    for aspect, edges, values in ranges:
        for low, high in pairwise(edges):
            name = f"{low:.0f} to {high:.0f} m" if np.isfinite(high) else f"over {low:.0f} m"
            inside, *found_inside = ((low <= value) & (value < high) for value in values)
            yield aspect, name, inside, found_inside
    for level, name in VISIBILITIES.items():
        yield "visibility", name, visibility == level, None


def _mean_ap(
    paired: PairedBoxes,
    inside: NDArray[np.bool_],
    false_inside: NDArray[np.bool_],
    times: NDArray[np.int64] | None,
) -> Array:
    """(1 + repeats,) mAP over the classes of the group; the first one on the whole set."""
    scenes = len(set(paired.scenes))
    times = np.concatenate([np.ones((1, scenes), dtype=np.int64), *([] if times is None else [times])])
    classes = np.unique(paired.truth.labels[inside])
    parts = [
        weighted_ap(gather_matches(paired.part(threshold, inside, false_inside)), times)[:, classes, 0]
        for threshold in paired.config.dist_ths_m
    ]
    return np.mean(parts, axis=(0, 2))


def _share_found(
    paired: PairedBoxes, inside: NDArray[np.bool_], score: float, times: NDArray[np.int64] | None
) -> Array:
    """(1 + repeats,) share of the group's boxes that were found; NaN in a draw without such boxes."""
    found = np.zeros(len(paired.truth), dtype=bool)
    found[found_boxes(paired, score)] = True
    scene = scene_indices(paired)[paired.truth.sample_index]
    count = len(set(paired.scenes))
    boxes, hits = (np.bincount(scene[chosen], minlength=count) for chosen in (inside, inside & found))
    shares = [hits.sum() / boxes.sum()]
    if times is not None:
        in_draw = times @ boxes
        shares += np.where(in_draw > 0, times @ hits / np.maximum(in_draw, 1), np.nan).tolist()
    return np.array(shares)


def found_boxes(paired: PairedBoxes, score: float) -> NDArray[np.int64]:
    """Rows of the `truth` that a detection of at least this score takes, at `dist_th_tp_m`."""
    taken = _taken(paired)
    return taken[(taken != UNMATCHED) & (paired.detections.scores >= score)]


def _taken(paired: PairedBoxes) -> NDArray[np.int64]:
    """(n,) the box that each detection takes at the threshold for true positives."""
    return paired.taken[paired.config.dist_ths_m.index(paired.config.dist_th_tp_m)]


def _difference(first: Array, second: Array) -> Difference:
    interval = Interval.of(second - first, 0.95) if len(first) > 1 else None
    return Difference(float(first[0]), float(second[0]), interval)


def _frames(sides: Sequence[Side]) -> tuple[FrameDifference, ...]:
    paired = sides[0].paired
    tokens = paired.truth.tokens
    boxes = np.bincount(paired.truth.sample_index, minlength=len(tokens))
    mistakes = []
    for side in sides:
        sure = side.paired.detections.scores >= side.operating_score
        shown = np.bincount(side.paired.detections.sample_index[sure], minlength=len(tokens))
        found = found_boxes(side.paired, side.operating_score)
        hits = np.bincount(paired.truth.sample_index[found], minlength=len(tokens))
        mistakes.append((boxes + shown - 2 * hits).tolist())
    return tuple(
        FrameDifference(token, scene, first, second)
        for token, scene, first, second in zip(tokens, paired.scenes, *mistakes, strict=True)
    )
