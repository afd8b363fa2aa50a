import math
from dataclasses import replace as replace_fields

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor
from toys import CAR, GRID, box, boxes_of

from distillbev.boxes import Boxes3D, box_corners
from distillbev.classes import CLASSES
from distillbev.distill.masks import (
    ContextConfig,
    RegionConfig,
    Regions,
    cells_in_boxes,
    cells_in_boxes_slow,
    false_positives,
    foreground_of_boxes,
    heat_on_grid,
    one_over_component,
    pad_boxes,
    split_regions,
    target_heat,
)
from distillbev.grid import BevGrid
from distillbev.models.center_targets import TargetConfig, center_targets

SQUARE = BevGrid(x_range_m=(-8.0, 8.0), y_range_m=(-8.0, 8.0), cell_m=0.5)


def random_boxes(seed: int, n: int, reach_m: float = 8.0) -> Boxes3D:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(n, 9, generator=generator)
    boxes[:, :2] = (boxes[:, :2] - 0.5) * 2 * reach_m
    boxes[:, 3:5] = 0.3 + boxes[:, 3:5] * 5
    boxes[:, 6] = (boxes[:, 6] - 0.5) * 2 * math.pi
    return Boxes3D(boxes, torch.randint(0, 10, (n,), generator=generator))


def foreground(boxes: list[Boxes3D], grid: BevGrid = GRID, **settings: object) -> tuple[Tensor, Tensor]:
    found = foreground_of_boxes(*pad_boxes(boxes), grid, RegionConfig(**settings))
    return found.mask[:, 0], found.scale[:, 0]


def split(boxes: list[Boxes3D], config: RegionConfig, teacher_heat: Tensor | None = None) -> Regions:
    padded, valid = pad_boxes(boxes)
    found = foreground_of_boxes(padded, valid, GRID, config)
    targets = target_heat(padded, valid, GRID)
    seen = None if teacher_heat is None else false_positives("heat", config, targets, teacher_heat)
    return split_regions(found, config, targets, seen)


def point_in_polygon(x: float, y: float, corners: list[list[float]]) -> bool:
    """The even-odd rule, which knows nothing of yaw, length or width."""
    inside = False
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (y1 > y) != (y2 > y) and x < (x2 - x1) * (y - y1) / (y2 - y1) + x1:
            inside = not inside
    return inside


@pytest.mark.parametrize("sample", ["centre", "corner"])
def test_fast_cells_are_the_slow_cells(sample: str) -> None:
    boxes = [random_boxes(1, 7), Boxes3D.empty(), random_boxes(2, 3)]
    fast = cells_in_boxes(*pad_boxes(boxes), GRID, sample)
    slow = cells_in_boxes_slow(boxes, GRID, sample)
    for of_sample, cells_of_box in zip(fast, slow, strict=True):
        for m, cells in enumerate(of_sample):
            expected = cells_of_box[m] if m < len(cells_of_box) else []
            assert [tuple(cell) for cell in cells.nonzero().tolist()] == expected


@pytest.mark.parametrize("yaw_deg", [30, -30, 110])
def test_oblique_box_covers_the_cells_of_its_polygon_and_not_of_its_mirror_image(yaw_deg: float) -> None:
    oblique = box(0.7, -1.3, 5.1, 1.9, math.radians(yaw_deg))
    mask, _ = foreground([boxes_of(oblique)], SQUARE)
    corners = box_corners(torch.tensor([oblique]).numpy())[0, :4, :2].tolist()
    centres = SQUARE.cell_centres()
    expected = torch.tensor([[point_in_polygon(x, y, corners) for x, y in row] for row in centres.tolist()])
    assert torch.equal(mask[0], expected)
    mirrored, _ = foreground([boxes_of(box(0.7, -1.3, 5.1, 1.9, -math.radians(yaw_deg)))], SQUARE)
    assert not torch.equal(mirrored, mask)


@pytest.mark.parametrize("scale", ["box_area", "cells", "object"])
def test_turning_and_mirroring_the_world_turns_and_mirrors_regions(scale: str) -> None:
    boxes = random_boxes(3, 6)
    mask, values = foreground([boxes], SQUARE, object_scale=scale)
    turned = boxes.boxes.clone()
    turned[:, 0], turned[:, 1] = -boxes.boxes[:, 1], boxes.boxes[:, 0]
    turned[:, 6] += math.pi / 2
    mirrored = boxes.boxes.clone()
    mirrored[:, 0], mirrored[:, 6] = -boxes.boxes[:, 0], math.pi - boxes.boxes[:, 6]
    # +90 degrees take x to y: what lay in column j lies in row j. `rot90` in (X, Y) order is this turn.
    for moved, move in (
        (turned, lambda m: torch.rot90(m, -1, dims=(1, 2))),
        (mirrored, lambda m: m.flip(2)),
    ):
        moved_mask, moved_values = foreground(
            [replace_fields(boxes, boxes=moved)], SQUARE, object_scale=scale
        )
        assert torch.equal(moved_mask, move(mask))
        torch.testing.assert_close(moved_values, move(values))


def test_corner_sampling_sees_a_box_half_a_cell_further_on() -> None:
    centre, _ = foreground([boxes_of(CAR)])
    shifted = box(CAR[0] - 0.4, CAR[1] - 0.4, *CAR[3:5], CAR[6])
    corner, _ = foreground([boxes_of(shifted)], sample="corner")
    assert torch.equal(centre, corner)


def test_small_object_always_covers_a_cell_with_min_one_cell_and_often_none_without() -> None:
    pedestrians = random_boxes(4, 200, reach_m=4.5)
    pedestrians.boxes[:, 3:5] = torch.tensor([0.73, 0.67])
    coarse = GRID.coarser(2)
    each = [pedestrians[i : i + 1] for i in range(len(pedestrians))]
    with_rule, _ = foreground(each, coarse)
    without, _ = foreground(each, coarse, min_one_cell=False)
    assert (with_rule.sum(dim=(1, 2)) == 1).all()
    missed = (without.sum(dim=(1, 2)) == 0).float().mean()
    assert 0.7 < missed < 0.9  # 81 % by the reference's own count
    rows = coarse.cell_coordinates(pedestrians.boxes[:, :2]).floor().long()
    assert all(with_rule[i, row, column] for i, (column, row) in enumerate(rows.tolist()))


def test_min_one_cell_adds_nothing_for_a_box_whose_centre_is_off_the_grid() -> None:
    mask, _ = foreground([boxes_of(box(-6.45, 0.0, 0.3, 0.3), box(100.0, 100.0, 0.3, 0.3))])
    assert not mask.any()


def test_box_partly_outside_keeps_its_cells_inside() -> None:
    mask, _ = foreground([boxes_of(box(-6.4, 0.0, 4.0, 2.0))])
    assert mask.any() and not mask[0, :, 4:].any()


@pytest.mark.parametrize(
    ("scale", "expected"),
    [("box_area", (0.8**2 / (1.6 * 3.2)) ** 0.5), ("cells", 8**-0.5), ("object", 1 / 8)],
)
def test_scale_of_an_object_of_eight_cells(scale: str, expected: float) -> None:
    mask, values = foreground([boxes_of(box(0.0, 0.0, 3.2 - 1e-4, 1.6 - 1e-4))], object_scale=scale)
    assert mask.sum() == 8
    torch.testing.assert_close(values[mask], torch.full((8,), expected), rtol=1e-3, atol=0)


def test_scale_of_a_tiny_object_is_bounded_by_counting_cells_or_by_a_cap() -> None:
    tiny = [boxes_of(box(0.3, 0.3, 0.2, 0.2))]
    assert foreground(tiny)[1].max() == 1
    assert foreground(tiny, object_scale="box_area")[1].max() == pytest.approx(4)
    assert foreground(tiny, object_scale="box_area", max_object_scale=1.0)[1].max() == 1


def test_first_box_of_the_list_gives_the_scale_where_boxes_overlap() -> None:
    large, small = box(0.4, 0.4, 4.0, 4.0), box(0.4, 0.4, 1.5, 1.5)
    inside, _ = foreground([boxes_of(small)])
    values = [foreground([boxes_of(*order)])[1][inside] for order in ((large, small), (small, large))]
    alone = [foreground([boxes_of(one)])[1][inside] for one in (large, small)]
    assert torch.equal(values[0], alone[0]) and torch.equal(values[1], alone[1])


def test_target_heat_is_what_the_centre_head_is_taught() -> None:
    boxes = [random_boxes(5, 9, reach_m=7), Boxes3D.empty(), boxes_of(CAR, label=3)]
    heat = target_heat(*pad_boxes(boxes), GRID)
    taught = center_targets(boxes, tuple((name,) for name in CLASSES), GRID, TargetConfig()).heatmap
    torch.testing.assert_close(heat[:, 0], taught.amax(dim=1), rtol=1e-6, atol=1e-7)


def test_regions_are_disjoint_and_cover_everything_but_an_ignored_halo() -> None:
    torch.manual_seed(0)
    boxes, heat = [boxes_of(CAR), random_boxes(6, 4)], torch.rand(2, 1, 16, 16) * 0.3
    for halo in ("background", "ignored"):
        config = RegionConfig(halo=halo)
        regions = split(boxes, config, heat)
        count = regions.foreground.int() + regions.background.int() + regions.false_positive.int()
        assert count.max() == 1
        near = target_heat(*pad_boxes(boxes), GRID) >= config.target_threshold
        left_out = (near & ~regions.foreground) if halo == "ignored" else torch.zeros_like(near)
        assert torch.equal(count == 0, left_out)
        assert regions.false_positive.any() and left_out.any() == (halo == "ignored")


def test_false_positives_are_sure_cells_away_from_objects() -> None:
    heat = torch.full((1, 1, 16, 16), 0.05)
    heat[0, 0, 0, 0] = heat[0, 0, 8, 9] = 0.5  # one far from the car, one on it
    regions = split([boxes_of(CAR)], RegionConfig(), heat)
    assert regions.foreground[0, 0, 8, 9]
    assert regions.false_positive.nonzero().tolist() == [[0, 0, 0, 0]]
    assert regions.false_positive_scale.item() == 1


@pytest.mark.parametrize("combined", [False, True])
def test_scales_stay_finite_when_all_cells_are_foreground_or_false_positives_or_nothing(
    combined: bool,
) -> None:
    config = RegionConfig(combined_scale=combined)
    everywhere = boxes_of(box(0.0, 1.6, 40.0, 40.0))
    everything = split([everywhere, Boxes3D.empty()], config, torch.ones(2, 1, 16, 16))
    assert everything.foreground[0].all() and everything.false_positive[1].all()
    nothing = split([Boxes3D.empty()], config)
    assert nothing.background.all()
    assert (nothing.background_scale == 1 / 256).all()
    for regions in (everything, nothing):
        scales = (regions.foreground_scale, regions.background_scale, regions.false_positive_scale)
        assert all(scale.isfinite().all() for scale in scales)


def test_blobs_fade_from_the_centre_and_reach_around_small_objects_or_stay_in_the_box() -> None:
    small, car = boxes_of(box(0.4, 0.4, 0.6, 0.6)), boxes_of(CAR)
    centre = (int((0.4 + 4.8) / 0.8), int((0.4 + 6.4) / 0.8))
    around = split([small], RegionConfig(shape="gaussian"))
    assert around.foreground.sum() == 25  # a blob reaches two cells out at least
    weights = around.foreground_scale[0, 0]
    assert weights.max() == weights[centre] == 1 and weights[centre[0], centre[1] + 1] < 0.6
    within, boxed = split([car], RegionConfig(shape="gaussian_in_box")), split([car], RegionConfig())
    assert not (within.foreground & ~boxed.foreground).any()
    assert (within.foreground_scale <= boxed.foreground_scale).all()


def test_a_context_ring_is_one_cell_of_half_weight_around_a_box() -> None:
    car = boxes_of(box(1.0, 2.0, 2.4, 1.6))  # cells of 0.8 m: 3 x 2 of them, 5 x 4 with the ring
    config = RegionConfig(context=ContextConfig(), object_scale="inverse_box_area")
    found = foreground_of_boxes(*pad_boxes([car]), GRID, config)
    assert found.weight is not None
    assert sorted((found.mask * found.weight).unique().tolist()) == [0.0, 0.5, 1.0]
    assert (found.mask & (found.weight == 1)).sum() == 6 and found.mask.sum() == 20
    torch.testing.assert_close(found.scale[found.mask], torch.full((20,), 1 / 6))
    regions = split([car], config)
    assert regions.background.sum() == 256 - 20
    assert regions.foreground_scale[regions.foreground].sum() == pytest.approx(6 / 6 + 0.5 * 14 / 6)


def test_the_first_of_several_objects_gives_a_ring_its_scale() -> None:
    pair = [box(-2.0, 2.0, 1.6, 1.6), box(0.4, 2.0, 1.6, 3.2)]
    config = RegionConfig(context=ContextConfig(), object_scale="inverse_box_area")
    between = tuple(GRID.cell_coordinates(torch.tensor([-0.8, 2.0])).floor().long().tolist()[::-1])
    for boxes, expected in ((pair, 1 / 4), (pair[::-1], 1 / 8)):
        found = foreground_of_boxes(*pad_boxes([boxes_of(*boxes)]), GRID, config)
        assert found.weight[0, 0][between] == 0.5
        assert found.scale[0, 0][between].item() == pytest.approx(expected)


def components_slow(region: Tensor) -> Tensor:
    """The readable twin of `one_over_component`: cell after cell, neighbour after neighbour."""
    found = torch.zeros(region.shape)
    for sample, cells in enumerate(region[:, 0].tolist()):
        left = {(y, x) for y, row in enumerate(cells) for x, inside in enumerate(row) if inside}
        while left:
            waiting, component = [left.pop()], []
            while waiting:
                y, x = waiting.pop()
                component.append((y, x))
                near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
                left -= near
                waiting.extend(near)
            for y, x in component:
                found[sample, 0, y, x] = 1 / len(component)
    return found


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 0.7, 1.0])
def test_components_are_those_found_cell_after_cell(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    region = torch.rand(3, 1, 17, 23, generator=generator) < share
    torch.testing.assert_close(one_over_component(region), components_slow(region))


def test_a_component_may_wind_but_does_not_go_around_a_corner_or_into_the_next_sample() -> None:
    spiral = ["#######", "      #", "##### #", "#   # #", "# ### #", "#     #", "#######"]
    corner = ["##     ", "  ##   "] + ["       "] * 5
    region = torch.tensor([[[list(map("#".__eq__, row)) for row in rows]] for rows in (spiral, corner)])
    region = region.view(2, 1, 7, 7)
    scale = one_over_component(region)
    assert scale[0][region[0]].unique().tolist() == [pytest.approx(1 / int(region[0].sum()))]
    assert scale[1][region[1]].tolist() == [0.5] * 4
    heat = torch.zeros(1, 1, 16, 16)
    heat[..., 0, :2] = heat[..., 15, 15] = 0.9
    targets = torch.zeros(1, 1, 16, 16)
    nothing = foreground_of_boxes(*pad_boxes([Boxes3D.empty()]), GRID, RegionConfig())
    seen = false_positives("heat", RegionConfig(), targets, heat)
    regions = split_regions(nothing, RegionConfig(), targets, seen, "component")
    weights = regions.false_positive * regions.false_positive_scale
    assert weights.sum() == 2 and weights[0, 0, 15, 15] == 1  # every component weighs the same


def test_who_sees_a_false_positive_by_hand() -> None:
    config = RegionConfig(teacher_threshold=0.1, target_threshold=0.3)
    targets = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.3]).view(1, 1, 1, 5)  # the last lies in an object's halo
    teacher = torch.tensor([0.2, 0.2, 0.5, 0.0, 0.9]).view(1, 1, 1, 5)
    student = torch.tensor([0.0, 0.2, 0.9, 0.9, 0.9]).view(1, 1, 1, 5)
    expected = {
        "heat": [True, True, True, False, False],
        "student": [False, True, True, True, False],
        "teacher_selected_student": [False, True, False, True, False],
        "union": [True, True, True, True, False],
    }
    for source, cells in expected.items():
        assert false_positives(source, config, targets, teacher, student).flatten().tolist() == cells


def test_regions_do_not_depend_on_velocity_that_is_unknown() -> None:
    unknown = boxes_of(CAR)
    unknown.boxes[:, 7:] = float("nan")
    assert torch.equal(foreground([unknown])[0], foreground([boxes_of(CAR)])[0])


def test_heat_keeps_its_peak_on_a_coarser_grid() -> None:
    heat = torch.zeros(1, 1, 16, 16)
    heat[0, 0, 5, 6] = 0.8
    coarse = heat_on_grid(heat, GRID.coarser(2))
    assert coarse.shape[-2:] == (8, 8) and coarse[0, 0, 2, 3] == pytest.approx(0.8)


def test_region_settings_refuse_what_is_no_score() -> None:
    with pytest.raises(ValueError, match=r"teacher_threshold=1\.5"):
        replace(RegionConfig(), teacher_threshold=1.5).__post_init__()
    with pytest.raises(ValueError, match="max_object_scale"):
        RegionConfig(max_object_scale=0)
    with pytest.raises(ValueError, match="context ring around shape='gaussian'"):
        RegionConfig(context=ContextConfig(), shape="gaussian")
    for settings in ({"margin_cells": 0.0}, {"weight": 0.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ContextConfig(**settings)
