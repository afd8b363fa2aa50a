import math

import pytest
import torch
from toys import CAR, GRID, box, boxes_of

from distillbev.boxes import Boxes3D
from distillbev.distill.masks import pad_boxes
from distillbev.distill.relation import RelationConfig, points_in_boxes, relation_term
from distillbev.errors import ConfigError
from distillbev.grid import BevGrid

KINDS = [RelationConfig(between="points"), RelationConfig(between="channels")]


def maps(seed: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_points_lie_at_the_centres_of_equal_parts_and_turn_with_the_box() -> None:
    padded, _ = pad_boxes([boxes_of(box(1.0, 2.0, 4.0, 2.0, math.pi / 2))])
    points = points_in_boxes(padded, per_side=2)[0, 0].tolist()
    expected = [[1.5, 1.0], [0.5, 1.0], [1.5, 3.0], [0.5, 3.0]]  # length lies along y, width along -x
    assert points == [pytest.approx(point, abs=1e-6) for point in expected]


def test_relation_of_two_points_is_the_squared_difference_of_their_cosines_by_hand() -> None:
    # Two columns of cells, 2 m wide; the box's 2 x 2 points lie at their centres.
    grid = BevGrid(x_range_m=(0.0, 4.0), y_range_m=(0.0, 4.0), cell_m=2.0)
    boxes = [boxes_of(box(2.0, 2.0, 4.0, 4.0))]
    left, right_teacher, right_student = (1.0, 0.0), (0.0, 2.0), (3.0, 3.0)

    def columns(left: tuple[float, float], right: tuple[float, float]) -> torch.Tensor:
        return torch.tensor([left, right]).T[None, :, None, :].repeat(1, 1, 2, 1)  # (1, 2, 2, 2)

    config = RelationConfig(points_per_side=2, enlarge=1.0)
    args = columns(left, right_teacher), columns(left, right_student), boxes, grid
    # cos(left, right) is 0 for the teacher and sqrt(1/2) for the student: 8 of 16 pairs differ by it.
    assert relation_term(*args, config).item() == pytest.approx(8 / 16 * 0.5)
    # Channels over the four points: teacher (1, 0, 1, 0), (0, 2, 0, 2), student (1, 3, 1, 3), (0, 3, 0, 3).
    cosine = 3 / math.sqrt(10)
    channels = RelationConfig(between="channels", points_per_side=2, enlarge=1.0)
    assert relation_term(*args, channels).item() == pytest.approx(2 / 4 * cosine**2)


def test_channel_relations_are_those_of_whole_channel_matrices() -> None:
    """The slow twin: one C x C matrix of cosines for every box."""
    boxes = [boxes_of(CAR, box(-2.0, 3.0, 2.0, 2.0)), boxes_of(CAR)]
    teacher, student = maps(0), maps(1)
    padded, valid = pad_boxes(boxes)
    where = GRID.cell_coordinates(points_in_boxes(padded, 5, 1.2)) / 16 * 2 - 1
    means = []
    for sample in range(2):
        distances = []
        for index in range(int(valid[sample].sum())):
            at = where[sample, index][None, None]
            cosines = []
            for features in (teacher, student):
                read = torch.nn.functional.grid_sample(features[sample][None], at, align_corners=False)[
                    0, :, 0
                ]
                unit = read / read.norm(dim=1, keepdim=True)
                cosines.append(unit @ unit.T)
            distances.append((cosines[0] - cosines[1]).square().mean())
        means.append(torch.stack(distances).mean())
    found = relation_term(teacher, student, boxes, GRID, RelationConfig(between="channels"))
    torch.testing.assert_close(found, torch.stack(means), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", KINDS)
def test_relations_do_not_depend_on_the_size_of_either_map_or_the_order_of_boxes(
    config: RelationConfig,
) -> None:
    second = box(-2.0, 3.0, 2.0, 2.0)
    boxes, swapped = [boxes_of(CAR, second), boxes_of(CAR)], [boxes_of(second, CAR), boxes_of(CAR)]
    once = relation_term(maps(0), maps(1), boxes, GRID, config)
    torch.testing.assert_close(relation_term(50 * maps(0), 0.1 * maps(1), boxes, GRID, config), once)
    torch.testing.assert_close(relation_term(maps(0), maps(1), swapped, GRID, config), once)
    assert (once > 0).all()
    same = relation_term(maps(0), 3 * maps(0), boxes, GRID, config)
    torch.testing.assert_close(same, torch.zeros(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", KINDS)
def test_only_what_lies_at_boxes_on_the_grid_has_a_say(config: RelationConfig) -> None:
    far_off = box(30.0, 30.0, 4.0, 2.0)
    boxes = [boxes_of(CAR, far_off), Boxes3D.empty()]
    student = maps(1).requires_grad_()
    term = relation_term(maps(0), student, boxes, GRID, config)
    torch.testing.assert_close(term, relation_term(maps(0), student, [boxes_of(CAR), boxes[1]], GRID, config))
    assert term[1] == 0
    term.sum().backward()
    moved = student.grad[0].abs().sum(dim=0) > 0
    assert moved.any() and not moved[:4].any() and not moved[:, :4].any()  # the car is at row 8, column 9
    assert not student.grad[1].any()


@pytest.mark.parametrize("config", KINDS)
def test_gradients_are_those_of_finite_differences_and_finite_on_empty_ground(config: RelationConfig) -> None:
    grid = BevGrid(x_range_m=(0.0, 3.0), y_range_m=(0.0, 2.0), cell_m=1.0)
    boxes = [boxes_of(box(1.4, 0.9, 1.6, 1.0, 0.3))]
    generator = torch.Generator().manual_seed(2)
    teacher, student = torch.randn(2, 1, 2, 2, 3, generator=generator).unbind()
    student.requires_grad_()
    relation_term(teacher, student, boxes, grid, config).sum().backward()
    step = 1e-2  # of single precision
    for index in range(student.numel()):
        nudge = torch.zeros(student.numel())
        nudge[index] = step
        ends = [
            relation_term(teacher, student.detach() + sign * nudge.view_as(student), boxes, grid, config)
            for sign in (1, -1)
        ]
        slope = float(ends[0] - ends[1]) / (2 * step)
        assert student.grad.flatten()[index].item() == pytest.approx(slope, rel=0.02, abs=1e-3)

    empty = torch.zeros_like(teacher).requires_grad_()
    relation_term(teacher, empty, boxes, grid, config).sum().backward()
    assert empty.grad.isfinite().all()


def test_relation_settings_refuse_what_relates_nothing() -> None:
    with pytest.raises(ConfigError, match="points_per_side=1"):
        RelationConfig(points_per_side=1)
    with pytest.raises(ConfigError, match="enlarge=0"):
        RelationConfig(enlarge=0)
