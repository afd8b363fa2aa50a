"""A whole small BEVDet against golden c6_bevdet_forward, from images to losses and gradients.

The golden speaks the old box convention (bottom centre, width first, clockwise yaw); weights of the dim and
rot branches and boxes are brought to ours, maps and gradients are turned back.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distillbev.boxes import Boxes3D
from distillbev.classes import CENTERPOINT_TASKS, CLASSES
from distillbev.data.schema import Batch
from distillbev.grid import BevGrid
from distillbev.models.bev_encoder import BevEncoderConfig, LssNeckConfig
from distillbev.models.bevdet import BevDet, BevDetConfig
from distillbev.models.center_head import CenterHeadConfig
from distillbev.models.center_targets import TargetConfig
from distillbev.models.image_encoder import ImageEncoderConfig, ResNet, ResNetConfig
from distillbev.models.lift import DepthBins, LiftConfig
from distillbev.models.outputs import DetectorOutput
from distillbev.weights.rename import BEVDET, renamed
from distillbev.weights.rename import turn_weight as turn

GOLDEN = Path(__file__).parents[1] / "golden" / "c6_bevdet_forward"
INPUTS, OUTPUTS, GRADIENTS, WEIGHTS = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients", "weights")
)
GRID = BevGrid(x_range_m=(-12.8, 12.8), y_range_m=(-9.6, 16.0), cell_m=0.8)
FORWARD, BACKWARD = 1e-3, 5e-3  # the golden's own tolerances, relative to the largest entry
TASK_ORDER = [CLASSES.index(name) for task in CENTERPOINT_TASKS for name in task]
LOSS_NAMES = {
    "heatmap": "loss_heatmap",
    "xy": "loss_xy",
    "z": "loss_z",
    "size": "loss_whl",
    "yaw": "loss_yaw",
    "velocity": "loss_vel",
}


def our_name(name: str) -> str:
    ours = renamed(name, BEVDET)
    assert ours is not None, name
    return ours


def old_map(name: str, value: Tensor) -> Tensor:
    if name == "dim":
        return value[:, [1, 0, 2]]
    return -value[:, [1, 0]] if name == "rot" else value


def model(train: bool = False) -> BevDet:
    config = BevDetConfig(
        grid=GRID,
        image_encoder=ImageEncoderConfig(backbone=ResNetConfig(base_width=4), out_channels=16),
        lift=LiftConfig(
            channels=4,
            depth=DepthBins(start_m=1, stop_m=19, step_m=1.5),
            corner_aligned_pixels=True,
            truncate_cells=True,
        ),
        bev_encoder=BevEncoderConfig(channels=(8, 16, 32)),
        bev_neck=LssNeckConfig(out_channels=8),
        head=CenterHeadConfig(
            shared_channels=8, branch_channels=8, targets=TargetConfig(max_objects=40, cell_rule="truncate")
        ),
    )
    detector = BevDet(config)
    geometry = re.compile(r"img_view_transformer\.(dx|bx|nx|frustum)$")  # ours follows from the configuration
    detector.load_state_dict({our_name(n): turn(n, w) for n, w in WEIGHTS.items() if not geometry.match(n)})
    return detector.train(train)


def batch() -> Batch:
    image_aug, cam2img, cam2lidar = (torch.eye(4).repeat(1, 2, 1, 1) for _ in range(3))
    image_aug[..., :3, :3] = INPUTS["post_rots"]
    image_aug[..., :2, 2] += INPUTS["post_trans"][..., :2]
    cam2img[..., :3, :3] = image_aug[..., :3, :3] @ INPUTS["intrins"]
    cam2lidar[..., :3, :3] = INPUTS["rots"]
    cam2lidar[..., :3, 3] = INPUTS["trans"]
    x, y, z, w, l, h, yaw, vx, vy = INPUTS["boxes.0"].unbind(dim=1)  # noqa: E741
    boxes = torch.stack([x, y, z + h / 2, l, w, h, -yaw - math.pi / 2, vx, vy], dim=1)
    return Batch(
        tokens=["golden"],
        images=INPUTS["imgs"].clone(),
        cam2img=cam2img,
        cam2lidar=cam2lidar,
        image_aug=image_aug,
        bev_aug=torch.eye(4)[None],
        lidar2global=torch.eye(4, dtype=torch.float64)[None],
        points=None,
        boxes=[Boxes3D(boxes, torch.tensor(TASK_ORDER)[INPUTS["labels.0"]])],
    )


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    assert actual.shape == expected.shape, name
    scale = max(float(expected.abs().max()), 1e-12)
    assert float((actual.detach() - expected).abs().max()) <= tolerance * scale, name


def assert_maps(output: DetectorOutput, mode: str) -> int:
    """Every map of ours that the golden has in this mode; returns how many it was."""
    names = {
        "lss": "lifted",
        "backbone0": "stage0",
        "backbone1": "stage1",
        "backbone2": "stage2",
        "head": "head",
    }
    ours = {old: output.bev[new].features for old, new in names.items()}
    for t, task in enumerate(output.heads):
        ours |= {f"task{t}.{name}": old_map(name, value) for name, value in task.items()}
    compared = [name for name in ours if f"{mode}.{name}" in OUTPUTS]
    for name in compared:
        assert_relative(ours[name], OUTPUTS[f"{mode}.{name}"], FORWARD, f"{mode}.{name}")
    return len(compared)


def assert_losses(detector: BevDet, output: DetectorOutput, sample: Batch, prefix: str) -> None:
    boxes = [b for b in sample.boxes if b is not None]
    per_task = detector.head.loss_per_task(output.heads, detector.head.targets(boxes))
    for name, values in per_task.items():
        expected = torch.stack([OUTPUTS[f"{prefix}loss.task{t}.{LOSS_NAMES[name]}"] for t in range(6)])
        assert_relative(values, expected, FORWARD, name)
    total = torch.stack(list(detector.loss(output, sample).values())).sum()
    assert_relative(total, OUTPUTS[f"{prefix}loss.total"], FORWARD, "total")


def test_the_image_encoder_is_the_reference_s() -> None:
    encoder = model().image_encoder
    assert isinstance(encoder.backbone, ResNet)
    images = INPUTS["imgs"].flatten(0, 1)
    backbone = encoder.backbone
    stem = backbone.maxpool(torch.relu(backbone.bn1(backbone.conv1(images))))
    assert_relative(stem, OUTPUTS["eval.img.stem"], FORWARD, "stem")
    *_, c4, c5 = backbone(images)
    assert_relative(c4, OUTPUTS["eval.img.c4"], FORWARD, "c4")
    assert_relative(c5, OUTPUTS["eval.img.c5"], FORWARD, "c5")
    neck = encoder(INPUTS["imgs"]).flatten(0, 1)
    assert_relative(neck, OUTPUTS["eval.img.neck"], FORWARD, "neck")


@pytest.mark.parametrize(("mode", "maps", "prefix"), [("eval", 41, ""), ("train", 4, "train.")])
def test_maps_and_losses_are_the_reference_s(mode: str, maps: int, prefix: str) -> None:
    detector, sample = model(train=mode == "train"), batch()
    output = detector(sample)
    assert assert_maps(output, mode) == maps
    assert_losses(detector, output, sample, prefix)


def test_gradients_are_the_reference_s() -> None:
    detector, sample = model(), batch()
    assert sample.images is not None
    sample.images.requires_grad_()
    torch.stack(list(detector.loss(detector(sample), sample).values())).sum().backward()
    assert sample.images.grad is not None
    assert_relative(sample.images.grad, GRADIENTS["imgs"], BACKWARD, "imgs")
    gradients = {name: parameter.grad for name, parameter in detector.named_parameters()}
    norms = 0
    for name, expected in GRADIENTS.items():
        if name == "imgs":
            continue
        old = name.removeprefix("norm.")
        gradient = gradients[our_name(old)]
        assert gradient is not None, old
        if name.startswith("norm."):
            assert_relative(gradient.norm(), expected, BACKWARD, name)
            norms += 1
        else:
            assert_relative(turn(old, gradient), expected, BACKWARD, name)
    assert norms == len(gradients)
