"""Which detection takes which annotated box: greedy by score, all samples and classes at once.

Source: nuScenes detection task, "Average Precision": a match is the nearest box not yet taken, by distance of
the centres in the ground plane, below a threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..classes import CLASSES
from .eval_boxes import EvalBoxes

UNMATCHED = -1
# Pairs of one chunk; bounds the memory (about 100 bytes a pair) whatever the number of samples.
PAIRS_PER_CHUNK = 1_000_000


def order_by_score(detections: EvalBoxes) -> NDArray[np.int64]:
    """Rows from the surest to the least sure; among equal scores the later row first."""
    return np.argsort(detections.scores, kind="stable")[::-1]


def match(
    ground_truth: EvalBoxes, detections: EvalBoxes, thresholds_m: Sequence[float], order: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Matches within each sample and class, for each distance threshold by itself.

    Taking turns by score, each detection picking the nearest box left, has the same outcome as proposals:
    every detection proposes to its nearest box, a box keeps the surest proposer, whoever is turned away
    proposes to its next one. (All boxes rank the detections alike, so the stable matching is unique.)
    Proposals of all samples run side by side; a few rounds suffice. `match_in_turn` is the slow twin.

    Args:
        ground_truth, detections: over the same `tokens`.
        thresholds_m: D distances; a match is strictly nearer.
        order: detections by falling score, from `order_by_score`.

    Returns:
        (D, n) row of the ground truth that each detection takes, or UNMATCHED.
    """
    matched = np.full((len(thresholds_m), len(detections)), UNMATCHED)
    if len(ground_truth) == 0 or len(detections) == 0:
        return matched
    num_groups = len(detections.tokens) * len(CLASSES)
    truth_groups = ground_truth.sample_index * len(CLASSES) + ground_truth.labels
    truth_rows = np.argsort(truth_groups, kind="stable")
    group_sizes = np.bincount(truth_groups, minlength=num_groups)
    group_starts = np.cumsum(group_sizes) - group_sizes
    truth_xy = ground_truth.centre_m[truth_rows, :2]

    # Detections whose sample holds a box of their class, chunk by chunk of whole samples, by score within.
    groups = detections.sample_index[order] * len(CLASSES) + detections.labels[order]
    ranked = order[group_sizes[groups] > 0]
    pairs_of_sample = np.bincount(
        detections.sample_index[ranked],
        weights=group_sizes[detections.sample_index[ranked] * len(CLASSES) + detections.labels[ranked]],
        minlength=len(detections.tokens),
    )
    chunk_of_sample = (np.cumsum(pairs_of_sample) // PAIRS_PER_CHUNK).astype(np.int64)
    chunks = chunk_of_sample[detections.sample_index[ranked]]
    ranked = ranked[np.argsort(chunks, kind="stable")]
    edges = np.cumsum(np.bincount(chunks, minlength=1))

    for rows in np.split(ranked, edges[:-1]):
        if len(rows) == 0:
            continue
        groups = detections.sample_index[rows] * len(CLASSES) + detections.labels[rows]
        sizes = group_sizes[groups]
        suitor = np.repeat(np.arange(len(rows)), sizes)  # (P,) every pair of one sample and class
        within = np.arange(len(suitor)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        box = np.repeat(group_starts[groups], sizes) + within
        offset = detections.centre_m[rows, :2][suitor] - truth_xy[box]
        distance = np.sqrt(np.square(offset[:, 0]) + np.square(offset[:, 1]))
        near = np.flatnonzero(distance < max(thresholds_m))
        suitor, box, distance = suitor[near], box[near], distance[near]
        # Each suitor's boxes, nearest first; stable, so that equally near ones keep their order.
        nearest_first = np.lexsort((distance, suitor))
        suitor, box, distance = suitor[nearest_first], box[nearest_first], distance[nearest_first]
        starts = np.searchsorted(suitor, np.arange(len(rows)))
        for matches, threshold in zip(matched, thresholds_m, strict=True):
            counts = np.bincount(suitor[distance < threshold], minlength=len(rows))
            taken = _propose(box, starts, counts, len(truth_rows))
            found = np.flatnonzero(taken >= 0)
            matches[rows[found]] = truth_rows[taken[found]]
    return matched


def _propose(
    boxes: NDArray[np.int64], starts: NDArray[np.int64], counts: NDArray[np.int64], num_boxes: int
) -> NDArray[np.int64]:
    """Deferred acceptance. Suitor 0 is the surest; i likes `counts[i]` boxes from `starts[i]` on, best first.

    Returns:
        (suitors) the box that each ends with, or UNMATCHED.
    """
    nobody = len(starts)
    next_choice = np.zeros(nobody, dtype=np.int64)
    holder = np.full(num_boxes, nobody)
    asking = np.flatnonzero(counts)
    while len(asking):
        asked = boxes[starts[asking] + next_choice[asking]]
        before = holder[asked]
        np.minimum.at(holder, asked, asking)
        after = holder[asked]
        displaced = np.unique(before[(before != after) & (before != nobody)])
        refused = np.concatenate([asking[after != asking], displaced])
        next_choice[refused] += 1
        asking = refused[next_choice[refused] < counts[refused]]
    taken = np.full(nobody, UNMATCHED)
    held = np.flatnonzero(holder < nobody)
    taken[holder[held]] = held
    return taken


def match_in_turn(
    ground_truth: EvalBoxes, detections: EvalBoxes, thresholds_m: Sequence[float], order: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The slow twin of `match`: one detection after the other, as the definition reads."""
    matched = np.full((len(thresholds_m), len(detections)), UNMATCHED)
    for matches, threshold in zip(matched, thresholds_m, strict=True):
        free = np.ones(len(ground_truth), dtype=bool)
        for row in order:
            offset = ground_truth.centre_m[:, :2] - detections.centre_m[row, :2]
            distance = np.sqrt(np.square(offset[:, 0]) + np.square(offset[:, 1]))
            same = ground_truth.sample_index == detections.sample_index[row]
            same &= ground_truth.labels == detections.labels[row]
            distance[~(same & free)] = np.inf
            if len(distance) and distance.min() < threshold:
                matches[row] = np.argmin(distance)
                free[matches[row]] = False
    return matched
