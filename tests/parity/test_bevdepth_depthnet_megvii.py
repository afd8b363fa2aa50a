"""Megvii's depth net, depth targets and depth loss against golden c3_bevdepth_depthnet_megvii.

The golden's BEV lies in the ego frame, ours in the LiDAR frame: its camera -> ego matrices stand for ours.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from distillbev.data.schema import Batch
from distillbev.models.depth_net import DepthAggregation, MegviiDepthNet, MegviiDepthNetConfig
from distillbev.models.lift import DepthBins, DepthLossConfig, depth_bins, depth_loss, depth_targets

GOLDEN = Path(__file__).parents[1] / "golden" / "c3_bevdepth_depthnet_megvii"
INPUTS, OUTPUTS, GRADIENTS, WEIGHTS = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients", "weights")
)
BINS = DepthBins(start_m=2, stop_m=14, step_m=1)
STRIDE_PX = 16
FORWARD, BACKWARD = 1e-5, 1e-4  # the golden's own tolerances, relative to the largest entry


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    assert actual.shape == expected.shape, name
    assert float((actual.detach() - expected).abs().max()) <= tolerance * float(expected.abs().max()), name


def net(train: bool = False) -> MegviiDepthNet:
    config = MegviiDepthNetConfig(mid_channels=16, dropout=0.0)
    made = MegviiDepthNet(config, in_channels=12, context_channels=6, num_depth_bins=12)
    made.load_state_dict(of_part("depth_net."))
    return made.train(train)


def of_part(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): w for name, w in WEIGHTS.items() if name.startswith(prefix)}


def batch() -> Batch:
    image_aug = torch.eye(4).repeat(2, 3, 1, 1)
    image_aug[..., :2, :2] = INPUTS["ida_mats"][:, 0, :, :2, :2]
    image_aug[..., :2, 2] = INPUTS["ida_mats"][:, 0, :, :2, 3]  # ours acts on (u d, v d, d)
    return Batch(
        tokens=["first", "second"],
        images=None,
        cam2img=image_aug @ INPUTS["intrin_mats"][:, 0],
        cam2lidar=INPUTS["bda_mat"][:, None] @ INPUTS["sensor2ego_mats"][:, 0],
        image_aug=image_aug,
        bev_aug=INPUTS["bda_mat"],
        lidar2global=torch.eye(4, dtype=torch.float64).repeat(2, 1, 1),
        points=None,
        boxes=[None, None],
    )


def golden_targets() -> Tensor:
    """(6, 4, 11) bins, -1 where the golden's one-hot vector is empty."""
    one_hot = OUTPUTS["depth_target"]
    return torch.where(one_hot.sum(dim=1) > 0, one_hot.argmax(dim=1), -1)


def test_the_camera_s_numbers_are_the_reference_s() -> None:
    numbers = MegviiDepthNet.camera_numbers(batch()).flatten(0, 1)
    assert_relative(numbers, OUTPUTS["cam_params"], FORWARD)
    for column in range(27):
        torch.testing.assert_close(numbers[:, column], OUTPUTS["cam_params"][:, column], rtol=1e-5, atol=1e-5)


def test_every_layer_gives_what_the_reference_s_gives() -> None:
    made, numbers = net(), OUTPUTS["cam_params"]
    layers: dict[str, nn.Module] = {
        "cam_params_bn": made.bn,
        "reduce": made.reduce_conv,
        "context_se": made.context_se,
        "depth_se": made.depth_se,
        "blocks": made.depth_conv[2],
        "aspp": made.depth_conv[3],
        "dcn": made.depth_conv[4],
    }
    seen: dict[str, Any] = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
    depth, context = made(INPUTS["x"], numbers)
    assert seen.keys() == layers.keys()
    for name, value in seen.items():
        assert_relative(value, OUTPUTS[name], FORWARD, name)
    assert_relative(depth, OUTPUTS["depth_logits"], FORWARD)
    assert_relative(context, OUTPUTS["context"], FORWARD)
    assert_relative(depth.softmax(dim=1), OUTPUTS["depth"], FORWARD)


def test_training_gives_the_reference_s_maps_and_statistics() -> None:
    made = net(train=True)
    depth, context = made(INPUTS["x"], OUTPUTS["cam_params"])
    assert_relative(depth, OUTPUTS["train.depth_logits"], BACKWARD)
    assert_relative(context, OUTPUTS["train.context"], BACKWARD)
    for name in ("running_mean", "running_var"):
        assert_relative(getattr(made.bn, name), OUTPUTS[f"train.after.bn.{name}"], FORWARD, name)


def test_the_aggregation_of_depth_is_the_reference_s() -> None:
    aggregation = DepthAggregation(6)
    aggregation.load_state_dict(of_part("depth_aggregation_net."))
    volume = OUTPUTS["depth"][:, None] * OUTPUTS["context"][:, :, None]
    assert_relative(aggregation.eval()(volume), OUTPUTS["agg_out"], FORWARD)


def test_labels_from_the_reference_s_depth_map_are_the_reference_s() -> None:
    depths = INPUTS["depth_map"].flatten(0, 1)[:, None]
    nearest = -functional.max_pool2d(-torch.where(depths > 0, depths, torch.inf), STRIDE_PX)[:, 0]
    assert torch.equal(depth_bins(nearest, BINS, nearest_bin=False), golden_targets())


def test_labels_from_points_are_the_reference_s() -> None:
    """The reference lets the last of the points in one pixel win; only that one is given to ours."""
    sample = batch()
    cam2img = sample.cam2img.flatten(0, 1)
    points = []
    for camera, seen in zip(range(6), INPUTS["points"].flatten(0, 1), strict=True):
        u, v, depth = seen.unbind(dim=1)
        rays = torch.stack([u * depth, v * depth, depth], dim=1)
        moved = rays @ sample.image_aug.flatten(0, 1)[camera, :3, :3].T
        pixels = (moved[:, :2] / moved[:, 2:]).trunc().long().tolist()
        last = {tuple(pixel): i for i, pixel in enumerate(pixels)}
        in_camera = rays @ torch.linalg.inv(INPUTS["intrin_mats"].flatten(0, 2)[camera, :3, :3]).T
        points.append(functional.pad(in_camera[sorted(last.values())], (0, 2)))
    identity = torch.eye(4).repeat(6, 1, 1, 1)
    targets = depth_targets(points, cam2img[:, None], identity, BINS, (4, 11), STRIDE_PX, labels="megvii")
    assert torch.equal(targets[:, 0], golden_targets())


def test_the_loss_is_the_reference_s() -> None:
    loss = depth_loss(
        OUTPUTS["depth_logits"].unflatten(0, (2, 3)),
        golden_targets().unflatten(0, (2, 3)),
        DepthLossConfig.megvii(),
    )
    assert_relative(loss, OUTPUTS["loss_depth"], FORWARD)


def test_gradients_are_the_reference_s() -> None:
    made = net()
    features = INPUTS["x"].clone().requires_grad_()
    depth, context = made(features, OUTPUTS["cam_params"])
    depth.retain_grad()
    context.retain_grad()
    loss = depth_loss(
        depth.unflatten(0, (2, 3)), golden_targets().unflatten(0, (2, 3)), DepthLossConfig.megvii()
    )
    (loss + (context * INPUTS["grad_context"]).sum()).backward()
    gradients = {f"depth_net.{name}": parameter.grad for name, parameter in made.named_parameters()}
    gradients |= {"x": features.grad, "depth_logits": depth.grad, "context": context.grad}
    for name, expected in GRADIENTS.items():
        gradient = gradients[name]
        assert gradient is not None, name
        assert_relative(gradient, expected, BACKWARD, name)
    assert len(GRADIENTS) == 14
