"""The nuScenes detection metrics: average precision, true-positive errors, detection score.

Source: nuScenes (arXiv:1903.11027), section 3.1, and the detection task's definition; every number and curve
equals the official devkit's (tests/evaluation/test_against_devkit.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..classes import CLASSES
from ..config import Config
from ..errors import ConfigError, DataError
from ..geometry import Array
from .eval_boxes import (
    NO_ATTRIBUTE,
    EvalBoxes,
    GroundTruth,
    detected_boxes,
    ground_truth_boxes,
    yaw_of_quaternion,
)
from .matching import UNMATCHED, match, order_by_score

if TYPE_CHECKING:
    from ..boxes import Boxes3D
    from ..data.schema import Sample

ERRORS = ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")
# Errors that are not defined for a class: cones look alike from all sides, neither moves.
UNDEFINED_ERRORS = {"traffic_cone": ("orient_err", "vel_err", "attr_err"), "barrier": ("vel_err", "attr_err")}
OFFICIAL_RANGES_M = {
    "car": 50.0,
    "truck": 50.0,
    "bus": 50.0,
    "trailer": 50.0,
    "construction_vehicle": 50.0,
    "pedestrian": 40.0,
    "motorcycle": 40.0,
    "bicycle": 40.0,
    "traffic_cone": 30.0,
    "barrier": 30.0,
}
RECALLS = np.linspace(0, 1, 101)


class DetectionEvalConfig(Config, frozen=True):
    """Settings of the evaluation; the defaults are the official ones (detection_cvpr_2019)."""

    class_range_m: dict[str, float] = msgspec.field(default_factory=lambda: dict(OFFICIAL_RANGES_M))
    max_range_m: float | None = None  # caps every class range, for worlds or grids smaller than 50 m
    dist_ths_m: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    dist_th_tp_m: float = 2.0
    min_recall: float = 0.1
    min_precision: float = 0.1
    max_boxes_per_sample: int = 500
    mean_ap_weight: float = 5.0

    def __post_init__(self) -> None:
        if set(self.class_range_m) != set(CLASSES):
            odd = sorted(set(self.class_range_m) ^ set(CLASSES))
            raise ConfigError(
                f"class_range_m: missing or unknown classes {odd}; give a range for each of {CLASSES}"
            )
        if self.dist_th_tp_m not in self.dist_ths_m:
            raise ConfigError(
                f"dist_th_tp_m={self.dist_th_tp_m} is none of dist_ths_m={self.dist_ths_m}; choose one"
            )
        if not (0 <= self.min_recall < 1 and 0 <= self.min_precision < 1):
            raise ConfigError(
                f"min_recall={self.min_recall}, min_precision={self.min_precision}; choose both in [0, 1)"
            )
        if self.max_range_m is not None and self.max_range_m <= 0:
            raise ConfigError(
                f"max_range_m={self.max_range_m} leaves nothing; choose metres above 0, or None"
            )

    def ranges_m(self) -> Array:
        """(C,) evaluated distance of each class."""
        ranges = np.array([self.class_range_m[name] for name in CLASSES], dtype=np.float64)
        return ranges if self.max_range_m is None else np.minimum(ranges, self.max_range_m)


@dataclass(frozen=True)
class ClassMatches:
    """What is left of one class once boxes are matched: all that metrics and resampling need.

    n detections by falling score, D thresholds, M_d matches at threshold d, S samples.

    Attributes:
        scores: (n,) falling.
        sample_index: (n,).
        is_match: (D, n).
        errors: per threshold (5, M_d), rows as ERRORS, columns by falling score; NaN where undefined.
        positives: (S,) ground-truth boxes in each sample.
    """

    scores: Array
    sample_index: NDArray[np.int64]
    is_match: NDArray[np.bool_]
    errors: tuple[Array, ...]
    positives: NDArray[np.int64]


@dataclass(frozen=True)
class Matches:
    """Matched detections of a set of samples: per class of CLASSES, with the scene of each sample."""

    config: DetectionEvalConfig
    tokens: tuple[str, ...]
    scenes: tuple[str, ...]
    classes: tuple[ClassMatches, ...]


@dataclass(frozen=True)
class Curve:
    """One class at one threshold, at RECALLS: precision and confidence (101,), errors (5, 101) as ERRORS."""

    precision: Array
    confidence: Array
    errors: Array

    @property
    def last_index(self) -> int:
        """Index into RECALLS of the highest recall reached; 0 when there was no match."""
        reached = np.flatnonzero(self.confidence)
        return int(reached[-1]) if len(reached) else 0


@dataclass(frozen=True)
class DetectionMetrics:
    """The numbers of the nuScenes detection task.

    C classes as CLASSES, D distance thresholds.

    Attributes:
        ap: (C, D) average precision.
        tp_errors: (C, 5) as ERRORS, at the threshold for true positives; NaN where a class has no such error.
        curves: per class, per threshold; empty for resampled metrics.
    """

    config: DetectionEvalConfig
    ap: Array
    tp_errors: Array
    curves: tuple[tuple[Curve, ...], ...] = ()

    @property
    def class_ap(self) -> dict[str, float]:
        """Average precision per class, mean over the thresholds."""
        return dict(zip(CLASSES, self.ap.mean(axis=1).tolist(), strict=True))

    @property
    def mean_ap(self) -> float:
        return float(self.ap.mean(axis=1).mean())

    @property
    def mean_errors(self) -> dict[str, float]:
        """Mean of each error over the classes that have it (mATE, mASE, mAOE, mAVE, mAAE)."""
        return dict(zip(ERRORS, np.nanmean(self.tp_errors, axis=0).tolist(), strict=True))

    @property
    def nds(self) -> float:
        """nuScenes detection score: mAP and the five errors, turned to scores in [0, 1], weighed together."""
        scores = [max(0.0, 1.0 - error) for error in self.mean_errors.values()]
        weight = self.config.mean_ap_weight
        return (weight * self.mean_ap + sum(scores)) / (weight + len(scores))

    def to_dict(self) -> dict[str, object]:
        """Laid out as the official metrics_summary.json."""
        errors = self.mean_errors
        return {
            "label_aps": {
                name: {str(t): float(ap) for t, ap in zip(self.config.dist_ths_m, row, strict=True)}
                for name, row in zip(CLASSES, self.ap, strict=True)
            },
            "mean_dist_aps": self.class_ap,
            "mean_ap": self.mean_ap,
            "label_tp_errors": {
                name: dict(zip(ERRORS, row.tolist(), strict=True))
                for name, row in zip(CLASSES, self.tp_errors, strict=True)
            },
            "tp_errors": errors,
            "tp_scores": {name: max(0.0, 1.0 - error) for name, error in errors.items()},
            "nd_score": self.nds,
        }


def evaluate(
    ground_truth: GroundTruth, detections: EvalBoxes, config: DetectionEvalConfig | None = None
) -> DetectionMetrics:
    """Evaluates detections against the ground truth of the same samples.

    Raises:
        DataError: the samples differ, or a sample holds more boxes than allowed.
    """
    return compute_metrics(match_boxes(ground_truth, detections, config or DetectionEvalConfig()))


def evaluate_samples(
    samples: Sequence[Sample], detections: Mapping[str, Boxes3D], config: DetectionEvalConfig | None = None
) -> DetectionMetrics:
    """`evaluate` on annotated samples and, per token, detections in the LiDAR frame of the key frame."""
    return evaluate(ground_truth_boxes(samples), detected_boxes(detections, samples), config)


def match_boxes(ground_truth: GroundTruth, detections: EvalBoxes, config: DetectionEvalConfig) -> Matches:
    """Filters both sides and matches them; the costly part of the evaluation, done once.

    Raises:
        DataError: the samples differ, or a sample holds more boxes than allowed.
    """
    return gather_matches(pair_boxes(ground_truth, detections, config))


@dataclass(frozen=True)
class PairedBoxes:
    """Which detection took which annotated box, T boxes and n detections being left after the filters.

    Attributes:
        scenes: (S) name of each sample's scene.
        truth: the annotated boxes, T of them.
        truth_rows: (T,) their rows in the ground truth as it was given.
        detections: n of them.
        order: rows of the detections that count, by falling score.
        taken: (D, n) row of the box that each detection takes, or UNMATCHED.
        counted: (T,) the annotated boxes that count.
    """

    config: DetectionEvalConfig
    scenes: tuple[str, ...]
    truth: EvalBoxes
    truth_rows: NDArray[np.int64]
    detections: EvalBoxes
    order: NDArray[np.int64]
    taken: NDArray[np.int64]
    counted: NDArray[np.bool_]

    def part(
        self, threshold_m: float, truth_inside: NDArray[np.bool_], found_inside: NDArray[np.bool_]
    ) -> PairedBoxes:
        """Some of the boxes at one threshold: what took another box is left out, be it right or wrong.

        Args:
            truth_inside: (T,) the boxes to count.
            found_inside: (n,) the detections that count as false ones if they took no box.
        """
        taken = self.taken[[self.config.dist_ths_m.index(threshold_m)]]
        inside = np.where(taken[0] == UNMATCHED, found_inside, np.append(truth_inside, False)[taken[0]])
        config = msgspec.structs.replace(self.config, dist_ths_m=(threshold_m,), dist_th_tp_m=threshold_m)
        order = self.order[inside[self.order]]
        return replace(self, config=config, order=order, taken=taken, counted=truth_inside)


def pair_boxes(ground_truth: GroundTruth, detections: EvalBoxes, config: DetectionEvalConfig) -> PairedBoxes:
    """Filters both sides and pairs them at every threshold.

    Raises:
        DataError: the samples differ, or a sample holds more boxes than allowed.
    """
    if detections.tokens != ground_truth.boxes.tokens:
        raise DataError(
            "detections and ground truth differ in their samples or the order of these; "
            "build both from the same samples"
        )
    check_box_counts(detections, config.max_boxes_per_sample)
    truth_rows = np.flatnonzero(counted_boxes(ground_truth.boxes, ground_truth.racks, config))
    truth = ground_truth.boxes[truth_rows]
    detections = filter_boxes(detections, ground_truth.racks, config)
    order = order_by_score(detections)
    taken = match(truth, detections, config.dist_ths_m, order)
    counted = np.ones(len(truth), dtype=bool)
    return PairedBoxes(config, ground_truth.scenes, truth, truth_rows, detections, order, taken, counted)


def gather_matches(paired: PairedBoxes) -> Matches:
    """Splits pairs by class, and measures the errors of each."""
    truth, detections, order = paired.truth, paired.detections, paired.order
    labels = detections.labels[order]
    num_samples = len(detections.tokens)
    classes = []
    for label in range(len(CLASSES)):
        rows = order[labels == label]
        taken = paired.taken[:, rows]  # (D, n)
        errors = tuple(
            pair_errors(truth, row[row != UNMATCHED], detections, rows[row != UNMATCHED]) for row in taken
        )
        positives = np.bincount(
            truth.sample_index[(truth.labels == label) & paired.counted], minlength=num_samples
        )
        classes.append(
            ClassMatches(
                detections.scores[rows], detections.sample_index[rows], taken != UNMATCHED, errors, positives
            )
        )
    return Matches(paired.config, detections.tokens, paired.scenes, tuple(classes))


def compute_metrics(matches: Matches) -> DetectionMetrics:
    """Curves and numbers of all classes and thresholds."""
    config = matches.config
    at_tp = config.dist_ths_m.index(config.dist_th_tp_m)
    curves = tuple(
        tuple(
            compute_curve(one.scores, is_match, errors, int(one.positives.sum()))
            for is_match, errors in zip(one.is_match, one.errors, strict=True)
        )
        for one in matches.classes
    )
    ap = np.array([[average_precision(curve.precision, config) for curve in row] for row in curves])
    tp_errors = np.array([mean_tp_errors(row[at_tp], config) for row in curves])
    return DetectionMetrics(config, ap, blank_undefined(tp_errors), curves)


def check_box_counts(detections: EvalBoxes, limit: int) -> None:
    """Raises DataError where a sample holds more than `limit` detections."""
    counts = np.bincount(detections.sample_index, minlength=len(detections.tokens))
    if len(counts) and counts.max() > limit:
        worst = int(np.argmax(counts))
        raise DataError(
            f"sample {detections.tokens[worst]} has {counts[worst]} detections, the task allows {limit}; "
            "keep the surest ones"
        )


def filter_boxes(boxes: EvalBoxes, racks: EvalBoxes, config: DetectionEvalConfig) -> EvalBoxes:
    """Drops what does not count."""
    return boxes[counted_boxes(boxes, racks, config)]


def counted_boxes(boxes: EvalBoxes, racks: EvalBoxes, config: DetectionEvalConfig) -> NDArray[np.bool_]:
    """(n,) in the range of the class, not without any point, no cycle in a bicycle rack."""
    keep = (boxes.ego_distance_m < config.ranges_m()[boxes.labels]) & (boxes.num_points != 0)
    cycles = np.isin(boxes.labels, [CLASSES.index("bicycle"), CLASSES.index("motorcycle")])
    rows = np.flatnonzero(keep & cycles)
    keep[rows[_in_a_rack(boxes[rows], racks)]] = False
    return keep


def _in_a_rack(boxes: EvalBoxes, racks: EvalBoxes) -> NDArray[np.bool_]:
    """(n,) whether each centre lies in an (upright) rack of its sample, borders included.

    Measured from a corner along the three edges, as the devkit does, so that borders round alike.
    """
    racks = racks[np.argsort(racks.sample_index, kind="stable")]
    counts = np.bincount(racks.sample_index, minlength=len(boxes.tokens))
    starts = (np.cumsum(counts) - counts)[boxes.sample_index]
    sizes = counts[boxes.sample_index]
    box = np.repeat(np.arange(len(boxes)), sizes)  # (P,) every pair of a box and a rack of its sample
    rack = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(len(box))
    half_wlh = racks.size_wlh_m / 2
    w, _, _, z = (racks.quat_wxyz / np.linalg.norm(racks.quat_wxyz, axis=1, keepdims=True)).T
    cos, sin = w * w - z * z, 2 * w * z

    def corner(along: int, across: int, up: int) -> Array:
        x, y, z = along * half_wlh[:, 1], across * half_wlh[:, 0], up * half_wlh[:, 2]
        return np.stack([cos * x - sin * y, sin * x + cos * y, z], axis=-1) + racks.centre_m

    start = corner(1, 1, 1)
    from_start = boxes.centre_m[box] - start[rack]
    inside = np.ones(len(box), dtype=bool)
    for end in (corner(-1, 1, 1), corner(1, -1, 1), corner(1, 1, -1)):
        edge = end - start
        reach = (edge[rack] * from_start).sum(axis=1)
        inside &= (reach >= 0) & (reach <= (edge * edge).sum(axis=1)[rack])
    found = np.zeros(len(boxes), dtype=bool)
    found[box[inside]] = True
    return found


def pair_errors(
    truth: EvalBoxes, truth_rows: NDArray[np.int64], detections: EvalBoxes, rows: NDArray[np.int64]
) -> Array:
    """(5, M) errors of matched pairs as ERRORS: m, 1 - IoU of the aligned boxes, rad, m/s, 0 or 1.

    NaN where the velocity of either or the attribute of the ground truth is unknown.
    """
    translation = _length(detections.centre_m[rows, :2] - truth.centre_m[truth_rows, :2])
    velocity = _length(detections.velocity_m_s[rows] - truth.velocity_m_s[truth_rows])
    sizes, truth_sizes = detections.size_wlh_m[rows], truth.size_wlh_m[truth_rows]
    overlap = np.minimum(sizes, truth_sizes).prod(axis=1)
    scale = 1 - overlap / (sizes.prod(axis=1) + truth_sizes.prod(axis=1) - overlap)
    # A barrier looks the same from behind.
    period = np.where(truth.labels[truth_rows] == CLASSES.index("barrier"), np.pi, 2 * np.pi)
    turn = yaw_of_quaternion(truth.quat_wxyz[truth_rows]) - yaw_of_quaternion(detections.quat_wxyz[rows])
    orientation = np.abs((turn + period / 2) % period - period / 2)
    attributes = truth.attributes[truth_rows]
    attribute = np.where(attributes == NO_ATTRIBUTE, np.nan, attributes != detections.attributes[rows])
    return np.stack([translation, scale, orientation, velocity, attribute])


def _length(xy: Array) -> Array:
    return np.sqrt(np.square(xy[:, 0]) + np.square(xy[:, 1]))


def compute_curve(scores: Array, is_match: NDArray[np.bool_], errors: Array, positives: int) -> Curve:
    """The curve of one class at one threshold.

    Args:
        scores: (n,) falling.
        is_match: (n,) whether each detection found its box.
        errors: (5, M) of the matched ones, in the same order.
        positives: number of ground-truth boxes.
    """
    if positives == 0 or not is_match.any():
        return Curve(np.zeros(len(RECALLS)), np.zeros(len(RECALLS)), np.ones((len(ERRORS), len(RECALLS))))
    hits = np.cumsum(is_match).astype(np.float64)
    recall = hits / positives
    precision = np.interp(RECALLS, recall, hits / np.arange(1, len(hits) + 1), right=0)
    confidence = np.interp(RECALLS, recall, scores, right=0)
    match_scores = scores[is_match]
    means = np.stack([_running_mean(row) for row in errors])
    # np.interp wants rising abscissae, scores fall.
    resampled = np.stack([np.interp(confidence[::-1], match_scores[::-1], row[::-1])[::-1] for row in means])
    return Curve(precision, confidence, resampled)


def _running_mean(values: Array) -> Array:
    """Mean of what is known so far; 0 while nothing is, and all 1 when nothing ever is."""
    known = ~np.isnan(values)
    if not known.any():
        return np.ones(len(values))
    counts = np.cumsum(known)
    return np.cumsum(np.where(known, values, 0.0)) / np.maximum(counts, 1)


def average_precision(precision: Array, config: DetectionEvalConfig) -> Array:
    """(..., 101) precision at RECALLS -> (...) mean above `min_recall` of what exceeds `min_precision`."""
    counted = precision[..., round(100 * config.min_recall) + 1 :] - config.min_precision
    return np.maximum(counted, 0).mean(axis=-1) / (1 - config.min_precision)


def mean_tp_errors(curve: Curve, config: DetectionEvalConfig) -> Array:
    """(5,) errors averaged from the least recall to the highest one reached; 1 where that is nothing."""
    first, last = round(100 * config.min_recall) + 1, curve.last_index
    return curve.errors[:, first : last + 1].mean(axis=1) if last >= first else np.ones(len(ERRORS))


def blank_undefined(tp_errors: Array) -> Array:
    """(..., C, 5) -> the same with NaN where a class has no such error."""
    tp_errors = np.array(tp_errors)
    for name, undefined in UNDEFINED_ERRORS.items():
        tp_errors[..., CLASSES.index(name), [ERRORS.index(error) for error in undefined]] = np.nan
    return tp_errors


_COLUMNS = ("mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE", "NDS")


def format_table(metrics: DetectionMetrics) -> str:
    """The table that nuScenes users know, as plain text: the seven means, then a line per class."""
    means = [metrics.mean_ap, *metrics.mean_errors.values(), metrics.nds]
    lines = [f"{name}: {value:.4f}" for name, value in zip(_COLUMNS, means, strict=True)]
    lines += ["", "Per-class results:", f"{'Object Class':<22}" + "".join(f"{c:<8}" for c in _CLASS_COLUMNS)]
    for name, ap, errors in zip(CLASSES, metrics.class_ap.values(), metrics.tp_errors, strict=True):
        lines.append(f"{name:<22}" + "".join(f"{value:<8.3f}" for value in (ap, *errors)))
    return "\n".join(line.rstrip() for line in lines)


_CLASS_COLUMNS = ("AP", "ATE", "ASE", "AOE", "AVE", "AAE")
