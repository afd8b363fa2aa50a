"""The released student's depth net, labels, loss and lift against golden c4_bevdepth_depthnet_fork."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from distillbev.data.schema import Batch
from distillbev.grid import BevGrid
from distillbev.models.depth_net import (
    DepthAggregation,
    MegviiDepthNet,
    MegviiDepthNetConfig,
    ReleaseDepthNet,
    ReleaseDepthNetConfig,
)
from distillbev.models.lift import (
    DepthBins,
    DepthLift,
    DepthLossConfig,
    LiftConfig,
    depth_bins,
    depth_loss,
    depth_targets,
    nearest_depths,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "c4_bevdepth_depthnet_fork"
INPUTS, OUTPUTS, GRADIENTS, WEIGHTS = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients", "weights")
)
BINS = DepthBins(start_m=1, stop_m=13, step_m=1)
GRID = BevGrid(x_range_m=(-12.8, 12.8), y_range_m=(-9.6, 12.8), cell_m=0.8)
STRIDE_PX = 16
FORWARD, BACKWARD = 1e-5, 1e-4  # the golden's own tolerances, relative to the largest entry
GEOMETRY = ("vt.dx", "vt.bx", "vt.nx", "vt.frustum")  # ours follows from the configuration
PREFIXES = {
    "vt.featnet.": "context_conv.",
    "vt.se.input_conv.": "reduce_conv.",
    "vt.se.fc.0.": "camera_norm.",
    "vt.se.fc.1.": "camera_gate.",
    "vt.extra_depthnet.layers.0.": "blocks.",
    "vt.dcn.0.": "deform.",
    "vt.dcn.1.": "deform_norm.",
    "vt.depthnet.": "depth_conv.",
}


def our_name(name: str) -> str:
    for old, new in PREFIXES.items():
        if name.startswith(old):
            return f"depth_net.{new}{name.removeprefix(old)}"
    raise AssertionError(name)


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    assert actual.shape == expected.shape, name
    assert float((actual.detach() - expected).abs().max()) <= tolerance * float(expected.abs().max()), name


def lift(train: bool = False) -> DepthLift:
    config = LiftConfig(
        channels=4,
        depth=BINS,
        depth_net=ReleaseDepthNetConfig(mid_channels=6),
        corner_aligned_pixels=True,
        truncate_cells=True,
    )
    made = DepthLift(config, in_channels=8, grid=GRID, stride_px=STRIDE_PX)
    weights = {n: w for n, w in WEIGHTS.items() if n.startswith("vt.") and n not in GEOMETRY}
    made.load_state_dict({our_name(name): weight for name, weight in weights.items()})
    return made.train(train)


def depth_net(made: DepthLift) -> ReleaseDepthNet:
    assert isinstance(made.depth_net, ReleaseDepthNet)
    return made.depth_net


def matrices(rotation: Tensor, place: Tensor) -> Tensor:
    made = torch.eye(4).repeat(2, 3, 1, 1)
    made[..., :3, :3] = rotation
    made[..., :3, 3] = place
    return made


def batch() -> Batch:
    image_aug, cam2img = torch.eye(4).repeat(2, 3, 1, 1), torch.eye(4).repeat(2, 3, 1, 1)
    image_aug[..., :3, :3] = INPUTS["post_rots"]
    image_aug[..., :2, 2] += INPUTS["post_trans"][..., :2]
    cam2img[..., :3, :3] = image_aug[..., :3, :3] @ INPUTS["intrins"]
    return Batch(
        tokens=["first", "second"],
        images=None,
        cam2img=cam2img,
        cam2lidar=matrices(INPUTS["rots"], INPUTS["trans"]),
        image_aug=image_aug,
        bev_aug=torch.eye(4).repeat(2, 1, 1),
        lidar2global=torch.eye(4, dtype=torch.float64).repeat(2, 1, 1),
        points=None,
        boxes=[None, None],
    )


def run(made: DepthLift, features: Tensor) -> tuple[Tensor, Tensor]:
    sample, numbers = batch(), OUTPUTS["cam_params"].unflatten(0, (2, 3))
    return made(features, sample.cam2img, sample.cam2lidar, numbers)


def golden_bins() -> Tensor:
    depths = torch.where(INPUTS["depth_gt"] > 0, INPUTS["depth_gt"], torch.inf)
    return depth_bins(depths, BINS, nearest_bin=False)


def test_the_camera_s_numbers_are_the_reference_s() -> None:
    numbers = ReleaseDepthNet.camera_numbers(batch()).flatten(0, 1)
    torch.testing.assert_close(numbers, OUTPUTS["cam_params"], rtol=1e-5, atol=1e-5)


def test_every_layer_gives_what_the_reference_s_gives() -> None:
    made = lift()
    net, seen = depth_net(made), {}
    layers = {
        "se_gate": net.camera_gate,
        "se": net.blocks,
        "extra": net.blocks,
        "dcn_raw": net.deform,
        "dcn": net.deform_norm,
    }
    for name, layer in layers.items():
        if name == "se":
            layer.register_forward_pre_hook(lambda _m, given: seen.__setitem__("se", given[0]))
        else:
            layer.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
    depth, context = net(INPUTS["x"].flatten(0, 1), OUTPUTS["cam_params"])
    seen["se_gate"] = seen["se_gate"].sigmoid()
    for name in layers:
        assert_relative(seen[name], OUTPUTS[name], FORWARD, name)
    assert_relative(depth, OUTPUTS["depth_logits"], FORWARD)
    assert_relative(depth.softmax(dim=1), OUTPUTS["depth"], FORWARD)
    assert_relative(context, OUTPUTS["context"], FORWARD)


def test_the_lift_with_its_net_is_the_reference_s() -> None:
    bev, logits = run(lift(), INPUTS["x"])
    assert_relative(bev, OUTPUTS["bev"], FORWARD)
    assert_relative(logits.flatten(0, 1), OUTPUTS["depth_logits"], FORWARD)


def test_training_gives_the_reference_s_maps_and_statistics() -> None:
    made = lift(train=True)
    bev, logits = run(made, INPUTS["x"])
    assert_relative(bev, OUTPUTS["train.bev"], BACKWARD)
    assert_relative(logits.flatten(0, 1), OUTPUTS["train.depth_logits"], BACKWARD)
    norm = depth_net(made).camera_norm
    for name in ("running_mean", "running_var"):
        assert_relative(getattr(norm, name), OUTPUTS[f"train.after.se.fc.0.{name}"], FORWARD, name)


def test_depths_and_labels_from_points_are_the_reference_s() -> None:
    points = [functional.pad(rows, (0, 2)) for rows in INPUTS["points"]]
    cam2lidar = matrices(INPUTS["cam2lidar.rots"], INPUTS["cam2lidar.trans"])
    nearest = nearest_depths(
        points, batch().cam2img, cam2lidar, (4, 11), STRIDE_PX, labels="release", within_m=(1.0, 13.0)
    )
    known = INPUTS["depth_gt"] > 0
    assert torch.equal(nearest.isfinite(), known)
    torch.testing.assert_close(nearest[known], INPUTS["depth_gt"][known], atol=1e-4, rtol=0)
    targets = depth_targets(points, batch().cam2img, cam2lidar, BINS, (4, 11), STRIDE_PX, labels="release")
    assert torch.equal(targets, golden_bins())


def test_the_loss_and_its_gradient_are_the_reference_s() -> None:
    logits = OUTPUTS["depth_logits"].unflatten(0, (2, 3)).clone().requires_grad_()
    loss = depth_loss(logits, golden_bins(), DepthLossConfig.release())
    assert_relative(loss, OUTPUTS["loss_depth"], FORWARD)
    loss.backward()
    assert logits.grad is not None
    assert_relative(logits.grad.flatten(0, 1), GRADIENTS["loss_depth_wrt_depth_logits"], BACKWARD)


def test_gradients_are_the_reference_s() -> None:
    made, features, seen = lift(), INPUTS["x"].clone().requires_grad_(), {}
    depth_net(made).register_forward_hook(
        lambda _m, _i, out: seen.update(depth_logits=out[0], context=out[1])
    )
    bev, logits = run(made, features)
    for value in seen.values():
        value.retain_grad()
    loss = depth_loss(logits, golden_bins(), DepthLossConfig.release())
    (loss + (bev * INPUTS["grad_out"]).sum()).backward()
    assert features.grad is not None
    assert_relative(features.grad, GRADIENTS["x"], BACKWARD, "x")
    for name in ("depth_logits", "context"):
        assert_relative(seen[name].grad, GRADIENTS[name], BACKWARD, name)
    gradients = {name: parameter.grad for name, parameter in made.named_parameters()}
    compared = [name for name in GRADIENTS if name.startswith("vt.")]
    for name in compared:
        gradient = gradients[our_name(name)]
        assert gradient is not None, name
        assert_relative(gradient, GRADIENTS[name], BACKWARD, name)
    assert len(compared) == len(gradients)


def test_the_later_form_of_megvii_s_net_is_the_reference_s() -> None:
    """45 numbers per camera, one group and modulation; here the golden's own numbers are fed."""
    config = MegviiDepthNetConfig(mid_channels=8, dropout=0.0, deform_groups=1, modulated=True)
    net = MegviiDepthNet(config, in_channels=8, context_channels=4, num_depth_bins=12, num_camera_numbers=45)
    aggregation = DepthAggregation(4)
    for module, prefix in ((net, "repro.depth_net."), (aggregation, "repro.depth_aggregation_net.")):
        module.load_state_dict(
            {n.removeprefix(prefix): w for n, w in WEIGHTS.items() if n.startswith(prefix)}
        )
        module.eval()
    depth, context = net(INPUTS["x"].flatten(0, 1), OUTPUTS["repro.cam_params"])
    assert_relative(depth, OUTPUTS["repro.depth_logits"], FORWARD)
    assert_relative(context, OUTPUTS["repro.context"], FORWARD)
    volume = depth.softmax(dim=1)[:, None] * context[:, :, None]
    assert_relative(aggregation(volume), OUTPUTS["repro.agg_out"], FORWARD)
