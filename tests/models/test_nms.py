import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from distillbev.errors import ConfigError
from distillbev.models.nms import (
    CircleNms,
    RotatedNms,
    circle_nms,
    footprint_intersection,
    greedy_survivors,
    rotated_iou,
    rotated_nms,
    suppress,
)

Point = tuple[float, float]


def corners(footprint: list[float]) -> list[Point]:
    x, y, length, width, yaw = footprint
    cos, sin = math.cos(yaw), math.sin(yaw)
    signs = ((1, 1), (-1, 1), (-1, -1), (1, -1))
    halves = [(u * length / 2, v * width / 2) for u, v in signs]
    return [(x + cos * u - sin * v, y + sin * u + cos * v) for u, v in halves]


def area(polygon: list[Point]) -> float:
    turned = polygon[1:] + polygon[:1]
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(polygon, turned, strict=True)) / 2


def clipped_area(subject: list[Point], window: list[Point]) -> float:
    """The slow twin of the overlap: cuts along each edge of the window (Sutherland and Hodgman)."""
    for (ax, ay), (bx, by) in zip(window, window[1:] + window[:1], strict=True):
        if not subject:
            return 0.0
        side = [(bx - ax) * (y - ay) - (by - ay) * (x - ax) for x, y in subject]
        cut = []
        for i, (x, y) in enumerate(subject):
            j = (i + 1) % len(subject)
            if side[i] >= 0:
                cut.append((x, y))
            if (side[i] > 0 > side[j]) or (side[i] < 0 < side[j]):
                t = side[i] / (side[i] - side[j])
                cut.append((x + t * (subject[j][0] - x), y + t * (subject[j][1] - y)))
        subject = cut
    return area(subject) if subject else 0.0


def random_footprints(n: int, seed: int, spread: float = 8.0) -> Tensor:
    values = torch.rand(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values * values.new_tensor([spread, spread, 5, 2.5, 7]) + values.new_tensor([0, 0, 0.3, 0.3, -3.5])


def greedy_by_loop(conflicts: Tensor) -> list[int]:
    """The rule as a sentence: a box stays when no box that stayed before it conflicts."""
    kept: list[int] = []
    for i in range(len(conflicts)):
        if not any(conflicts[j, i] for j in kept):
            kept.append(i)
    return kept


def test_overlap_of_random_pairs_equals_polygon_clipping() -> None:
    first, second = random_footprints(400, seed=0, spread=4), random_footprints(400, seed=1, spread=4)
    overlap = footprint_intersection(first, second)
    expected = [
        clipped_area(corners(a), corners(b)) for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]
    assert sum(value > 0 for value in expected) > 150
    torch.testing.assert_close(overlap, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-6)


# Whole and half numbers and right angles make edges and corners coincide, the hard cases of polygon clipping.
half_steps = st.integers(-6, 6).map(lambda i: i / 2)
lengths = st.integers(1, 8).map(lambda i: i / 2)
angles = st.one_of(st.sampled_from([i * math.pi / 4 for i in range(-4, 5)]), st.floats(-4, 4))
footprints = st.tuples(half_steps, half_steps, lengths, lengths, angles).map(list)


@settings(max_examples=150, deadline=None)
@given(footprints, footprints)
def test_overlap_is_right_when_edges_and_corners_coincide(first: list[float], second: list[float]) -> None:
    pair = torch.tensor([first, second], dtype=torch.float64)
    expected = clipped_area(corners(first), corners(second))
    overlap = footprint_intersection(pair, pair.flip(0))
    assert overlap.tolist() == pytest.approx([expected, expected], abs=1e-5)


def test_overlaps_worked_out_by_hand() -> None:
    square = [0.0, 0.0, 2.0, 2.0, 0.0]
    others = [square, [1.0, 0.0, 2.0, 2.0, 0.0], [0.0, 0.0, 2.0, 2.0, math.pi / 4], [2.0, 0.0, 2.0, 2.0, 0.0]]
    iou = rotated_iou(torch.tensor([square]), torch.tensor(others))[0]
    octagon = 8 * (math.sqrt(2) - 1)
    expected = torch.tensor([1, 2 / 6, octagon / (8 - octagon), 0])
    torch.testing.assert_close(iou, expected, rtol=0, atol=1e-6)


def test_yaw_turns_counter_clockwise() -> None:
    along_diagonal = torch.tensor([[0.0, 0.0, 10.0, 1.0, math.pi / 4]])
    up_right, up_left = torch.tensor([[3.0, 3.0, 1.0, 1.0, 0.0]]), torch.tensor([[-3.0, 3.0, 1.0, 1.0, 0.0]])
    assert float(rotated_iou(along_diagonal, up_right)) > 0.05
    assert float(rotated_iou(along_diagonal, up_left)) == 0


@pytest.mark.parametrize("density", [0.0, 0.02, 0.2, 0.9])
def test_survivors_of_all_boxes_at_once_equal_the_loop(density: float) -> None:
    for seed in range(5):
        conflicts = torch.rand(60, 60, generator=torch.Generator().manual_seed(seed)) < density
        assert greedy_survivors(conflicts).tolist() == greedy_by_loop(conflicts)


def test_a_chain_suppresses_every_second_box() -> None:
    centres = torch.stack([torch.arange(9.0), torch.zeros(9)], dim=1)
    assert circle_nms(centres, 1.0).tolist() == [0, 2, 4, 6, 8]


def test_circle_rule_means_a_squared_distance_border_included() -> None:
    centres = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.001]])
    assert circle_nms(centres, 4.0).tolist() == [0, 2]


def test_rotated_rule_equals_all_pairs_and_the_loop() -> None:
    footprints = random_footprints(80, seed=3)
    conflicts = rotated_iou(footprints, footprints) > 0.2
    assert rotated_nms(footprints, 0.2).tolist() == greedy_by_loop(conflicts)


def test_scaling_finds_small_boxes_that_do_not_touch() -> None:
    boxes = torch.zeros(2, 9)
    boxes[:, 3:6] = 0.6
    boxes[1, 0] = 0.8
    classes = torch.zeros(2, dtype=torch.int64)
    assert suppress(RotatedNms(max_iou=0.2), boxes, classes).tolist() == [0, 1]
    assert suppress(RotatedNms(max_iou=0.2, class_scale=(4.5,)), boxes, classes).tolist() == [0]
    assert float(boxes[0, 3]) == pytest.approx(0.6)  # the boxes themselves keep their size


def test_limits_on_candidates_and_survivors_hold() -> None:
    boxes = torch.zeros(20, 9)
    boxes[:, 0], boxes[:, 3:6] = torch.arange(20) * 10.0, 1.0
    classes = torch.zeros(20, dtype=torch.int64)
    assert len(suppress(RotatedNms(max_boxes=5), boxes, classes)) == 5
    assert len(suppress(RotatedNms(max_candidates=7), boxes, classes)) == 7
    assert len(suppress(CircleNms(max_boxes=4), boxes, classes)) == 4


@pytest.mark.parametrize("rule", [CircleNms(), RotatedNms(), RotatedNms(class_scale=(1.0, 2.0))])
def test_no_boxes_leave_no_survivors(rule: CircleNms | RotatedNms) -> None:
    assert suppress(rule, torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_settings_that_make_no_sense_are_refused() -> None:
    for build in (
        lambda: CircleNms(min_squared_distance_m2=-1),
        lambda: RotatedNms(max_iou=1.5),
        lambda: RotatedNms(class_scale=(0.0,)),
    ):
        with pytest.raises(ConfigError, match="expected"):
            build()
