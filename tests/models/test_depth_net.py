import msgspec
import pytest
import torch
from tiny_student import TINY, make_batch
from torch import Tensor
from torch.nn import functional

from distillbev.data.virtual_points import COPY, FLAG_COLUMN, MEASURED, NUM_COLUMNS, TIME_COLUMN, VIRTUAL
from distillbev.errors import ConfigError, DataError
from distillbev.models.bev_encoder import LssNeckConfig
from distillbev.models.bevdet import BevDet, BevDetConfig
from distillbev.models.depth_net import (
    DepthAggregation,
    DepthNetConfig,
    MegviiDepthNet,
    MegviiDepthNetConfig,
    ReleaseDepthNet,
    ReleaseDepthNetConfig,
    build_depth_net,
)
from distillbev.models.history import HistoryConfig
from distillbev.models.lift import (
    DepthBins,
    DepthLabels,
    DepthLossConfig,
    LiftConfig,
    depth_loss,
    depth_targets,
    points_now,
)

NETS: list[DepthNetConfig] = [ReleaseDepthNetConfig(mid_channels=8), MegviiDepthNetConfig(mid_channels=8)]


def tiny(net: DepthNetConfig, aggregate: bool = False) -> BevDetConfig:
    lift = msgspec.structs.replace(TINY.lift, depth_net=net, aggregate_depth=aggregate)
    return msgspec.structs.replace(TINY, lift=lift, depth_loss=DepthLossConfig.release())


@pytest.mark.parametrize(("extra", "added"), [(False, 0), (True, 512)])
@pytest.mark.parametrize(("history", "parameters"), [(None, 52_885_214), (HistoryConfig(), 53_217_566)])
def test_the_published_configurations_have_the_published_numbers_of_parameters(
    history: HistoryConfig | None, parameters: int, extra: bool, added: int
) -> None:
    config = BevDetConfig(
        lift=LiftConfig(depth_net=ReleaseDepthNetConfig()),
        history=history,
        bev_neck=LssNeckConfig(extra_norm_act=extra),
    )
    with torch.device("meta"):
        detector = BevDet(config)
    assert sum(p.numel() for p in detector.parameters()) == parameters + added


@pytest.mark.parametrize("net", NETS)
def test_shapes_are_those_promised_whatever_the_batch(net: DepthNetConfig) -> None:
    made = build_depth_net(net, in_channels=6, context_channels=5, num_depth_bins=7).eval()
    for images in (1, 3):
        depth, context = made(torch.randn(images, 6, 4, 9), torch.randn(images, made.NUM_CAMERA_NUMBERS))
        assert depth.shape == (images, 7, 4, 9)
        assert context.shape == (images, 5, 4, 9)


def test_the_camera_moves_the_depth_of_both_nets_and_the_context_of_megvii_s() -> None:
    torch.manual_seed(0)
    for net, context_moves in zip(NETS, (False, True), strict=True):
        made = build_depth_net(net, in_channels=6, context_channels=5, num_depth_bins=7).eval()
        features = torch.randn(2, 6, 4, 9)
        numbers = torch.randn(2, made.NUM_CAMERA_NUMBERS)
        (depth, context), (other_depth, other_context) = (
            made(features, numbers),
            made(features, numbers + 1),
        )
        assert not torch.allclose(depth, other_depth, atol=1e-4)
        assert torch.allclose(context, other_context, atol=1e-6) != context_moves


def test_numbers_hold_what_they_say_for_a_camera_worked_out_by_hand() -> None:
    batch = make_batch(samples=1, cameras=1)
    image_aug, bev_aug = torch.eye(4), torch.eye(4)
    image_aug[:2, :2] = torch.tensor([[0.5, 0.1], [-0.1, 0.5]])
    image_aug[:2, 2] = torch.tensor([7.0, -3.0])
    bev_aug[:2, :2] = torch.tensor([[0.0, -1.1], [1.1, 0.0]])
    bev_aug[2, 2] = 1.1
    intrinsics, cam2lidar = batch.cam2img[0, 0].clone(), batch.cam2lidar[0, 0].clone()
    cam2lidar[:3, 3] = torch.tensor([1.0, 2.0, -0.5])
    batch.image_aug, batch.bev_aug = image_aug[None, None], bev_aug[None]
    batch.cam2img = (image_aug @ intrinsics)[None, None]
    batch.cam2lidar = (bev_aug @ cam2lidar)[None, None]

    rotation = (bev_aug @ cam2lidar)[:3, :3].flatten().tolist()
    release = [40, 0, 32, 0, 40, 16, 0, 0, 1, 0.5, 0.1, 0, -0.1, 0.5, 0, 0, 0, 1, 7, -3, 0]
    release += [*rotation, -2.2, 1.1, -0.55]
    megvii = [40, 40, 32, 16, 0.5, 0.1, 7, -0.1, 0.5, -3, 0, -1.1, 1.1, 0, 1.1]
    megvii += cam2lidar[:3].flatten().tolist()
    for net, expected in ((ReleaseDepthNet, release), (MegviiDepthNet, megvii)):
        numbers = net.camera_numbers(batch)[0, 0]
        torch.testing.assert_close(numbers, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("aggregate", [False, True])
@pytest.mark.parametrize("net", NETS)
def test_every_weight_is_trained_by_the_loss(net: DepthNetConfig, aggregate: bool) -> None:
    torch.manual_seed(0)
    detector, batch = BevDet(tiny(net, aggregate)), make_batch()
    batch.cam2lidar[..., :3, 3] += torch.randn(2, 3, 3)  # or the norm of the numbers would see them constant
    for module in detector.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.stack(list(detector.loss(detector(batch), batch).values())).sum().backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        # On a map of 4 by 8 cells dilations of 6 and more see almost nothing; that they see at all is enough.
        assert bool(parameter.grad.any()), name


def test_aggregated_features_are_summed_into_the_cells_of_their_ray_points() -> None:
    """With ones along all rays the map counts the points of each cell."""
    torch.manual_seed(0)
    detector, batch = BevDet(tiny(NETS[0], aggregate=True)).eval(), make_batch()
    aggregation = detector.lift.aggregation
    assert aggregation is not None
    out = aggregation.out_conv[0]
    assert isinstance(out, torch.nn.Conv2d) and out.bias is not None
    with torch.no_grad():
        out.weight.zero_()
        out.bias.fill_(1.0)
    lifted = detector(batch).bev["lifted"].features.detach()
    assert torch.equal(lifted, lifted.round())  # counts of ray points
    assert float(lifted.max()) > 1


def test_rows_of_the_image_do_not_share_depth() -> None:
    torch.manual_seed(0)
    aggregation, volume = DepthAggregation(3).eval(), torch.randn(2, 3, 5, 4, 6)
    changed = volume.clone()
    changed[:, :, :, 1] += 1
    moved = (aggregation(volume) - aggregation(changed)).detach().abs().amax(dim=(0, 1, 2, 4))
    assert float(moved[1]) > 1e-3
    assert not moved[[0, 2, 3]].any()


def look_ahead() -> tuple[Tensor, Tensor]:
    """A camera at the origin, x right, y down, z forward; 4 by 3 cells of 10 pixels."""
    cam2img = torch.eye(4)
    cam2img[:3, :3] = torch.tensor([[10.0, 0, 20], [0, 10, 15], [0, 0, 1]])
    return cam2img[None, None], torch.eye(4)[None, None]


def targets_of(points: Tensor, labels: DepthLabels = "centred", virtual_points: bool = False) -> Tensor:
    bins = DepthBins(start_m=2, stop_m=6, step_m=1)
    return depth_targets([points], *look_ahead(), bins, (3, 4), 10, labels, virtual_points)[0, 0]


def at_pixel(u: float, v: float, depth: float, time: float = 0.0) -> list[float]:
    return [(u - 20) / 10 * depth, (v - 15) / 10 * depth, depth, 7.0, time]


@pytest.mark.parametrize(
    ("labels", "u", "v", "depth", "cell", "bin_"),
    [
        ("centred", 17, 12, 3.6, (1, 1), 2),
        ("megvii", 17, 12, 3.6, (1, 1), 1),
        ("release", 17, 12, 3.6, (1, 2), 1),
        ("centred", 17, 12, 1.6, (1, 1), 0),
        ("megvii", 17, 12, 1.6, None, -1),
        ("release", 17, 12, 1.6, None, -1),
        ("centred", -0.5, 12, 3.2, None, -1),
        ("megvii", -0.5, 12, 3.2, (1, 0), 1),
        ("release", -0.5, 12, 3.2, (1, 0), 1),
        ("centred", 36, 12, 3.2, (1, 3), 1),
        ("release", 36, 12, 3.2, None, -1),  # its nearest corner is beyond the last cell
    ],
)
def test_a_point_labels_the_cell_and_the_bin_worked_out_by_hand(
    labels: DepthLabels, u: float, v: float, depth: float, cell: tuple[int, int] | None, bin_: int
) -> None:
    found = targets_of(torch.tensor([at_pixel(u, v, depth)]), labels)
    expected = torch.full((3, 4), -1)
    if cell is not None:
        expected[cell] = bin_
    assert torch.equal(found, expected)


def test_a_point_before_the_first_bin_hides_those_behind_it_but_not_from_the_release() -> None:
    points = torch.tensor([at_pixel(17, 12, 1.2), at_pixel(17, 12, 4.3)])
    assert int(targets_of(points)[1, 1]) == -1
    assert int(targets_of(points, "release")[1, 2]) == 2


def test_labels_come_from_real_points_of_this_moment_only() -> None:
    rows = torch.zeros(4, NUM_COLUMNS)
    kept = [(17, 12, 4.0, MEASURED, 0.0)]
    others = [(17, 12, 3.0, VIRTUAL, 0.0), (27, 12, 3.0, COPY, 0.0), (7, 12, 3.0, MEASURED, -0.1)]
    for row, (u, v, depth, flag, time) in zip(rows, kept + others, strict=True):
        row[:3] = torch.tensor(at_pixel(u, v, depth)[:3])
        row[FLAG_COLUMN], row[TIME_COLUMN] = flag, time
    expected = torch.full((3, 4), -1)
    expected[1, 1] = 2
    assert torch.equal(targets_of(rows), expected)
    assert len(points_now(rows)) == 1
    expected[1, 1], expected[1, 2] = 1, 1  # the nearer virtual point, and the copy of a point in a mask
    assert torch.equal(targets_of(rows, virtual_points=True), expected)
    with pytest.raises(DataError, match="points of 6 columns"):
        points_now(torch.zeros(3, 6))


def test_the_release_s_loss_divides_by_all_bins_and_ours_may_divide_by_cells_with_points() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(1, 2, 5, 3, 4), torch.full((1, 2, 3, 4), -1)
    targets[0, 0, 1, 2], targets[0, 1, 0, 0] = 3, 0
    entropy = sum(
        functional.binary_cross_entropy_with_logits(
            logits[index], functional.one_hot(torch.tensor(bin_), 5).float(), reduction="sum"
        )
        for index, bin_ in (((0, 0, slice(None), 1, 2), 3), ((0, 1, slice(None), 0, 0), 0))
    )
    release = DepthLossConfig.release()
    torch.testing.assert_close(depth_loss(logits, targets, release), 100 * entropy / logits.numel())
    by_cells = msgspec.structs.replace(release, mean_over="labelled_cells", weight=1.0)
    torch.testing.assert_close(depth_loss(logits, targets, by_cells), entropy / 2)
    assert float(depth_loss(logits, torch.full_like(targets, -1), release)) == 0


def test_the_depth_loss_teaches_the_depth_net_where_things_are() -> None:
    """The camera looks at flat walls at depths that the image's brightness gives away."""
    torch.manual_seed(0)
    net = build_depth_net(NETS[0], in_channels=3, context_channels=2, num_depth_bins=4)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
    bins = torch.arange(8) % 4
    features = functional.one_hot(bins, 4)[:, :3].float()[..., None, None].expand(-1, -1, 3, 5).contiguous()
    targets = bins[:, None, None].expand(-1, 3, 5)[None]
    numbers = torch.randn(8, 33)
    depth, _ = net(features, numbers)
    for _ in range(40):
        loss = depth_loss(depth[None], targets, DepthLossConfig.megvii())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        depth, _ = net(features, numbers)
    assert (depth.argmax(dim=1) == targets[0]).float().mean() > 0.95


def test_settings_that_make_no_net_are_refused() -> None:
    with pytest.raises(ConfigError, match="deform_groups=4"):
        MegviiDepthNetConfig(mid_channels=6)
    with pytest.raises(ConfigError, match="mid_channels=0"):
        ReleaseDepthNetConfig(mid_channels=0)
    with pytest.raises(ConfigError, match="dropout=1"):
        MegviiDepthNetConfig(dropout=1.0)
