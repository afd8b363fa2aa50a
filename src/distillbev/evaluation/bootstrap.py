"""How sure a score is: metrics over scenes drawn again and again, of one detector or of two.

Scenes, not samples, are drawn, since the samples of one scene resemble each other. Detections match within
their sample, so that matching is done once; drawing a scene k times just counts its boxes k times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..classes import CLASSES
from ..errors import ConfigError, DataError
from ..geometry import Array
from .metrics import (
    ERRORS,
    RECALLS,
    ClassMatches,
    DetectionEvalConfig,
    DetectionMetrics,
    Matches,
    PairedBoxes,
    average_precision,
    blank_undefined,
    compute_metrics,
)

# Entries (repeats x detections) handled at once; bounds the memory to some 100 MB.
ENTRIES_PER_CHUNK = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A value on the whole set, and the percentiles of its resampled values that enclose `level` of them.

    `resampled` (repeats,) are all of them, in the order of the draws.
    """

    value: float
    low: float
    high: float
    level: float
    resampled: Array

    @staticmethod
    def of(values: Array, level: float) -> Interval:
        """From the value on the whole set (first) and on each draw; draws without a value are left out."""
        drawn = values[1:][~np.isnan(values[1:])]
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]) if len(drawn) else (np.nan, np.nan)
        return Interval(float(values[0]), float(low), float(high), level, drawn)

    @property
    def share_above_zero(self) -> float:
        """Share of the draws with a value above zero; for a difference, how often the second won."""
        return float((self.resampled > 0).mean())

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class BootstrapResult:
    """Intervals of the headline numbers, of each class's AP (mean over thresholds), of the errors' means."""

    mean_ap: Interval
    nds: Interval
    class_ap: dict[str, Interval]
    mean_errors: dict[str, Interval]


def bootstrap(matches: Matches, repeats: int = 1000, seed: int = 0, level: float = 0.95) -> BootstrapResult:
    """Percentile intervals over scenes drawn with replacement, as many as there are.

    Exact: every draw's metrics are those of a data set in which a scene drawn k times occurs k times (the
    order among equal scores apart: copies of one detection stand together). Approximate, as any bootstrap:
    that the scenes stand for all scenes; with fewer than about 20 the intervals are too narrow. A draw
    without a single box of a class counts AP 0 and errors 1 for it, as the official metric does.

    Args:
        matches: from `match_boxes`.
        repeats: number of draws.
        seed: of the draws; the same seed draws the same scenes.
        level: share of the draws inside the interval.

    Raises:
        ConfigError: fewer than one repeat, or a level outside (0, 1).
        DataError: fewer than two scenes.
    """
    drawn = draw_scenes(matches, repeats, seed, level)
    return _intervals(_Numbers.of(matches, drawn), level)


def paired_bootstrap(
    first: Matches, second: Matches, repeats: int = 1000, seed: int = 0, level: float = 0.95
) -> BootstrapResult:
    """Intervals of the difference second - first, both evaluated on the same draws of scenes.

    What is common to both (hard scenes, rare classes) cancels, so that far smaller differences show than by
    comparing two intervals. Exact in the sense of `bootstrap`.

    Raises:
        DataError: the two were evaluated on other samples, other settings or other ground truth.
    """
    if first.tokens != second.tokens or first.config != second.config:
        raise DataError(
            "the two sets differ in samples or settings; evaluate both on the same samples, alike"
        )
    for name, one, other in zip(CLASSES, first.classes, second.classes, strict=True):
        if not np.array_equal(one.positives, other.positives):
            raise DataError(
                f"the two sets differ in ground-truth boxes of class {name}; use the same annotations"
            )
    drawn = draw_scenes(first, repeats, seed, level)
    one, other = _Numbers.of(first, drawn), _Numbers.of(second, drawn)
    differences = _Numbers(
        other.mean_ap - one.mean_ap,
        other.nds - one.nds,
        other.class_ap - one.class_ap,
        other.mean_errors - one.mean_errors,
    )
    return _intervals(differences, level)


@dataclass(frozen=True)
class _Numbers:
    """mAP (R), NDS (R), class AP (R, C) and mean errors (R, 5); row 0 is the whole set."""

    mean_ap: Array
    nds: Array
    class_ap: Array
    mean_errors: Array

    @staticmethod
    def of(matches: Matches, times: NDArray[np.int64]) -> _Numbers:
        ap, errors = weighted_metrics(matches, np.concatenate([np.ones_like(times[:1]), times]))
        class_ap = ap.mean(axis=-1)
        mean_ap = class_ap.mean(axis=-1)
        mean_errors = np.nanmean(errors, axis=1)
        scores = np.maximum(1 - mean_errors, 0)
        weight = matches.config.mean_ap_weight
        nds = (weight * mean_ap + scores.sum(axis=-1)) / (weight + len(ERRORS))
        return _Numbers(mean_ap, nds, class_ap, mean_errors)


def _intervals(numbers: _Numbers, level: float) -> BootstrapResult:
    return BootstrapResult(
        Interval.of(numbers.mean_ap, level),
        Interval.of(numbers.nds, level),
        {name: Interval.of(numbers.class_ap[:, c], level) for c, name in enumerate(CLASSES)},
        {name: Interval.of(numbers.mean_errors[:, e], level) for e, name in enumerate(ERRORS)},
    )


def draw_scenes(
    matches: Matches | PairedBoxes, repeats: int, seed: int, level: float = 0.95
) -> NDArray[np.int64]:
    """(repeats, scenes) how often each scene, in order of first appearance, is drawn.

    Raises:
        ConfigError: fewer than one repeat, or a level outside (0, 1).
        DataError: fewer than two scenes.
    """
    if repeats < 1 or not 0 < level < 1:
        raise ConfigError(
            f"repeats={repeats}, level={level}; choose at least one repeat and a level in (0, 1)"
        )
    count = len(set(matches.scenes))
    if count < 2:
        raise DataError(f"{count} scene cannot be resampled; evaluate on at least two, better on 20 or more")
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=repeats)


def scene_indices(matches: Matches | PairedBoxes) -> NDArray[np.int64]:
    """(S,) index of each sample's scene, scenes numbered as they first appear."""
    number = {scene: index for index, scene in enumerate(dict.fromkeys(matches.scenes))}
    return np.array([number[scene] for scene in matches.scenes], dtype=np.int64)


def repeated_metrics(matches: Matches, times: NDArray[np.int64]) -> DetectionMetrics:
    """The slow twin of `weighted_metrics` for one draw: truly repeats the detections of a scene drawn often.

    Args:
        times: (scenes,) how often each scene occurs.
    """
    of_sample = times[scene_indices(matches)]
    classes = []
    for one in matches.classes:
        copies = of_sample[one.sample_index]
        classes.append(
            ClassMatches(
                np.repeat(one.scores, copies),
                np.repeat(one.sample_index, copies),
                np.repeat(one.is_match, copies, axis=1),
                tuple(
                    np.repeat(errors, copies[is_match], axis=1)
                    for errors, is_match in zip(one.errors, one.is_match, strict=True)
                ),
                one.positives * of_sample,
            )
        )
    return compute_metrics(replace(matches, classes=tuple(classes)))


def weighted_metrics(matches: Matches, times: NDArray[np.int64]) -> tuple[Array, Array]:
    """Metrics of many draws at once, without repeating anything.

    Args:
        times: (R, scenes) how often each draw holds each scene.

    Returns:
        ap: (R, C, D).
        tp_errors: (R, C, 5) as ERRORS, NaN where a class has no such error.
    """
    config = matches.config
    at_tp = config.dist_ths_m.index(config.dist_th_tp_m)
    times_of_sample = times[:, scene_indices(matches)]
    errors = np.ones((len(times), len(CLASSES), len(ERRORS)))
    for c, one in enumerate(matches.classes):
        for chunk in _chunks(len(times), len(one.scores)):
            errors[chunk, c] = _class_errors(one, at_tp, times_of_sample[chunk], config)
    return weighted_ap(matches, times), blank_undefined(errors)


def weighted_ap(matches: Matches, times: NDArray[np.int64]) -> Array:
    """The average precisions of `weighted_metrics` alone, which cost far less: (R, scenes) -> (R, C, D)."""
    scene_of_sample = scene_indices(matches)
    ap = np.zeros((len(times), len(CLASSES), len(matches.config.dist_ths_m)))
    for c, one in enumerate(matches.classes):
        positives = np.bincount(scene_of_sample, one.positives, times.shape[1]).astype(np.int64)
        scenes = scene_of_sample[one.sample_index]
        for d, is_match in enumerate(one.is_match):
            for chunk in _chunks(len(times), int(np.count_nonzero(is_match))):
                drawn = times[chunk]
                ap[chunk, c, d] = _class_ap(scenes, is_match, drawn @ positives, drawn, matches.config)
    return ap


def _chunks(draws: int, entries: int) -> list[slice]:
    step = max(1, ENTRIES_PER_CHUNK // max(1, entries))
    return [slice(start, start + step) for start in range(0, draws, step)]


def _class_ap(
    scenes: NDArray[np.int64],
    is_match: NDArray[np.bool_],
    positives: NDArray[np.int64],
    times: NDArray[np.int64],
    config: DetectionEvalConfig,
) -> Array:
    """(r,) AP of one class at one threshold, detections (n,) given by falling score.

    An interpolated curve is needed at 101 recalls only. With `positives` boxes, recall q lies between hit
    number h = floor(q * positives) and the next; which detection is hit h + 1, and how many misses stand
    before it, follows from running sums of the weights.
    """
    if not is_match.any() or not positives.any():
        return np.zeros(len(times))
    hits = np.cumsum(times[:, scenes[is_match]], axis=1)  # (r, M) up to and with this match
    misses = _misses_before(scenes, is_match, times)  # (r, M + 1), the last one: in all
    hit_below = _whole_hits(positives)  # (r, 101)
    between = _Between.of(hits, hit_below, positives)
    missed = between.pick(misses)
    precision = between.interpolate(
        _ratio(hit_below, hit_below + missed),
        _ratio(hit_below + 1, hit_below + 1 + missed),
        at_end=_ratio(hits[:, -1:], hits[:, -1:] + misses[:, -1:]),
    )
    # Before the first hit np.interp repeats the first entry: that hit, or else a miss at recall 0.
    precision = np.where(between.before_all & (missed == 0), 1.0, precision)
    precision[(hits[:, -1] == 0) | (positives == 0)] = 0
    return average_precision(precision, config)


def _misses_before(
    scenes: NDArray[np.int64], is_match: NDArray[np.bool_], times: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(r, M + 1) false detections before each of the M matches, and in all.

    They are counted by scene and by the match that follows, so that a draw is a matrix product; the counts
    are whole and small, thus exact in floating point.
    """
    num_matches, num_scenes = int(np.count_nonzero(is_match)), times.shape[1]
    scene, following = scenes[~is_match], np.cumsum(is_match)[~is_match]  # `following` rises
    misses = np.empty((len(times), num_matches + 1))
    step = max(1, ENTRIES_PER_CHUNK // num_scenes)
    for start in range(0, num_matches + 1, step):
        stop = min(start + step, num_matches + 1)
        rows = slice(*np.searchsorted(following, [start, stop]))
        cells = scene[rows] * (stop - start) + following[rows] - start
        counts = np.bincount(cells, minlength=num_scenes * (stop - start)).reshape(num_scenes, -1)
        misses[:, start:stop] = times.astype(np.float64) @ counts.astype(np.float64)
    return np.cumsum(misses, axis=1).astype(np.int64)


def _class_errors(
    one: ClassMatches, at_tp: int, times: NDArray[np.int64], config: DetectionEvalConfig
) -> Array:
    """(r, S) draws -> (r, 5) errors of one class at the threshold for true positives."""
    positives = times @ one.positives
    at = np.flatnonzero(one.is_match[at_tp])
    if len(at) == 0 or not positives.any():
        return np.ones((len(times), len(ERRORS)))
    copies = times[:, one.sample_index]  # (r, n)
    entries = np.cumsum(copies, axis=1)
    hits = np.cumsum(copies[:, at], axis=1)  # (r, M)
    misses = entries[:, at] - hits
    between = _Between.of(hits, _whole_hits(positives), positives)
    confidence = _confidence(one.scores, at, copies, entries, hits, misses, between)
    errors = _weighted_errors(one.scores[at], one.errors[at_tp], copies[:, at], hits, confidence, config)
    errors[positives == 0] = 1
    return errors


def _whole_hits(positives: NDArray[np.int64]) -> NDArray[np.int64]:
    """(r, 101) largest h with h / positives <= recall, as floating point compares them."""
    safe = np.maximum(positives, 1)[:, None]
    hits = np.floor(RECALLS * safe).astype(np.int64)
    hits -= hits / safe > RECALLS
    hits += (hits + 1) / safe <= RECALLS
    return hits


@dataclass(frozen=True)
class _Between:
    """Where each recall lies among the hits of each draw: all (r, 101).

    `next_match` is the match whose copy is the hit above (clipped to the last), `fraction` how far the recall
    is on the way from the hit below to that one.
    """

    next_match: NDArray[np.int64]
    hit_below: NDArray[np.int64]
    fraction: Array
    before_all: NDArray[np.bool_]
    on_last: NDArray[np.bool_]
    beyond: NDArray[np.bool_]

    @staticmethod
    def of(hits: NDArray[np.int64], hit_below: NDArray[np.int64], positives: NDArray[np.int64]) -> _Between:
        total = hits[:, -1:]
        safe = np.maximum(positives, 1)[:, None]
        beyond = total / safe < RECALLS
        return _Between(
            next_match=np.minimum(_first_above(hits, hit_below), hits.shape[1] - 1),
            hit_below=hit_below,
            fraction=(RECALLS - hit_below / safe) / (1 / safe),
            before_all=hit_below == 0,
            on_last=(hit_below >= total) & ~beyond,
            beyond=beyond,
        )

    def pick(self, of_match: NDArray) -> NDArray:
        """(r, M) -> (r, 101): the value of the next match."""
        return np.take_along_axis(of_match, self.next_match, axis=1)

    def interpolate(self, below: Array, above: Array, at_end: Array) -> Array:
        values = below + (above - below) * self.fraction
        return np.where(self.beyond, 0.0, np.where(self.on_last, at_end, values))


def _confidence(
    scores: Array,
    at: NDArray[np.int64],
    copies: NDArray[np.int64],
    entries: NDArray[np.int64],
    hits: NDArray[np.int64],
    misses: NDArray[np.int64],
    between: _Between,
) -> Array:
    """(r, 101) score at each recall, interpolated from the entry just before the next hit."""
    above = scores[at][between.next_match]
    first_entry = between.pick(
        entries[:, at] - copies[:, at]
    )  # entries before the first copy of the next match
    previous = _first_above(entries, first_entry - 1)
    # The hit below may be an earlier copy of the very same detection.
    same = between.hit_below > between.pick(hits - copies[:, at])
    below = np.where(same, above, scores[np.minimum(previous, len(scores) - 1)])
    last = _first_above(entries, entries[:, -1:] - 1)
    confidence = between.interpolate(below, above, at_end=scores[np.minimum(last, len(scores) - 1)])
    confidence = np.where(
        between.before_all & (between.pick(misses) == 0) & ~between.beyond, above, confidence
    )
    confidence[hits[:, -1] == 0] = 0
    return confidence


def _weighted_errors(
    scores: Array,
    errors: Array,
    copies: NDArray[np.int64],
    hits: NDArray[np.int64],
    confidence: Array,
    config: DetectionEvalConfig,
) -> Array:
    """(r, 5) errors of one class: running means over the hits, read at the confidence of each recall.

    Args:
        scores, errors: (M,) and (5, M) of the matches.
        copies, hits: (r, M) copies of each match and their running sum.
        confidence: (r, 101).
    """
    first = round(100 * config.min_recall) + 1
    steps = np.arange(len(RECALLS))
    last = np.where(confidence != 0, steps, 0).max(axis=1)  # (r,)
    counted = (steps >= first) & (steps <= last[:, None])

    # Rising by score, as np.interp has them: the first entry not above the confidence, and the one before it.
    surer = np.searchsorted(-scores, -confidence, side="left")  # (r, 101) matches with a higher score
    hits_before = np.take_along_axis(np.pad(hits, ((0, 0), (1, 0))), surer, axis=1)
    total = hits[:, -1:]
    num_matches = hits.shape[1]
    lower = np.minimum(_first_above(hits, hits_before), num_matches - 1)  # its first copy counts
    upper = np.minimum(_first_above(hits, hits_before - 1), num_matches - 1)  # its last copy counts
    none_lower, none_upper = hits_before >= total, hits_before == 0
    gap = scores[upper] - scores[lower]
    fraction = np.where(gap > 0, (confidence - scores[lower]) / np.where(gap > 0, gap, 1), 0)

    means = np.ones((len(copies), len(ERRORS)))
    for e, row in enumerate(errors):
        known = ~np.isnan(row)
        value = np.where(known, row, 0.0)
        counts = np.cumsum(copies * known, axis=1)
        sums = np.cumsum(copies * value, axis=1)
        counts_first = counts - (copies - 1) * known
        after_first = (sums - (copies - 1) * value) / np.maximum(counts_first, 1)
        after_last = sums / np.maximum(counts, 1)
        at_lower = np.take_along_axis(after_first, lower, axis=1)
        at_upper = np.take_along_axis(after_last, upper, axis=1)
        curve = at_lower + (at_upper - at_lower) * fraction
        curve = np.where(none_upper, at_lower, np.where(none_lower, at_upper, curve))
        mean = np.where(counted, curve, 0).sum(axis=1) / np.maximum(counted.sum(axis=1), 1)
        means[:, e] = np.where((counts[:, -1] == 0) | ~counted.any(axis=1), 1.0, mean)
    return means


def _first_above(rising: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row by row, the first column of `rising` (r, M) above each value (r, K); M where there is none."""
    return np.stack(
        [np.searchsorted(row, wanted, side="right") for row, wanted in zip(rising, values, strict=True)]
    )


def _ratio(numerator: NDArray, denominator: NDArray) -> Array:
    return numerator / np.maximum(denominator, 1)
