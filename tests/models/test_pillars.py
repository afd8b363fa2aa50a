import pytest
import torch
from torch import Tensor

from distillbev.errors import ConfigError, DataError
from distillbev.grid import BevGrid
from distillbev.models.pillars import (
    DynamicPillars,
    DynamicPillarsConfig,
    HardPillars,
    HardPillarsConfig,
    cell_centres,
    fill_slots,
    fill_slots_by_loop,
    point_cells,
)

GRID = BevGrid(x_range_m=(-4.0, 4.0), y_range_m=(-2.0, 2.0), cell_m=0.5)
Z_RANGE = (-5.0, 3.0)
ENCODERS = [
    lambda **kw: DynamicPillars(DynamicPillarsConfig(**kw), GRID),
    lambda **kw: HardPillars(HardPillarsConfig(**kw), GRID),
]


def cloud(n: int, seed: int) -> Tensor:
    """Points of which some lie outside the ranges."""
    values = torch.rand(n, 5, generator=torch.Generator().manual_seed(seed))
    return values * torch.tensor([9.0, 5.0, 9.0, 255.0, -0.5]) - torch.tensor([4.5, 2.5, 5.5, 0.0, 0.0])


def encode_slowly(pillars: DynamicPillars, points: Tensor) -> tuple[Tensor, list[int]]:
    """The slow twin of dynamic encoding in evaluation mode: one pillar after another, one sample."""
    cells = point_cells(points, GRID, Z_RANGE)
    occupied = sorted(set(cells[cells >= 0].tolist()))
    features = []
    for cell in occupied:
        members = points[cells == cell]
        centre = torch.tensor([-4 + (cell % 16 + 0.5) * 0.5, -2 + (cell // 16 + 0.5) * 0.5])
        own = torch.cat(
            [members, members[:, :3] - members[:, :3].mean(dim=0), members[:, :2] - centre], dim=1
        )
        pooled = own
        for i, layer in enumerate(pillars.pfn_layers):
            if i > 0:
                own = torch.cat([own, pooled.expand_as(own)], dim=1)
            own = layer(own)
            pooled = own.max(dim=0, keepdim=True).values
        features.append(pooled[0])
    return torch.stack(features), occupied


@pytest.mark.parametrize("channels", [(6,), (6, 8)])
def test_dynamic_pillars_equal_their_slow_twin_gradients_too(channels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    pillars = DynamicPillars(DynamicPillarsConfig(channels=channels), GRID).eval()
    points = cloud(300, seed=0)
    gradients = []
    for fast in (True, False):
        leaf = points.clone().requires_grad_()
        features, cells = pillars.encode([leaf]) if fast else encode_slowly(pillars, leaf)
        features.square().sum().backward()
        assert leaf.grad is not None
        gradients.append((features.detach(), torch.as_tensor(cells), leaf.grad))
    for fast, slow in zip(*gradients, strict=True):
        assert float((fast - slow).abs().max()) <= 1e-5 * float(slow.abs().max())


def test_two_samples_do_not_mix() -> None:
    pillars = DynamicPillars(DynamicPillarsConfig(channels=(6,)), GRID).eval()
    first, second = cloud(200, seed=1), cloud(100, seed=2)
    together = pillars([first, second])
    torch.testing.assert_close(together, torch.cat([pillars([first]), pillars([second])]))


def test_slots_equal_their_slow_twin_at_every_limit() -> None:
    cells = torch.randint(0, 40, (500,), generator=torch.Generator().manual_seed(0))
    cells[250:] += 64  # the second sample
    points = torch.randn(500, 4)
    for max_points, max_pillars in ((3, 20), (100, 1000), (1, 1), (5, 40)):
        fast = fill_slots(points, cells, 64, 2, max_points, max_pillars)
        slow = fill_slots_by_loop(points, cells, 64, 2, max_points, max_pillars)
        assert torch.equal(fast.points, slow.points)
        assert torch.equal(fast.counts, slow.counts)
        assert torch.equal(fast.cells, slow.cells)


def test_lower_borders_are_inside_and_upper_ones_outside() -> None:
    points = torch.tensor([[-4, -2, -5], [4, 0, 0], [0, 2, 0], [0, 0, 3], [3.99, 1.99, 2.99], [-4.001, 0, 0]])
    points = torch.cat([points, torch.tensor([[float("nan"), 0, 0]])])
    assert point_cells(points, GRID, Z_RANGE).tolist() == [0, -1, -1, -1, 7 * 16 + 15, -1, -1]


def test_a_point_lands_in_the_cell_whose_centre_is_nearest() -> None:
    points = cloud(200, seed=3)
    cells = point_cells(points, GRID, Z_RANGE)
    inside = cells >= 0
    distance = (points[inside, :2] - cell_centres(cells[inside], GRID)).abs()
    assert float(distance.max()) <= 0.25 + 1e-5
    grid_centres = GRID.cell_centres().view(-1, 2)[cells[inside]]
    torch.testing.assert_close(cell_centres(cells[inside], GRID), grid_centres)


@pytest.mark.parametrize("build", ENCODERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", [(0, 0), (1, 0), (0, 40), (1,)])
def test_empty_clouds_and_single_points_are_no_trouble(build, training: bool, sizes: tuple[int, ...]) -> None:
    pillars = build(channels=(8,)).train(training)
    points = [
        cloud(40, seed=4)[-n:] * torch.tensor([0.4, 0.4, 0.1, 1, 1]) if n else torch.zeros(0, 5)
        for n in sizes
    ]
    canvas = pillars(points)
    canvas.sum().backward()
    assert canvas.shape == (len(sizes), 8, 8, 16)
    assert bool(canvas.isfinite().all())
    for sample, n in enumerate(sizes):
        assert bool(canvas[sample].any()) or n <= 1
    assert all(bool(b.isfinite().all()) for b in pillars.buffers())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in pillars.parameters())


@pytest.mark.parametrize("build", ENCODERS)
def test_autocast_does_not_coarsen_positions(build) -> None:
    pillars = build(channels=(8,)).eval()
    points = [cloud(100, seed=5)]
    with torch.autocast("cpu", torch.bfloat16):
        canvas = pillars(points)
    assert canvas.dtype == torch.float32
    assert torch.equal(canvas, pillars(points))


@pytest.mark.parametrize("build", ENCODERS)
def test_scaled_intensity_leaves_the_callers_points_alone(build) -> None:
    points = cloud(50, seed=6)
    before = points.clone()
    scaled = build(channels=(4,), intensity_scale=1 / 255).eval()
    plain = build(channels=(4,)).eval()
    plain.load_state_dict(scaled.state_dict())
    by_hand = points * torch.tensor([1, 1, 1, 1 / 255, 1])
    torch.testing.assert_close(scaled([points]), plain([by_hand]))
    assert torch.equal(points, before)


@pytest.mark.parametrize("build", ENCODERS)
def test_points_of_another_width_are_refused_with_a_way_out(build) -> None:
    with pytest.raises(DataError, match=r"sample 1 .*\(P, 5\).*point_features"):
        build(channels=(4,))([torch.zeros(3, 5), torch.zeros(3, 4)])


def test_settings_that_make_no_sense_are_refused() -> None:
    for build in (
        lambda: DynamicPillarsConfig(channels=()),
        lambda: HardPillarsConfig(point_features=2),
        lambda: HardPillarsConfig(max_points=0),
        lambda: DynamicPillarsConfig(z_range_m=(3.0, -5.0)),
    ):
        with pytest.raises(ConfigError):
            build()
