import math

import msgspec
import pytest
import torch
from torch import Tensor

from distillbev.boxes import Boxes3D
from distillbev.classes import CENTERPOINT_TASKS, CLASSES
from distillbev.errors import ConfigError
from distillbev.grid import BevGrid
from distillbev.models.center_head import CenterHead, CenterHeadConfig
from distillbev.models.center_targets import BOX_MAPS, TargetConfig
from distillbev.models.nms import CircleNms, RotatedNms

GRID = BevGrid(x_range_m=(-9.6, 9.6), y_range_m=(-8.0, 8.0), cell_m=0.8)
# A circle of 0.1 m suppresses nothing here: neighbouring boxes of a task stand 2 m apart.
TINY = CenterHeadConfig(
    shared_channels=8, branch_channels=None, nms=(CircleNms(min_squared_distance_m2=0.01),) * 6
)


def example_boxes() -> Boxes3D:
    """One box of every class, well apart, with headings all around."""
    n = len(CLASSES)
    boxes = torch.zeros(n, 9)
    boxes[:, 0] = torch.linspace(-8, 8, n)
    boxes[:, 1] = torch.linspace(-6, 6, n)
    boxes[:, 2] = torch.linspace(-2, 1, n)
    boxes[:, 3:6] = torch.tensor([1.9, 0.9, 1.6]) * torch.linspace(0.5, 1, n)[:, None]
    boxes[:, 6] = torch.linspace(0.1 - math.pi, math.pi - 0.1, n)
    boxes[:, 7:] = torch.tensor([2.0, -1.0])
    return Boxes3D(boxes, torch.arange(n))


def maps_that_say(head: CenterHead, boxes: list[Boxes3D]) -> list[dict[str, Tensor]]:
    """The head maps of a perfect network: the targets, written into the cells."""
    targets = head.targets(boxes)
    rows, columns = head.grid.shape
    maps = []
    for t, heatmap in enumerate(targets.heatmaps):
        code = torch.zeros(len(boxes), 10, rows * columns)
        for b in range(len(boxes)):
            mask = targets.mask[b, t]
            code[b][:, targets.indices[b, t, mask]] = targets.boxes[b, t, mask].T
        parts = code.view(-1, 10, rows, columns).split(list(BOX_MAPS.values()), dim=1)
        logits = torch.logit(heatmap * (heatmap == 1), eps=1e-6)
        maps.append({**dict(zip(BOX_MAPS, parts, strict=True)), "heatmap": logits})
    return maps


def test_boxes_that_go_into_the_targets_come_out_of_decode() -> None:
    head = CenterHead(TINY, in_channels=4, grid=GRID)
    boxes = example_boxes()
    empty, full = head.decode(maps_that_say(head, [Boxes3D.empty(), boxes]))
    assert len(empty) == 0
    assert sorted(full.labels.tolist()) == list(range(10))
    order = full.labels.argsort()
    torch.testing.assert_close(full.boxes[order], boxes.boxes, rtol=0, atol=1e-5)
    assert full.scores is not None and float(full.scores.min()) > 0.99


def test_a_perfect_prediction_costs_nothing_but_the_clamp_of_the_scores() -> None:
    head = CenterHead(TINY, in_channels=4, grid=GRID)
    boxes = [example_boxes()]
    terms = head.loss(maps_that_say(head, boxes), head.targets(boxes))
    assert set(terms) == {"heatmap", "xy", "z", "size", "yaw", "velocity"}
    for name in ("xy", "z", "size", "yaw", "velocity"):
        assert float(terms[name]) == 0
    assert float(terms["heatmap"]) < 1e-3


def test_an_error_of_one_metre_in_z_costs_the_box_weight() -> None:
    head = CenterHead(TINY, in_channels=4, grid=GRID)
    boxes = [example_boxes()]
    maps = maps_that_say(head, boxes)
    for task in maps:
        task["height"] = task["height"] + 1
    per_task = head.loss_per_task(maps, head.targets(boxes))["z"]
    assert per_task.tolist() == pytest.approx([0.25] * 6, abs=1e-4)


def test_velocity_has_the_weight_that_its_code_weights_give() -> None:
    boxes = [example_boxes()]
    losses = []
    for weight in (0.2, 1.0):
        config = msgspec.structs.replace(TINY, code_weights=(1.0,) * 8 + (weight,) * 2)
        head = CenterHead(config, in_channels=4, grid=GRID)
        maps = maps_that_say(head, boxes)
        for task in maps:
            task["vel"] = task["vel"] + 1
        losses.append(float(head.loss(maps, head.targets(boxes))["velocity"]))
    assert losses[1] == pytest.approx(5 * losses[0], rel=1e-5)


@pytest.mark.parametrize("branch_channels", [None, 6])
def test_maps_have_the_channels_of_their_meaning(branch_channels: int | None) -> None:
    config = msgspec.structs.replace(TINY, branch_channels=branch_channels)
    head = CenterHead(config, in_channels=4, grid=GRID)
    heads = head(torch.randn(2, 4, *GRID.shape))
    assert len(heads) == 6
    for maps, task in zip(heads, CENTERPOINT_TASKS, strict=True):
        channels = {name: value.shape[1] for name, value in maps.items()}
        assert channels == {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2, "heatmap": len(task)}
        assert all(value.shape[2:] == GRID.shape for value in maps.values())


@pytest.mark.parametrize("branch_channels", [None, 6])
def test_a_fresh_head_scores_about_a_tenth_everywhere(branch_channels: int | None) -> None:
    config = msgspec.structs.replace(TINY, branch_channels=branch_channels)
    head = CenterHead(config, in_channels=4, grid=GRID).eval()
    scores = torch.cat([maps["heatmap"].sigmoid().flatten() for maps in head(torch.zeros(1, 4, *GRID.shape))])
    torch.testing.assert_close(scores, torch.full_like(scores, 0.1), rtol=0, atol=1e-2)


@pytest.mark.parametrize("branch_channels", [None, 6])
def test_the_loss_is_finite_and_fp32_under_autocast(branch_channels: int | None) -> None:
    torch.manual_seed(0)
    config = msgspec.structs.replace(TINY, branch_channels=branch_channels)
    head = CenterHead(config, in_channels=4, grid=GRID)
    boxes = [example_boxes(), Boxes3D.empty()]
    boxes[0].boxes[3, 7:] = math.nan
    with torch.autocast("cpu", torch.bfloat16):
        heads = head(torch.randn(2, 4, *GRID.shape))
        assert heads[0]["heatmap"].dtype == torch.bfloat16
        terms = head.loss(heads, head.targets(boxes))
    assert all(term.dtype == torch.float32 and bool(term.isfinite()) for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    gradients = [p.grad for p in head.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    assert all(boxes.boxes.dtype == torch.float32 for boxes in head.decode(heads))


def test_a_batch_without_boxes_asks_for_an_empty_map_only() -> None:
    head = CenterHead(TINY, in_channels=4, grid=GRID)
    heads = head(torch.randn(2, 4, *GRID.shape))
    terms = head.loss(heads, head.targets([Boxes3D.empty(), Boxes3D.empty()]))
    assert float(terms["heatmap"].detach()) > 0
    assert all(float(terms[name].detach()) == 0 for name in ("xy", "z", "size", "yaw", "velocity"))


def test_tasks_may_leave_classes_out_and_decode_still_answers_in_the_order_of_all() -> None:
    config = CenterHeadConfig(
        tasks=(("pedestrian", "car"), ("bus",)),
        shared_channels=8,
        branch_channels=None,
        nms=(CircleNms(min_squared_distance_m2=0.1), RotatedNms()),
    )
    head = CenterHead(config, in_channels=4, grid=GRID)
    (detections,) = head.decode(maps_that_say(head, [example_boxes()]))
    assert sorted(detections.labels.tolist()) == sorted(
        CLASSES.index(n) for n in ("car", "bus", "pedestrian")
    )


def test_only_the_best_candidates_within_the_range_are_kept() -> None:
    config = msgspec.structs.replace(
        TINY, max_detections_per_task=2, centre_range_m=(-9.0, -9.0, -5.0, 0.0, 9.0, 5.0)
    )
    head = CenterHead(config, in_channels=4, grid=GRID)
    (detections,) = head.decode(maps_that_say(head, [example_boxes()]))
    assert 0 < len(detections) <= 12
    assert float(detections.boxes[:, 0].max()) <= 0


def test_a_map_smaller_than_the_number_of_candidates_is_read_whole() -> None:
    grid = BevGrid(x_range_m=(-0.8, 0.8), y_range_m=(-0.8, 0.8), cell_m=0.8)
    head = CenterHead(TINY, in_channels=4, grid=grid)
    boxes, _, _ = head.candidates(0, head(torch.randn(1, 4, 2, 2))[0])
    assert boxes.shape == (1, 4, 9)


def test_settings_that_contradict_each_other_are_refused_with_a_way_out() -> None:
    for settings, message in (
        ({"tasks": (("car", "car"),)}, "distinct classes"),
        ({"tasks": (("tram",),)}, "distinct classes"),
        ({"nms": (CircleNms(),)}, "1 rules for 6 tasks"),
        ({"nms": (RotatedNms(class_scale=(1.0, 2.0)),) * 6}, "expected 1 factors"),
        ({"code_weights": (1.0,)}, "expected 10"),
        ({"branch_kernel": 2}, "odd kernel"),
    ):
        with pytest.raises(ConfigError, match=message):
            CenterHeadConfig(**settings)


def test_a_configuration_survives_its_file() -> None:
    config = CenterHeadConfig(nms=(RotatedNms(),) * 6, targets=TargetConfig(max_objects=7))
    assert msgspec.convert(msgspec.to_builtins(config), CenterHeadConfig) == config


def test_pooled_counts_weigh_every_box_alike_whatever_its_task():
    grid = BevGrid(x_range_m=(-8.0, 8.0), y_range_m=(-8.0, 8.0), cell_m=1.0)
    boxes = torch.zeros(4, 9)
    boxes[:, 0] = torch.tensor([-5.5, -1.5, 1.5, 5.5])
    boxes[:, 3:6] = 1.0
    labels = torch.tensor([0, 0, 0, 5])  # three cars, one pedestrian
    own, pooled = (
        CenterHead(CenterHeadConfig(pool_counts=pool), in_channels=8, grid=grid) for pool in (False, True)
    )
    maps = own(torch.zeros(1, 8, 16, 16))
    targets = own.targets([Boxes3D(boxes, labels)])
    first, second = own.loss_per_task(maps, targets), pooled.loss_per_task(maps, targets)
    for name in first:
        torch.testing.assert_close(second[name][0], first[name][0] * 3 / 4, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(second[name][5], first[name][5] / 4, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(second[name][1], first[name][1] / 4)  # a task without boxes counted as one
