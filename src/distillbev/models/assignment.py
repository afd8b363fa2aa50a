"""Which prediction answers for which object: the pairing of least total cost.

Source: the shortest augmenting path method for rectangular costs, Crouse (IEEE Trans. Aerospace and
Electronic Systems 52(4), 2016), after Jonker and Volgenant (Computing 38, 1987).
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
from numpy.typing import NDArray


def pair_at_least_cost(cost: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs rows with columns, each at most once and min(R, C) in all, at the least total cost.

    Rows are added one by one; the search for each row's path over the columns is vectorised, so it is quick
    where one side (objects) is much smaller than the other (queries).

    Args:
        cost: (R, C), finite.

    Returns:
        rows, columns: (min(R, C),) each, rows rising.
    """
    cost = np.asarray(cost, dtype=np.float64)
    assert cost.ndim == 2 and np.isfinite(cost).all(), cost
    if cost.shape[0] > cost.shape[1]:
        columns, rows = pair_at_least_cost(cost.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    R, C = cost.shape
    row_price, column_price = np.zeros(R), np.zeros(C)
    row_of = np.full(C, -1, dtype=np.int64)
    column_of = np.full(R, -1, dtype=np.int64)
    for start in range(R):
        # Grow a tree of cheapest paths from the row until it meets a free column.
        distance = np.full(C, np.inf)
        parent = np.full(C, -1, dtype=np.int64)
        reached = np.zeros(C, dtype=bool)
        row, travelled, tree = start, 0.0, [start]
        while True:
            through_row = travelled + cost[row] - row_price[row] - column_price
            shorter = ~reached & (through_row < distance)
            distance[shorter] = through_row[shorter]
            parent[shorter] = row
            column = int(np.where(reached, np.inf, distance).argmin())
            travelled = distance[column]
            if row_of[column] < 0:
                break
            reached[column] = True
            row = int(row_of[column])
            tree.append(row)
        # Prices keep every cost minus its prices at zero or more, and at zero along the pairs.
        row_price[start] += travelled
        others = np.array(tree[1:], dtype=np.int64)
        row_price[others] += travelled - distance[column_of[others]]
        column_price[reached] -= travelled - distance[reached]
        # Swap the pairs along the path.
        while column >= 0:
            row = int(parent[column])
            row_of[column] = row
            column, column_of[row] = int(column_of[row]), column
            if row == start:
                break
    return np.arange(R), column_of


def pair_at_least_cost_by_trying(cost: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The slow twin of `pair_at_least_cost`: tries every pairing."""
    R, C = cost.shape
    if R > C:
        columns, rows = pair_at_least_cost_by_trying(cost.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    rows = np.arange(R)
    best = min(permutations(range(C), R), key=lambda columns: float(cost[rows, list(columns)].sum()))
    return rows, np.array(best, dtype=np.int64)
