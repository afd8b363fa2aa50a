"""Pairing at least cost, against trying everything and against an outside implementation."""

import numpy as np
import pytest

from distillbev.models.assignment import pair_at_least_cost, pair_at_least_cost_by_trying


def total(cost, pairs) -> float:
    return float(cost[pairs[0], pairs[1]].sum())


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 3), (3, 6), (6, 3), (5, 5)])
def test_no_pairing_costs_less(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        cost = rng.normal(size=shape)
        rows, columns = pair_at_least_cost(cost)
        assert len(rows) == len(set(rows)) == len(set(columns)) == min(shape)
        assert (np.diff(rows) > 0).all()
        expected = pair_at_least_cost_by_trying(cost)
        assert np.array_equal(rows, expected[0]) and np.array_equal(columns, expected[1])


def test_equal_costs_are_paired_at_the_least_total() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        cost = rng.integers(0, 3, size=(4, 5)).astype(float)
        assert total(cost, pair_at_least_cost(cost)) == total(cost, pair_at_least_cost_by_trying(cost))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_nothing_is_paired_with_nothing(shape: tuple[int, int]) -> None:
    rows, columns = pair_at_least_cost(np.zeros(shape))
    assert len(rows) == len(columns) == 0


def test_large_costs_are_paired_as_scipy_pairs_them() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(2)
    for shape in ((900, 40), (60, 300), (80, 80)):
        cost = rng.normal(size=shape) ** 3
        ours, theirs = pair_at_least_cost(cost), optimize.linear_sum_assignment(cost)
        assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])
