import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distillbev.errors import ConfigError
from distillbev.grid import BevGrid
from distillbev.models.lift import (
    DepthBins,
    DepthLift,
    DepthLossConfig,
    LiftConfig,
    cell_indices,
    compress,
    depth_loss,
    depth_targets,
    feature_pixels,
    frustum_points,
    lift_splat,
    lift_splat_by_volume,
)

GRID = BevGrid(x_range_m=(-8.0, 8.0), y_range_m=(-4.0, 12.0), cell_m=0.5)
OBLONG = BevGrid(x_range_m=(-2.0, 4.0), y_range_m=(0.0, 4.0), cell_m=1.0)  # 4 rows, 6 columns
BINS = DepthBins(start_m=1.0, stop_m=9.0, step_m=1.0)


def forward_camera() -> tuple[Tensor, Tensor]:
    """One camera of 64 x 32 pixels, 1.5 m above the LiDAR's origin, looking along +y."""
    cam2img = torch.eye(4)
    cam2img[:3, :3] = torch.tensor([[32.0, 0, 32], [0, 32, 16], [0, 0, 1]])
    cam2lidar = torch.eye(4)
    cam2lidar[:3, :3] = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # right, down, forward -> x, -z, y
    cam2lidar[2, 3] = 1.5
    return cam2img[None, None], cam2lidar[None, None]


def random_lift(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, context and cells (a tenth outside) of two samples with three cameras."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(2, 3, 5, 2, 4, generator=generator, dtype=dtype).requires_grad_()
    context = torch.randn(2, 3, 7, 2, 4, generator=generator, dtype=dtype).requires_grad_()
    cells = torch.randint(0, 24, (2, 3, 5, 2, 4), generator=generator) + torch.tensor([0, 24]).view(
        2, 1, 1, 1, 1
    )
    outside = torch.rand(cells.shape, generator=generator) < 0.1
    return probs, context, torch.where(outside, 48, cells)


@pytest.mark.parametrize(
    ("start", "stop", "step", "count"), [(1, 60, 1, 59), (1, 37, 0.9, 40), (2, 58, 0.5, 112), (1, 2.5, 1, 2)]
)
def test_bins_end_below_their_stop(start: float, stop: float, step: float, count: int) -> None:
    depths = DepthBins(start_m=start, stop_m=stop, step_m=step).depths_m()
    assert len(depths) == count
    assert float(depths[-1]) < stop <= float(depths[-1]) + step + 1e-4


def test_bins_and_ranges_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 < start < stop"):
        DepthBins(start_m=5, stop_m=5)
    with pytest.raises(ConfigError, match="from low to high"):
        LiftConfig(z_range_m=(3, -5))


def test_features_lie_at_the_centres_of_their_strides() -> None:
    pixels = feature_pixels((2, 3), stride_px=16)
    assert pixels[0, 0].tolist() == [8, 8]
    assert pixels[1, 2].tolist() == [40, 24]
    assert feature_pixels((2, 3), 16, corner_aligned=True)[1, 2].tolist() == [47, 31]


def test_the_pixel_on_the_axis_lies_straight_ahead_at_its_depth() -> None:
    cam2img, cam2lidar = forward_camera()
    points = frustum_points(torch.tensor([[[32.0, 16.0]]]), BINS, cam2img, cam2lidar)[0, 0, :, 0, 0]
    expected = torch.stack([torch.zeros(8), BINS.depths_m(), torch.full((8,), 1.5)], dim=1)
    torch.testing.assert_close(points, expected)


def test_depth_counts_along_the_axis_not_along_the_ray() -> None:
    cam2img, cam2lidar = forward_camera()
    right_of_axis = frustum_points(torch.tensor([[[64.0, 32.0]]]), BINS, cam2img, cam2lidar)[0, 0, 3, 0, 0]
    torch.testing.assert_close(right_of_axis, torch.tensor([4.0, 4.0, 1.5 - 2.0]))  # depth 4 m


def test_frustum_points_project_back_onto_their_pixels_with_any_augmentation() -> None:
    generator = torch.Generator().manual_seed(0)
    cam2img, cam2lidar = (m.repeat(2, 3, 1, 1) for m in forward_camera())
    image_aug, bev_aug = torch.eye(4).repeat(2, 3, 1, 1), torch.eye(4).repeat(2, 1, 1, 1)
    image_aug[..., :2, :3] += 0.2 * torch.randn(2, 3, 2, 3, generator=generator)
    bev_aug[..., :2, :2] = torch.tensor([[0.0, -1.05], [-1.05, 0.0]])  # turned, mirrored and scaled
    cam2img, cam2lidar = image_aug @ cam2img, bev_aug @ cam2lidar
    pixels = feature_pixels((4, 8), stride_px=8)
    points = frustum_points(pixels, BINS, cam2img, cam2lidar)
    lidar2img = cam2img @ torch.linalg.inv(cam2lidar)
    homogeneous = torch.nn.functional.pad(points, (0, 1), value=1.0)
    projected = torch.einsum("bnij,bndhwj->bndhwi", lidar2img, homogeneous)
    back = projected[..., :2] / projected[..., 2:3]
    torch.testing.assert_close(back, pixels.expand_as(back), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(projected[0, 0, :, 0, 0, 2], BINS.depths_m(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("point", "floored", "truncated"),
    [
        ((-2.0, 0.0, 0.0), 0, 0),
        ((3.9, 3.9, 0.0), 23, 23),
        ((0.5, 1.5, 0.0), 8, 8),  # row 1, column 2
        ((-2.5, 0.5, 0.0), 48, 0),  # half a cell left of the grid
        ((0.5, -0.5, 0.0), 48, 2),
        ((4.0, 1.0, 0.0), 48, 48),
        ((0.5, 1.5, 5.0), 48, 48),
        ((0.5, 1.5, -12.0), 48, 8),
    ],
)
def test_points_fall_into_the_cell_below_them(
    point: tuple[float, float, float], floored: int, truncated: int
) -> None:
    points = torch.tensor(point).expand(2, 1, 3)
    for truncate, expected in ((False, floored), (True, truncated)):
        first, second = cell_indices(points, OBLONG, (-10.0, 5.0), truncate).flatten().tolist()
        assert first == expected
        assert second == (48 if expected == 48 else expected + 24)  # the second sample's map follows


@pytest.mark.parametrize("seed", [0, 1])
def test_the_fast_lift_equals_the_volume_in_values_and_gradients(seed: int) -> None:
    results = []
    for splat in (lift_splat, lift_splat_by_volume):
        probs, context, cells = random_lift(seed)
        bev = splat(probs, context, cells, OBLONG)
        (bev * torch.randn(bev.shape, generator=torch.Generator().manual_seed(9))).sum().backward()
        results.append((bev, probs.grad, context.grad))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_the_fast_lift_s_gradients_are_the_numerical_ones() -> None:
    probs, context, cells = random_lift(0, torch.float64)
    assert torch.autograd.gradcheck(lambda p, c: lift_splat(p, c, cells, OBLONG), (probs, context))


def test_nothing_is_lost_inside_and_nothing_comes_from_outside() -> None:
    probs, context, _ = random_lift(0)
    inside = torch.zeros(probs.shape, dtype=torch.int64) + torch.tensor([7, 31]).view(2, 1, 1, 1, 1)
    bev = lift_splat(probs, context, inside, OBLONG)
    expected = torch.einsum("bndhw,bnchw->bc", probs, context)
    torch.testing.assert_close(bev[:, :, 1, 1], expected)
    assert int((bev != 0).any(dim=1).sum()) == 2
    outside = lift_splat(probs, context, torch.full_like(inside, 48), OBLONG)
    outside.sum().backward()
    assert not outside.any() and probs.grad is not None and not probs.grad.any()


def test_a_feature_lands_where_its_depth_says() -> None:
    cam2img, cam2lidar = forward_camera()
    lift = DepthLift(LiftConfig(channels=1, depth=BINS), in_channels=2, grid=GRID, stride_px=8)
    with torch.no_grad():
        lift.depth_and_context.weight.zero_()
        lift.depth_and_context.bias.zero_()
        lift.depth_and_context.bias[5] = 50.0  # certain of the sixth bin: 6 m
        lift.depth_and_context.weight[8, 1] = 1.0
    features = torch.zeros(1, 1, 2, 4, 8)
    features[0, 0, 1, 2, 5] = 3.0  # row 2, column 5: pixel (44, 20)
    with torch.no_grad():
        lifted, logits = lift(features, cam2img, cam2lidar)
    x_m = 6 * (44 - 32) / 32
    row, column = math.floor((6 + 4) / 0.5), math.floor((x_m + 8) / 0.5)
    assert float(lifted[0, 0, row, column]) == pytest.approx(3.0)
    assert float(lifted.sum()) == pytest.approx(3.0)
    assert logits.shape == (1, 1, 8, 4, 8)


def test_autocast_moves_no_point() -> None:
    cam2img, cam2lidar = forward_camera()
    torch.manual_seed(0)
    lift = DepthLift(LiftConfig(channels=4, depth=BINS), in_channels=3, grid=GRID, stride_px=8)
    features = torch.randn(1, 1, 3, 4, 8)
    exact, _ = lift(features, cam2img, cam2lidar)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse, logits = lift(features, cam2img, cam2lidar)
    assert coarse.dtype == logits.dtype == torch.float32
    assert torch.equal(coarse != 0, exact != 0)
    torch.testing.assert_close(coarse, exact, atol=0.05, rtol=0.05)


def lidar(*points: tuple[float, float, float, float]) -> list[Tensor]:
    """Rows of x, y, z, time."""
    rows = torch.tensor(points).reshape(-1, 4)
    return [torch.cat([rows[:, :3], torch.zeros(len(rows), 1), rows[:, 3:]], dim=1)]


def targets_of(points: list[Tensor]) -> Tensor:
    return depth_targets(points, *forward_camera(), BINS, (4, 8), stride_px=8)[0, 0]


def test_the_nearest_point_of_the_key_sweep_sets_the_target() -> None:
    # (0.4, 4.2) ahead at camera height is pixel (35, 16): row 2, column 4; so is the one behind it.
    targets = targets_of(lidar((0.8, 8.3, 1.5, 0.0), (0.4, 4.2, 1.5, 0.0), (0.2, 2.0, 1.5, -0.05)))
    assert int(targets[2, 4]) == 3  # 4.2 m is nearest to the fourth bin, 4 m; the sweep before does not count
    assert int((targets >= 0).sum()) == 1


@pytest.mark.parametrize("point", [(0.0, -4.0, 1.5), (9.0, 4.0, 1.5), (0.0, 0.4, 1.5), (0.0, 8.6, 1.5)])
def test_points_behind_beside_or_beyond_the_bins_set_none(point: tuple[float, float, float]) -> None:
    assert bool((targets_of(lidar((*point, 0.0))) == -1).all())


def test_a_scan_without_points_sets_no_target() -> None:
    assert bool((targets_of(lidar()) == -1).all())


def test_targets_name_the_frustum_point_nearest_to_the_lidar_point() -> None:
    generator = torch.Generator().manual_seed(3)
    frustum = frustum_points(feature_pixels((4, 8), 8), BINS, *forward_camera())[0, 0]  # (D, H, W, 3)
    for _ in range(20):
        d, row, column = (int(torch.randint(n, (1,), generator=generator)) for n in (8, 4, 8))
        shift = 0.9 * (torch.rand(1, generator=generator) - 0.5)  # less than half a step, along y = depth
        ray = frustum[1, row, column] - frustum[0, row, column]
        x, y, z = (frustum[d, row, column] + shift * ray).tolist()
        targets = targets_of(lidar((x, y, z, 0.0)))
        assert int(targets[row, column]) == d and int((targets >= 0).sum()) == 1


@pytest.mark.parametrize("loss", ["softmax_bce", "cross_entropy"])
def test_the_depth_loss_is_the_mean_over_cells_with_points(loss) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 4, 1, 3, requires_grad=True)
    targets = torch.tensor([[[[2, -1, 0]], [[-1, -1, -1]]]])
    total = 0.0
    for column, chosen in ((0, 2), (2, 0)):
        p = logits[0, 0, :, 0, column].softmax(dim=0).tolist()
        total -= math.log(p[chosen])
        if loss == "softmax_bce":
            total -= sum(math.log(1 - q) for k, q in enumerate(p) if k != chosen)
    value = depth_loss(logits, targets, DepthLossConfig(loss=loss, weight=3.0))
    assert value.item() == pytest.approx(3.0 * total / 2, rel=1e-5)
    value.backward()
    assert logits.grad is not None and not logits.grad[0, 1].any() and not logits.grad[0, 0, :, 0, 1].any()


def test_the_depth_loss_without_any_target_is_zero_and_trains_nothing() -> None:
    logits = torch.randn(1, 1, 4, 2, 2, requires_grad=True)
    value = depth_loss(logits, torch.full((1, 1, 2, 2), -1), DepthLossConfig())
    value.backward()
    assert value.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_compression_shortens_long_vectors_and_turns_none():
    generator = torch.Generator().manual_seed(3)
    lifted = torch.randn(2, 16, 3, 4, generator=generator) * torch.logspace(-1, 2, 4)
    short = compress(lifted, gain=10.0)
    assert torch.allclose(functional.cosine_similarity(short, lifted), torch.ones(2, 3, 4), atol=1e-5)
    before, after = (bev.square().mean(dim=1).sqrt() for bev in (lifted, short))
    assert torch.allclose(after, torch.log1p(10 * before), rtol=1e-4)


def test_empty_cells_stay_empty_under_compression_and_have_a_gradient():
    lifted = torch.zeros(1, 4, 2, 2, requires_grad=True)
    short = compress(lifted, gain=10.0)
    short.sum().backward()
    assert not short.any() and lifted.grad is not None and lifted.grad.isfinite().all()


def test_a_compression_without_gain_is_refused():
    with pytest.raises(ConfigError, match="positive gain"):
        LiftConfig(compression=0.0)
