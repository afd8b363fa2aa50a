from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distillbev.evaluation import matching
from distillbev.evaluation.eval_boxes import EvalBoxes, eval_boxes_from_columns
from distillbev.evaluation.matching import UNMATCHED, match, match_in_turn, order_by_score

THRESHOLDS_M = (0.5, 1.0, 2.0, 4.0)


def boxes_at(
    xy_m: NDArray, samples: NDArray, labels: NDArray, scores: NDArray, num_samples: int
) -> EvalBoxes:
    n = len(xy_m)
    columns = {
        "sample_index": samples,
        "centre_m": np.concatenate([xy_m, np.zeros((n, 1))], axis=1),
        "size_wlh_m": np.ones((n, 3)),
        "quat_wxyz": np.tile([1.0, 0.0, 0.0, 0.0], (n, 1)),
        "velocity_m_s": np.zeros((n, 2)),
        "labels": labels,
        "scores": scores,
        "attributes": np.full(n, -1),
        "num_points": np.full(n, -1),
    }
    tokens = tuple(f"sample-{i}" for i in range(num_samples))
    return eval_boxes_from_columns(tokens, [columns], np.zeros((num_samples, 2)))


def crowd(
    rng: np.random.Generator, num_boxes: int, num_samples: int, spread_m: float, step_m: float
) -> EvalBoxes:
    xy_m = np.round(rng.uniform(-spread_m, spread_m, (num_boxes, 2)) / step_m) * step_m
    scores = np.round(rng.random(num_boxes) * 8) / 8  # many equal scores
    return boxes_at(
        xy_m, rng.integers(0, num_samples, num_boxes), rng.integers(0, 3, num_boxes), scores, num_samples
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    num_truths=st.integers(0, 40),
    num_found=st.integers(0, 60),
    num_samples=st.integers(1, 4),
    spread_m=st.sampled_from([1.0, 4.0, 12.0]),
)
def test_proposals_give_what_taking_turns_gives(
    seed: int, num_truths: int, num_found: int, num_samples: int, spread_m: float
) -> None:
    rng = np.random.default_rng(seed)
    truth = crowd(rng, num_truths, num_samples, spread_m, step_m=0.5)
    found = crowd(rng, num_found, num_samples, spread_m, step_m=0.5)
    order = order_by_score(found)
    np.testing.assert_array_equal(
        match(truth, found, THRESHOLDS_M, order), match_in_turn(truth, found, THRESHOLDS_M, order)
    )


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    truth, found = (crowd(rng, n, 20, 10.0, step_m=0.01) for n in (150, 300))
    order = order_by_score(found)
    whole = match(truth, found, THRESHOLDS_M, order)
    monkeypatch.setattr(matching, "PAIRS_PER_CHUNK", 40)
    np.testing.assert_array_equal(match(truth, found, THRESHOLDS_M, order), whole)
    assert (whole != UNMATCHED).any()


def test_the_surer_detection_takes_the_box_and_the_other_its_second_choice() -> None:
    zeros = np.zeros(2, dtype=np.int64)
    truth = boxes_at(np.array([[0.0, 0.0], [3.0, 0.0]]), zeros, zeros, np.full(2, -1.0), 1)
    found = boxes_at(np.array([[0.25, 0.0], [1.0, 0.0]]), zeros, zeros, np.array([0.3, 0.9]), 1)
    matched = match(truth, found, (1.5, 4.0), order_by_score(found))
    assert matched.tolist() == [[UNMATCHED, 0], [1, 0]]


def test_of_equal_scores_the_later_row_comes_first() -> None:
    zeros = np.zeros(3, dtype=np.int64)
    found = boxes_at(np.zeros((3, 2)), zeros, zeros, np.array([0.5, 0.9, 0.5]), 1)
    assert order_by_score(found).tolist() == [1, 2, 0]
