"""CenterHead against golden f_centerhead: targets, losses, gradients, decoding and all three kinds of NMS.

The golden speaks mmdetection3d 0.17: bottom centre, (w, l, h), clockwise yaw' = -yaw - pi/2, labels in the
order of the tasks. Everything is converted here; the code under test sees our boxes and maps only.
"""

import math
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distillbev.boxes import Boxes3D
from distillbev.classes import CENTERPOINT_TASKS, CLASSES
from distillbev.grid import BevGrid
from distillbev.models.center_head import CenterHead, CenterHeadConfig
from distillbev.models.center_targets import BOX_MAPS, TargetConfig, gaussian_radius
from distillbev.models.nms import CircleNms, RotatedNms, rotated_iou

GOLDEN = Path(__file__).parents[1] / "golden" / "f_centerhead"
INPUTS, OUTPUTS, GRADIENTS = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients")
)
TASKS = range(len(CENTERPOINT_TASKS))
TASK_ORDER = [CLASSES.index(name) for task in CENTERPOINT_TASKS for name in task]
FIRST_CLASS = [sum(len(task) for task in CENTERPOINT_TASKS[:t]) for t in TASKS]
LOSS_NAMES = {
    "heatmap": "loss_heatmap",
    "xy": "loss_xy",
    "z": "loss_z",
    "size": "loss_whl",
    "yaw": "loss_yaw",
    "velocity": "loss_vel",
}
CIRCLES = tuple(
    CircleNms(min_squared_distance_m2=radius, max_boxes=10) for radius in (4.0, 12.0, 10.0, 1.0, 0.85, 0.175)
)
ROTATED = (RotatedNms(max_iou=0.2, max_candidates=24, max_boxes=10),) * 6
SCALED = tuple(
    CIRCLES[3]
    if scale is None
    else RotatedNms(max_iou=max_iou, class_scale=scale, max_candidates=24, max_boxes=10)
    for scale, max_iou in (
        ((1.0,), 0.2),
        ((0.7, 0.7), 0.2),
        ((0.4, 0.55), 0.2),
        (None, 0.0),
        ((1.0, 1.0), 0.2),
        ((4.5, 9.0), 0.5),
    )
)


def head_with(nms: tuple[CircleNms | RotatedNms, ...] = CIRCLES) -> CenterHead:
    config = CenterHeadConfig(
        shared_channels=4,
        branch_channels=None,
        targets=TargetConfig(max_objects=20, cell_rule="truncate"),
        max_detections_per_task=30,
        centre_range_m=(-9, -7.5, -2, 9, 7.5, 1.5),
        nms=nms,
    )
    grid = BevGrid(x_range_m=(-9.6, 9.6), y_range_m=(-8.0, 8.0), cell_m=0.8)
    return CenterHead(config, in_channels=4, grid=grid)


def our_boxes(old: Tensor, labels: Tensor) -> Boxes3D:
    x, y, z, w, l, h, yaw, vx, vy = old.unbind(dim=1)  # noqa: E741
    boxes = torch.stack([x, y, z + h / 2, l, w, h, -yaw - math.pi / 2, vx, vy], dim=1)
    ours = torch.tensor([*TASK_ORDER, -1])[labels]
    return Boxes3D(boxes, ours)


def old_boxes(boxes: Tensor) -> Tensor:
    """Ours -> (x, y, z of the bottom, w, l, h, clockwise yaw, vx, vy)."""
    x, y, z, l, w, h, yaw, vx, vy = boxes.unbind(dim=1)  # noqa: E741
    return torch.stack([x, y, z - h / 2, w, l, h, -yaw - math.pi / 2, vx, vy], dim=1)


def our_map(name: str, old: Tensor) -> Tensor:
    """Old raw map -> ours; it is its own inverse, and its own transpose for gradients."""
    if name == "dim":
        return old[:, [1, 0, 2]]
    return -old[:, [1, 0]] if name == "rot" else old


def golden_maps(convert: bool = True) -> list[dict[str, Tensor]]:
    names = [*BOX_MAPS, "heatmap"]
    maps = [{name: INPUTS[f"maps.task{t}.{name}"] for name in names} for t in TASKS]
    return [{name: our_map(name, m) for name, m in task.items()} for task in maps] if convert else maps


def golden_boxes(prefix: str = "") -> list[Boxes3D]:
    boxes = [our_boxes(INPUTS[f"boxes.{b}"], INPUTS[f"labels.{b}"]) for b in range(3)]
    if prefix:
        boxes[0] = our_boxes(INPUTS[f"{prefix}boxes.0"], INPUTS["labels.0"])
    return boxes


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = max(float(expected.abs().max()), 1e-12)
    assert float((actual.detach() - expected).abs().max()) <= tolerance * scale


def assert_same_boxes(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Boxes in the old convention, row by row, the angle modulo a turn."""
    assert actual.shape == expected.shape
    difference = (actual - expected).double()
    difference[:, 6] = torch.remainder(difference[:, 6] + math.pi, 2 * math.pi) - math.pi
    assert bool((difference.abs() <= tolerance).all())


def test_radii_are_the_reference_s() -> None:
    radius = gaussian_radius(INPUTS["gaussian_radius.sizes"], overlap=0.1)
    torch.testing.assert_close(radius, OUTPUTS["gaussian_radius.radius"], rtol=1e-5, atol=1e-6)
    assert torch.equal(radius.int(), OUTPUTS["gaussian_radius.radius"].int())


@pytest.mark.parametrize("task", TASKS)
def test_targets_are_the_reference_s(task: int) -> None:
    targets = head_with().targets(golden_boxes())
    golden = {name: OUTPUTS[f"targets.task{task}.{name}"] for name in ("heatmap", "anno_box", "ind", "mask")}
    torch.testing.assert_close(targets.heatmaps[task], golden["heatmap"], rtol=0, atol=1e-6)
    assert torch.equal(targets.heatmaps[task] == 1, golden["heatmap"] == 1)
    assert torch.equal(targets.mask[:, task], golden["mask"].bool())
    assert torch.equal(targets.indices[:, task], golden["ind"])
    code = golden["anno_box"][..., [0, 1, 2, 4, 3, 5, 7, 6, 8, 9]].clone()
    code[..., 6:8] *= -1
    torch.testing.assert_close(targets.boxes[:, task], code + 0.0, rtol=0, atol=1e-6)


def test_losses_are_the_reference_s() -> None:
    head = head_with()
    terms = head.loss_per_task(golden_maps(), head.targets(golden_boxes()))
    for ours, theirs in LOSS_NAMES.items():
        for task in TASKS:
            assert_relative(terms[ours][task], OUTPUTS[f"loss.task{task}.{theirs}"], 1e-5)
    for task in TASKS:
        plain = sum(terms[name][task] for name in LOSS_NAMES if name != "heatmap")
        assert_relative(torch.as_tensor(plain), OUTPUTS[f"loss_unsplit.task{task}.loss_bbox"], 1e-5)
    total = sum(head.loss(golden_maps(), head.targets(golden_boxes())).values())
    assert_relative(torch.as_tensor(total), OUTPUTS["loss.total"], 1e-5)


def test_unknown_velocities_ask_for_nothing() -> None:
    head = head_with()
    maps = [{name: m.clone().requires_grad_() for name, m in task.items()} for task in golden_maps()]
    terms = head.loss_per_task(maps, head.targets(golden_boxes("nan.")))
    for task in TASKS:
        assert_relative(terms["velocity"][task], OUTPUTS[f"nan_masked.task{task}.loss_vel"], 1e-5)
        assert_relative(terms["yaw"][task], OUTPUTS[f"nan.loss.task{task}.loss_yaw"], 1e-5)
    torch.stack([t.sum() for t in terms.values()]).sum().backward()
    assert all(bool(m.grad.isfinite().all()) for task in maps for m in task.values() if m.grad is not None)


def test_gradients_are_the_reference_s() -> None:
    head = head_with()
    maps = [{name: m.clone().requires_grad_() for name, m in task.items()} for task in golden_maps()]
    torch.stack(list(head.loss(maps, head.targets(golden_boxes())).values())).sum().backward()
    for t in TASKS:
        for name, m in maps[t].items():
            assert m.grad is not None
            assert_relative(our_map(name, m.grad), GRADIENTS[f"maps.task{t}.{name}"], 1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_decoded_candidates_are_the_reference_s(task: int) -> None:
    head = head_with()
    boxes, classes, scores = head.candidates(task, golden_maps()[task])
    low, high = torch.tensor(head.config.centre_range_m).split(3)
    for b in range(3):
        keep = (scores[b] > 0.1) & ((boxes[b, :, :3] >= low) & (boxes[b, :, :3] <= high)).all(dim=1)
        golden = {name: OUTPUTS[f"decode.task{task}.{b}.{name}"] for name in ("bboxes", "scores", "labels")}
        expected = golden["bboxes"].clone()
        expected[:, 2] -= expected[:, 5] / 2  # decoded boxes have the gravity centre
        assert_same_boxes(old_boxes(boxes[b][keep]), expected)
        torch.testing.assert_close(scores[b][keep], golden["scores"], rtol=0, atol=1e-5)
        assert torch.equal(classes[b][keep], golden["labels"].long())


def in_second_range(detections: Boxes3D, rotated_tasks: set[int]) -> Boxes3D:
    """The reference filters once more by centre after rotated NMS; we have one range only."""
    task_of = torch.tensor([next(t for t in TASKS if name in CENTERPOINT_TASKS[t]) for name in CLASSES])
    low, high = torch.tensor([-8.5, -8.5, -1.8]), torch.tensor([8.5, 8.5, 1.5])
    centre = detections.boxes[:, :3]
    inside = ((centre >= low) & (centre <= high)).all(dim=1)
    exempt = torch.tensor([int(t) not in rotated_tasks for t in task_of[detections.labels]], dtype=torch.bool)
    return detections[inside | exempt]


@pytest.mark.parametrize(
    ("kind", "nms", "rotated_tasks"),
    [
        ("circle", CIRCLES, set()),
        ("rotate", ROTATED, {0, 1, 2, 3, 4, 5}),
        ("scale", SCALED, {0, 1, 2, 4, 5}),
        ("rotate_v1x", ROTATED, {0, 1, 2, 3, 4, 5}),
    ],
)
def test_survivors_are_the_reference_s(
    kind: str, nms: tuple[CircleNms | RotatedNms, ...], rotated_tasks: set[int]
) -> None:
    # From 1.0 on mmdetection3d has our order of sizes and our yaw: the same numbers need no conversion.
    new_convention = kind == "rotate_v1x"
    detections = head_with(nms).decode(golden_maps(convert=not new_convention))
    for b in range(3):
        kept = in_second_range(detections[b], rotated_tasks)
        expected = {name: OUTPUTS[f"{kind}.{b}.{name}"] for name in ("bboxes", "scores", "labels")}
        assert torch.equal(kept.labels, torch.tensor(TASK_ORDER)[expected["labels"].long()])
        assert kept.scores is not None
        torch.testing.assert_close(kept.scores, expected["scores"], rtol=0, atol=1e-5)
        actual = old_boxes(kept.boxes)
        if new_convention:
            actual = kept.boxes.clone()
            actual[:, 2] -= actual[:, 5] / 2
        assert_same_boxes(actual, expected["bboxes"])


def test_overlaps_are_the_reference_s_in_both_conventions() -> None:
    boxes = INPUTS["iou.boxes"]
    clockwise = boxes.clone()
    clockwise[:, 4] *= -1
    torch.testing.assert_close(rotated_iou(boxes, boxes), OUTPUTS["iou.counterclockwise"], rtol=0, atol=1e-4)
    torch.testing.assert_close(rotated_iou(clockwise, clockwise), OUTPUTS["iou.clockwise"], rtol=0, atol=1e-4)


def test_the_head_survives_a_round_trip_through_its_configuration_file() -> None:
    config = head_with(SCALED).config
    assert msgspec.convert(msgspec.to_builtins(config), CenterHeadConfig) == config
