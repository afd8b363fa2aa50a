"""The BEVDet family's head against golden f_bevdet_head_huang: forward, targets, losses, decode, Scale-NMS.

The golden is in the old convention (bottom centre, width first, clockwise yaw); it is converted here.
"""

import math
import re
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
from distillbev.models.center_targets import BOX_MAPS, TargetConfig
from distillbev.models.nms import CircleNms, RotatedNms

GOLDEN = Path(__file__).parents[1] / "golden" / "f_bevdet_head_huang"
INPUTS, OUTPUTS, GRADIENTS, WEIGHTS = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients", "weights")
)
TASKS = range(len(CENTERPOINT_TASKS))
TASK_ORDER = torch.tensor([CLASSES.index(name) for task in CENTERPOINT_TASKS for name in task])
LOSS_NAMES = {
    "heatmap": "heatmap",
    "xy": "xy",
    "z": "z",
    "size": "whl",
    "yaw": "yaw",
    "velocity": "vel",
}
CIRCLES = tuple(CircleNms(min_squared_distance_m2=radius) for radius in (4.0, 12.0, 10.0, 1.0, 0.85, 0.175))
SCALES = ((1.0,), (0.7, 0.7), (0.4, 0.55), (1.1,), (1.0, 1.0), (4.5, 9.0))
SCALED = tuple(
    CIRCLES[3] if t == 3 else RotatedNms(max_iou=0.5 if t == 5 else 0.2, class_scale=SCALES[t]) for t in TASKS
)
UNSCALED = tuple(
    rule if isinstance(rule, CircleNms) else msgspec.structs.replace(rule, class_scale=None)
    for rule in SCALED
)


def head_with(nms: tuple[CircleNms | RotatedNms, ...] = SCALED) -> CenterHead:
    config = CenterHeadConfig(
        shared_channels=8,
        branch_channels=8,
        targets=TargetConfig(max_objects=12, cell_rule="truncate"),
        max_detections_per_task=100,
        nms=nms,
    )
    grid = BevGrid(x_range_m=(-12.8, 12.8), y_range_m=(-9.6, 12.8), cell_m=0.8)
    return CenterHead(config, in_channels=6, grid=grid)


def our_map(name: str, old: Tensor) -> Tensor:
    """Old raw map -> ours; it is its own inverse, and its own transpose for gradients."""
    if name == "dim":
        return old[:, [1, 0, 2]]
    return -old[:, [1, 0]] if name == "rot" else old


def golden_maps(gradient: bool = False) -> list[dict[str, Tensor]]:
    return [
        {
            name: our_map(name, INPUTS[f"pred.task{t}.{name}"]).clone().requires_grad_(gradient)
            for name in [*BOX_MAPS, "heatmap"]
        }
        for t in TASKS
    ]


def golden_boxes() -> list[Boxes3D]:
    samples = []
    for b in range(2):
        x, y, z, w, l, h, yaw, vx, vy = INPUTS[f"boxes.{b}"].unbind(dim=1)  # noqa: E741
        boxes = torch.stack([x, y, z + h / 2, l, w, h, -yaw - math.pi / 2, vx, vy], dim=1)
        samples.append(Boxes3D(boxes, TASK_ORDER[INPUTS[f"labels.{b}"]]))
    return samples


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    scale = max(float(expected.abs().max()), 1e-12)
    assert float((actual.detach() - expected).abs().max()) <= tolerance * scale


def assert_boxes(ours: Tensor, expected: Tensor, bottom_centre: bool) -> None:
    x, y, z, l, w, h, yaw, vx, vy = ours.unbind(dim=1)  # noqa: E741
    z = z - h / 2 if bottom_centre else z
    difference = torch.stack([x, y, z, w, l, h, -yaw - math.pi / 2, vx, vy], dim=1) - expected
    difference[:, 6] = torch.remainder(difference[:, 6] + math.pi, 2 * math.pi) - math.pi
    assert bool((difference.abs() <= 1e-5 * expected.abs().clamp(min=1)).all())


def test_every_map_of_the_forward_is_the_reference_s() -> None:
    head = head_with().eval()
    state = {}
    for name, weight in WEIGHTS.items():
        if re.search(r"\.dim\.1\.(weight|bias)$", name):
            weight = weight[[1, 0, 2]]
        elif re.search(r"\.rot\.1\.(weight|bias)$", name):
            weight = -weight[[1, 0]]
        state[name] = weight
    head.load_state_dict(state)
    for t, maps in enumerate(head(INPUTS["feat"])):
        for name, value in maps.items():
            assert_relative(our_map(name, value), OUTPUTS[f"fwd.task{t}.{name}"])


@pytest.mark.parametrize("task", TASKS)
def test_targets_are_the_reference_s(task: int) -> None:
    targets = head_with().targets(golden_boxes())
    golden = {name: OUTPUTS[f"target.task{task}.{name}"] for name in ("heatmap", "anno_box", "ind", "mask")}
    torch.testing.assert_close(targets.heatmaps[task], golden["heatmap"], rtol=0, atol=1e-5)
    assert torch.equal(targets.mask[:, task], golden["mask"].bool())
    assert torch.equal(targets.indices[:, task], golden["ind"].long())
    code = golden["anno_box"][..., [0, 1, 2, 4, 3, 5, 7, 6, 8, 9]].clone()
    code[..., 6:8] *= -1
    torch.testing.assert_close(targets.boxes[:, task], code, rtol=0, atol=1e-5)


def test_losses_and_their_gradients_are_the_reference_s() -> None:
    head, maps = head_with(), golden_maps(gradient=True)
    terms = head.loss_per_task(maps, head.targets(golden_boxes()))
    for t in TASKS:
        for ours, theirs in LOSS_NAMES.items():
            assert_relative(terms[ours][t], OUTPUTS[f"loss.task{t}.loss_{theirs}"])
        box = torch.stack([terms[name][t] for name in LOSS_NAMES if name != "heatmap"]).sum()
        assert_relative(box, OUTPUTS[f"plain_loss.task{t}.loss_bbox"])
    total = torch.stack(list(terms.values())).sum()
    assert_relative(total, OUTPUTS["loss.total"])
    total.backward()
    for t in TASKS:
        for name, value in maps[t].items():
            assert value.grad is not None
            assert_relative(our_map(name, value.grad), GRADIENTS[f"pred.task{t}.{name}"])


@pytest.mark.parametrize("task", TASKS)
def test_decoded_candidates_are_the_reference_s(task: int) -> None:
    head = head_with()
    boxes, classes, scores = head.candidates(task, golden_maps()[task])
    low, high = torch.tensor(head.config.centre_range_m).split(3)
    for b in range(2):
        keep = (scores[b] > 0.1) & ((boxes[b, :, :3] >= low) & (boxes[b, :, :3] <= high)).all(dim=1)
        golden = {name: OUTPUTS[f"decoded.task{task}.{b}.{name}"] for name in ("boxes", "scores", "labels")}
        assert_boxes(boxes[b][keep], golden["boxes"], bottom_centre=False)
        assert_relative(scores[b][keep], golden["scores"])
        assert torch.equal(classes[b][keep], golden["labels"].long())


@pytest.mark.parametrize(
    ("kind", "nms"), [("det", SCALED), ("det_noscale", UNSCALED), ("det_circle", CIRCLES)]
)
def test_survivors_are_the_reference_s(kind: str, nms: tuple[CircleNms | RotatedNms, ...]) -> None:
    for b, detections in enumerate(head_with(nms).decode(golden_maps())):
        golden = {name: OUTPUTS[f"{kind}.{b}.{name}"] for name in ("boxes", "scores", "labels")}
        assert torch.equal(detections.labels, TASK_ORDER[golden["labels"].long()])
        assert detections.scores is not None
        assert_relative(detections.scores, golden["scores"])
        assert_boxes(detections.boxes, golden["boxes"], bottom_centre=True)
