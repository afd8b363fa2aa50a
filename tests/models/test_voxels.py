import pytest
import torch
from torch import Tensor

from distillbev.boxes import Boxes3D
from distillbev.data.schema import Batch
from distillbev.errors import ConfigError, DataError
from distillbev.grid import BevGrid
from distillbev.models.center_head import CenterHeadConfig
from distillbev.models.centerpoint import CenterPoint, CenterPointConfig
from distillbev.models.pillars import fill_slots_by_loop
from distillbev.models.second import SecondConfig, SecondFpnConfig
from distillbev.models.voxels import SparseVoxels, SparseVoxelsConfig, mean_voxels

GRID = BevGrid(x_range_m=(-6.4, 6.4), y_range_m=(-3.2, 3.2), cell_m=0.2)


def config(**changes: object) -> SparseVoxelsConfig:
    return SparseVoxelsConfig(**({"channels": (4, 6, 8), "out_channels": 5, "z_cell_m": 0.4} | changes))  # type: ignore[arg-type]


def draw_points(num: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(num, 5, generator=generator)
    return unit * torch.tensor([13.0, 7.0, 9.0, 255.0, 0.5]) - torch.tensor([6.5, 3.5, 5.5, 0.0, 0.5])


@pytest.mark.parametrize("max_points", [None, 1, 2, 4])
@pytest.mark.parametrize("max_voxels", [None, 1, 5, 12])
def test_means_are_those_of_slots_filled_point_by_point(
    max_points: int | None, max_voxels: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [70, 0, 40]
    cells = torch.cat(
        [torch.randint(0, 20, (n,), generator=generator) + 20 * b for b, n in enumerate(lengths)]
    )
    points = torch.randn(len(cells), 4, generator=generator, dtype=torch.float64)
    features, voxel_cells = mean_voxels(points, cells, 20, 3, max_points, max_voxels)
    slots = fill_slots_by_loop(points, cells, 20, 3, max_points or 1000, max_voxels or 1000)
    order = slots.cells.argsort()
    assert torch.equal(voxel_cells, slots.cells[order])
    assert torch.allclose(features, (slots.points.sum(dim=1) / slots.counts[:, None])[order])


def test_a_point_lights_the_map_cell_above_which_it_floats() -> None:
    torch.manual_seed(0)
    encoder = SparseVoxels(config(), GRID).eval()
    bev = encoder([torch.tensor([[3.3, -1.5, 0.0, 9.0, 0.0]])])
    assert bev.shape == (1, encoder.out_channels, *GRID.coarser(4).shape)
    lit = bev.abs().sum(dim=1)[0].nonzero().tolist()
    row, column = int((-1.5 + 3.2) // 0.8), int((3.3 + 6.4) // 0.8)
    assert [row, column] in lit
    assert all(abs(r - row) <= 1 and abs(c - column) <= 1 for r, c in lit)


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    encoder = SparseVoxels(config(), GRID).eval()
    clouds = [draw_points(200, seed) for seed in (0, 1)]
    together = encoder(clouds)
    for sample, cloud in enumerate(clouds):
        assert torch.allclose(together[sample], encoder([cloud])[0], atol=1e-6)


def test_the_order_of_points_does_not_matter_without_limits() -> None:
    encoder = SparseVoxels(config(max_points=None, max_voxels_eval=None), GRID).eval()
    points = draw_points(300, 2)
    turned = points.flip(0)
    assert torch.allclose(encoder([points]), encoder([turned]), atol=1e-5)


def test_an_empty_cloud_gives_an_empty_map_in_training_too() -> None:
    encoder = SparseVoxels(config(), GRID).train()
    assert not encoder([torch.zeros(0, 5), torch.zeros(0, 5)]).any()


def test_a_detector_with_voxels_learns_and_decodes() -> None:
    torch.manual_seed(0)
    detector = CenterPoint(
        CenterPointConfig(
            grid=GRID,
            pillars=config(),
            backbone=SecondConfig(channels=(8, 12), layers=(1, 1), strides=(1, 2)),
            neck=SecondFpnConfig(channels=(6, 6), upsample=(1.0, 2.0)),
            head=CenterHeadConfig(shared_channels=8, branch_channels=None),
            norm_momentum=0.1,
        )
    )
    box = torch.tensor([[1.0, 0.5, -1.0, 2.0, 1.0, 1.5, 0.3, 1.0, 0.0]])
    eye = torch.eye(4)
    batch = Batch(
        tokens=["a"],
        images=None,
        cam2img=eye[None, None][:, :0],
        cam2lidar=eye[None, None][:, :0],
        image_aug=eye[None, None][:, :0],
        bev_aug=eye[None],
        lidar2global=eye[None].double(),
        points=[draw_points(400, 3)],
        boxes=[Boxes3D(box, torch.tensor([0]))],
    )
    optimizer = torch.optim.AdamW(detector.parameters(), lr=5e-3)
    losses = []
    for _ in range(8):
        output = detector(batch)
        loss = torch.stack(list(detector.loss(output, batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert output.bev["stage0"].grid.cell_m == pytest.approx(0.8)
    assert output.bev["head"].features.shape[-2:] == output.bev["head"].grid.shape == (8, 16)
    assert all(p.grad is not None for p in detector.parameters())
    assert len(detector.eval().decode(detector(batch))) == 1


def test_points_of_another_width_are_refused() -> None:
    with pytest.raises(DataError, match="point_features"):
        SparseVoxels(config(), GRID)([torch.zeros(3, 4)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z_cell_m": 0.3}, "whole, positive number of cells"),
        ({"z_cell_m": 0.0}, "whole, positive number of cells"),
        ({"z_cell_m": 4.0}, "too few for 3 stages"),
        ({"channels": ()}, "positive width"),
        ({"max_points": 0}, "at least 1, or None"),
        ({"point_features": 2}, "at least x, y and z"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_grid_that_the_encoder_cannot_halve_is_refused() -> None:
    with pytest.raises(ConfigError, match="whole, positive number of cells"):
        CenterPointConfig(
            grid=BevGrid(x_range_m=(-1.0, 1.0), y_range_m=(-1.0, 1.0), cell_m=0.2), pillars=config()
        )
