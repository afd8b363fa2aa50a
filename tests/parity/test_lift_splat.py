"""The lift against golden c1_lift_splat: geometry, cells, sums and gradients, with the parity switches on."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distillbev.grid import BevGrid
from distillbev.models.lift import (
    DepthBins,
    DepthLift,
    LiftConfig,
    cell_indices,
    feature_pixels,
    frustum_points,
    lift_splat,
    lift_splat_by_volume,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "c1_lift_splat"
INPUTS, OUTPUTS, GRADIENTS, WEIGHTS = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients", "weights")
)
GRID = BevGrid(x_range_m=(-12.8, 12.8), y_range_m=(-9.6, 12.8), cell_m=0.8)
BINS = DepthBins(start_m=1, stop_m=25, step_m=2)
Z_RANGE_M = (-10.0, 10.0)
STRIDE_PX = 16
OUTSIDE = 2 * GRID.shape[0] * GRID.shape[1]


def matrices() -> tuple[Tensor, Tensor]:
    """cam2img and cam2lidar (2, 3, 4, 4), augmentations included."""
    image_aug = INPUTS["post_rots"].clone()
    image_aug[..., :2, 2] += INPUTS["post_trans"][..., :2]  # acts on (u d, v d, d)
    cam2img, cam2lidar = torch.eye(4).repeat(2, 3, 1, 1), torch.eye(4).repeat(2, 3, 1, 1)
    cam2img[..., :3, :3] = image_aug @ INPUTS["intrins"]
    cam2lidar[..., :3, :3] = INPUTS["rots"]
    cam2lidar[..., :3, 3] = INPUTS["trans"]
    return cam2img, cam2lidar


def points() -> Tensor:
    pixels = feature_pixels((4, 11), STRIDE_PX, corner_aligned=True)
    return frustum_points(pixels, BINS, *matrices())


def cells() -> Tensor:
    return cell_indices(points(), GRID, Z_RANGE_M, truncate=True)


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert float((actual.detach() - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_pixels_and_depths_are_the_reference_s_frustum() -> None:
    pixels = feature_pixels((4, 11), STRIDE_PX, corner_aligned=True)
    torch.testing.assert_close(pixels.expand(12, 4, 11, 2), OUTPUTS["frustum"][..., :2], atol=1e-5, rtol=0)
    assert torch.equal(BINS.depths_m(), OUTPUTS["frustum"][:, 0, 0, 2])


def test_points_are_the_reference_s_geometry() -> None:
    torch.testing.assert_close(points(), OUTPUTS["geom"], atol=1e-5, rtol=0)


def test_cells_are_exactly_the_reference_s() -> None:
    column, row, _ = OUTPUTS["voxel_index"].unbind(dim=-1)
    sample = torch.arange(2).view(2, 1, 1, 1, 1)
    flat = (sample * GRID.shape[0] + row) * GRID.shape[1] + column
    assert torch.equal(cells(), torch.where(OUTPUTS["kept"], flat, OUTSIDE))


@pytest.mark.parametrize("splat", [lift_splat, lift_splat_by_volume])
def test_sums_and_their_gradients_are_the_reference_s(splat) -> None:
    depth = OUTPUTS["depth"].view(2, 3, 12, 4, 11).clone().requires_grad_()
    context = OUTPUTS["context"].view(2, 3, 5, 4, 11).clone().requires_grad_()
    bev = splat(depth, context, cells(), GRID)
    assert_relative(bev, OUTPUTS["bev"])
    assert_relative(bev, OUTPUTS["bev_cumsum"], 1e-4)
    (bev * INPUTS["grad_out"]).sum().backward()
    assert depth.grad is not None and context.grad is not None
    assert_relative(depth.grad.flatten(0, 1), GRADIENTS["depth"])
    assert_relative(context.grad.flatten(0, 1), GRADIENTS["context"])


def test_the_whole_lift_is_the_reference_s_with_gradients() -> None:
    config = LiftConfig(
        channels=5, depth=BINS, z_range_m=Z_RANGE_M, corner_aligned_pixels=True, truncate_cells=True
    )
    lift = DepthLift(config, in_channels=6, grid=GRID, stride_px=STRIDE_PX)
    convolution = lift.depth_and_context
    convolution.load_state_dict(
        {"weight": WEIGHTS["depthnet.weight"], "bias": WEIGHTS["depthnet.bias"]}, strict=True
    )
    features = INPUTS["x"].clone().requires_grad_()
    bev, logits = lift(features, *matrices())
    logits.retain_grad()
    assert_relative(bev, OUTPUTS["bev"])
    assert_relative(logits.flatten(0, 1), OUTPUTS["depth_logits"])
    (bev * INPUTS["grad_out"]).sum().backward()
    for gradient, name in (
        (features.grad, "x"),
        (logits.grad.flatten(0, 1), "depth_logits"),
        (convolution.weight.grad, "depthnet.weight"),
        (convolution.bias.grad, "depthnet.bias"),
    ):
        assert gradient is not None
        assert_relative(gradient, GRADIENTS[name])


def test_two_layers_of_the_reference_are_two_lifts_with_their_own_heights() -> None:
    """Its layers stand along the channels; truncation lengthens the lowest layer downwards only."""
    depth, context = OUTPUTS["depth"].view(2, 3, 12, 4, 11), OUTPUTS["context"].view(2, 3, 5, 4, 11)
    low = cell_indices(points(), GRID, (-3.0, 1.0), truncate=True)
    high = torch.where(
        points()[..., 2] >= 1, cell_indices(points(), GRID, (1.0, 5.0), truncate=True), OUTSIDE
    )
    layers = [lift_splat(depth, context, layer, GRID) for layer in (low, high)]
    assert_relative(torch.cat(layers, dim=1), OUTPUTS["nz2.bev"])
