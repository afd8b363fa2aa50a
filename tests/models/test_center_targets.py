import math

import pytest
import torch
from torch import Tensor

from distillbev.boxes import Boxes3D
from distillbev.classes import CENTERPOINT_TASKS, CLASSES
from distillbev.errors import ConfigError
from distillbev.grid import BevGrid
from distillbev.models.center_targets import (
    CellRule,
    CenterTargets,
    TargetConfig,
    center_targets,
    center_targets_by_loops,
    gaussian_radius,
)

GRID = BevGrid(x_range_m=(-9.6, 9.6), y_range_m=(-8.0, 8.0), cell_m=0.8)


def box(x: float, y: float, length: float = 4.0, width: float = 2.0) -> list[float]:
    return [x, y, -1.0, length, width, 1.5, 0.3, 1.0, -2.0]


def boxes_of(rows: list[list[float]], names: list[str]) -> Boxes3D:
    labels = torch.tensor([CLASSES.index(name) for name in names], dtype=torch.int64)
    return Boxes3D(torch.tensor(rows).view(-1, 9), labels)


def random_boxes(n: int, seed: int) -> Boxes3D:
    """Some outside the map, some without extent, some with unknown velocity, some of no class."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n, 9, generator=generator)
    boxes = torch.empty(n, 9)
    boxes[:, :2] = values[:, :2] * 24 - 12
    boxes[:, 2] = values[:, 2] * 4 - 3
    boxes[:, 3:6] = values[:, 3:6] * 12 - 0.5
    boxes[:, 6] = values[:, 6] * 10 - 5
    boxes[:, 7:] = torch.where(values[:, 7:] < 0.3, math.nan, values[:, 7:])
    labels = torch.randint(-1, len(CLASSES), (n,), generator=generator)
    return Boxes3D(boxes, labels)


def assert_equal_targets(first: CenterTargets, second: CenterTargets) -> None:
    assert torch.equal(first.mask, second.mask)
    assert torch.equal(first.indices, second.indices)
    torch.testing.assert_close(first.boxes, second.boxes, rtol=0, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(first.heatmap, second.heatmap, rtol=0, atol=1e-6)
    assert torch.equal(first.heatmap == 1, second.heatmap == 1)


@pytest.mark.parametrize("cell_rule", ["floor", "truncate"])
@pytest.mark.parametrize("tasks", [CENTERPOINT_TASKS, (("pedestrian", "car"), ("bus",))])
def test_the_whole_batch_at_once_equals_one_box_after_another(cell_rule: CellRule, tasks) -> None:
    config = TargetConfig(max_objects=6, cell_rule=cell_rule)
    boxes = [random_boxes(60, seed=0), Boxes3D.empty(), random_boxes(25, seed=1)]
    fast = center_targets(boxes, tasks, GRID, config)
    assert int(fast.mask.sum()) >= 10
    assert_equal_targets(fast, center_targets_by_loops(boxes, tasks, GRID, config))


def test_a_peak_is_one_at_the_box_s_cell_and_falls_off_as_the_gaussian_says() -> None:
    targets = center_targets([boxes_of([box(0.5, -0.5)], ["car"])], (("car",),), GRID, TargetConfig())
    row, column = 9, 12  # (-0.5 + 8) / 0.8 = 9.375, (0.5 + 9.6) / 0.8 = 12.625
    assert float(targets.heatmap[0, 0, row, column]) == 1.0
    assert int(targets.indices[0, 0, 0]) == row * 24 + column
    radius = max(2, int(gaussian_radius(torch.tensor([5.0, 2.5]), 0.1)))
    sigma = (2 * radius + 1) / 6
    assert float(targets.heatmap[0, 0, row, column + 2]) == pytest.approx(math.exp(-2 / sigma**2))
    assert float(targets.heatmap[0, 0, row, column + radius + 1]) == 0.0
    expected = [
        0.625,
        0.375,
        -1.0,
        math.log(4),
        math.log(2),
        math.log(1.5),
        math.sin(0.3),
        math.cos(0.3),
        1,
        -2,
    ]
    torch.testing.assert_close(targets.boxes[0, 0, 0], torch.tensor(expected), rtol=0, atol=2e-6)


def test_a_radius_does_not_ask_which_side_is_longer() -> None:
    sizes = torch.tensor([[4.0, 2.0], [10.0, 3.0], [0.5, 1.5]])
    assert torch.equal(gaussian_radius(sizes, 0.1), gaussian_radius(sizes.flip(1), 0.1))


def test_only_truncation_accepts_a_centre_below_the_lower_border() -> None:
    boxes = [boxes_of([box(-9.7, 0.0), box(9.6, 0.0), box(0.0, -8.1)], ["car"] * 3)]
    floor = center_targets(boxes, (("car",),), GRID, TargetConfig())
    truncated = center_targets(boxes, (("car",),), GRID, TargetConfig(cell_rule="truncate"))
    assert floor.mask.sum() == 0 and float(floor.heatmap.max()) == 0
    assert truncated.mask[0, 0, :3].tolist() == [
        True,
        False,
        True,
    ]  # the slot of the rejected box stays empty
    assert float(truncated.boxes[0, 0, 0, 0]) == pytest.approx(-0.125, abs=1e-5)


def test_without_boxes_nothing_is_asked_for() -> None:
    targets = center_targets([Boxes3D.empty(), Boxes3D.empty()], CENTERPOINT_TASKS, GRID, TargetConfig())
    assert targets.heatmap.shape == (2, 10, 20, 24)
    assert [heatmap.shape[1] for heatmap in targets.heatmaps] == [1, 2, 2, 1, 2, 2]
    assert not targets.mask.any() and not targets.heatmap.any()


def test_boxes_that_are_not_finite_are_no_target() -> None:
    rows: list[Tensor] = [torch.tensor(box(0.0, 0.0)) for _ in range(3)]
    rows[0][0], rows[1][1], rows[2][3] = math.nan, math.inf, math.nan
    boxes = Boxes3D(torch.stack(rows), torch.zeros(3, dtype=torch.int64))
    targets = center_targets([boxes], (("car",),), GRID, TargetConfig())
    assert not targets.mask.any() and not targets.heatmap.any()


def test_settings_that_make_no_sense_are_refused() -> None:
    for settings in ({"max_objects": 0}, {"gaussian_overlap": 1.0}, {"min_radius_cells": -1}):
        with pytest.raises(ConfigError, match="expected"):
            TargetConfig(**settings)
