"""Dynamic pillars and MVP's point encoder against golden h_mvp_dynamic_pillar, sections 1 and 4."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distillbev.grid import BevGrid
from distillbev.models.centerpoint import CenterPoint, CenterPointConfig
from distillbev.models.pillars import DynamicPillars, DynamicPillarsConfig, point_cells
from distillbev.models.voxels import SparseVoxels, SparseVoxelsConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "h_mvp_dynamic_pillar"
INPUTS, OUTPUTS, GRADIENTS, WEIGHTS = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients", "weights")
)
GRID = BevGrid(x_range_m=(-6.4, 6.4), y_range_m=(-4.0, 4.0), cell_m=0.2)
ROWS, COLUMNS = GRID.shape
Z_RANGE = (-5.0, 3.0)
ENCODERS = {
    "dyn5": DynamicPillarsConfig(channels=(8,)),
    "dyn5_avg_dist": DynamicPillarsConfig(channels=(8,), reduction="mean", with_distance=True),
    "mvp17": DynamicPillarsConfig(channels=(8,), point_features=17, virtual_flag_column=15),
    "mvp17_two_layer": DynamicPillarsConfig(channels=(8, 10), point_features=17, virtual_flag_column=15),
}


def encoder(name: str) -> DynamicPillars:
    pillars = DynamicPillars(ENCODERS[name], GRID)
    prefix = f"{name}."
    pillars.load_state_dict({n.removeprefix(prefix): w for n, w in WEIGHTS.items() if n.startswith(prefix)})
    return pillars


def clouds(name: str) -> list[Tensor]:
    cloud = name.split("_")[0]
    return [INPUTS[f"{cloud}.points.{sample}"].clone().requires_grad_() for sample in (0, 1)]


def flat_cells(coors: Tensor) -> Tensor:
    return (coors[:, 0] * ROWS + coors[:, 2]) * COLUMNS + coors[:, 3]


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    assert actual.shape == expected.shape
    scale = max(float(expected.abs().max()), 1e-12)
    assert float((actual.detach() - expected).abs().max()) / scale <= tolerance, name


@pytest.mark.parametrize("cloud", ["dyn5", "mvp17"])
def test_every_point_falls_into_the_reference_s_pillar(cloud: str) -> None:
    coors = OUTPUTS[f"{cloud}.point_coors"]
    for sample, points in enumerate(clouds(cloud)):
        expected = coors[coors[:, 0] == sample]
        cells = torch.where(expected[:, 1] < 0, -1, expected[:, 2] * COLUMNS + expected[:, 3])
        assert torch.equal(point_cells(points.detach(), GRID, Z_RANGE), cells)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_features_statistics_and_gradients_are_the_reference_s(name: str, mode: str) -> None:
    pillars = encoder(name).train(mode == "train")
    points = clouds(name)
    features, cells = pillars.encode(points)
    assert torch.equal(cells, flat_cells(OUTPUTS[f"{name}.voxel_coors"]))
    assert_relative(features, OUTPUTS[f"{name}.{mode}.voxel_features"], 1e-5)
    scalar = features.square().sum(dim=1).mean() / 2
    assert_relative(scalar, OUTPUTS[f"{name}.{mode}.scalar"], 1e-5)
    scalar.backward()

    tolerance = 1e-5 if mode == "eval" else 1e-4
    for parameter_name, parameter in pillars.named_parameters():
        assert parameter.grad is not None
        expected = GRADIENTS[f"{name}.{mode}.weights.{parameter_name}"]
        assert_relative(parameter.grad, expected, tolerance, parameter_name)
    gradients = torch.cat([cloud.grad for cloud in points if cloud.grad is not None])
    if mode == "train":
        inside = torch.cat([point_cells(cloud, GRID, Z_RANGE) >= 0 for cloud in points])
        assert not gradients[~inside].any()
        gradients = gradients[inside]
    assert_relative(gradients, GRADIENTS[f"{name}.{mode}.points"], tolerance, "points")
    if mode == "train":
        state = pillars.state_dict()
        prefix = f"{name}.train.state_after."
        for key, expected in OUTPUTS.items():
            if key.startswith(prefix):
                assert_relative(state[key.removeprefix(prefix)], expected, 1e-5, key)


def test_the_map_is_the_reference_s_and_the_caller_s_flags_survive() -> None:
    pillars = encoder("mvp17").eval()
    points = [cloud.detach() for cloud in clouds("mvp17")]
    first, second = pillars(points), pillars(points)
    assert_relative(first, OUTPUTS["mvp17.eval.canvas"], 1e-5)
    assert torch.equal(first, second)
    assert all(torch.equal(points[b], INPUTS[f"mvp17.points.{b}"]) for b in (0, 1))


def test_the_published_mvp_teacher_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        detector = CenterPoint(
            CenterPointConfig(pillars=DynamicPillarsConfig(point_features=17, virtual_flag_column=15))
        )
    assert sum(parameter.numel() for parameter in detector.parameters()) == 5_983_558


def test_voxels_by_origin_are_the_reference_s() -> None:
    config = SparseVoxelsConfig(
        channels=(4, 6), out_channels=4, point_features=17, by_origin=True, z_cell_m=1.0, max_points=None
    )
    grid = BevGrid(x_range_m=(-6.4, 6.4), y_range_m=(-4.0, 4.0), cell_m=0.4)
    assert OUTPUTS["mvpformer.grid_xyz"].tolist() == [*reversed(grid.shape), config.num_layers]
    voxels = SparseVoxels(config, grid).voxelise([cloud.detach() for cloud in clouds("mvp17")])
    # The reference also keeps points on the upper limits, in cells beyond the grid.
    coors = OUTPUTS["mvpformer.coors"]
    inside = (coors[:, 1:] < torch.tensor([config.num_layers, *grid.shape])).all(dim=1)
    assert 0 < int((~inside).sum()) < 10
    assert torch.equal(voxels.sites.coordinates(), coors[inside])
    assert_relative(voxels.features, OUTPUTS["mvpformer.voxels"][inside], 1e-5)


def test_the_sparse_encoder_takes_voxels_by_origin() -> None:
    config = SparseVoxelsConfig(channels=(4, 6), out_channels=4, point_features=17, by_origin=True)
    encoder = SparseVoxels(config, BevGrid(x_range_m=(-6.4, 6.4), y_range_m=(-4.0, 4.0), cell_m=0.2))
    assert encoder(clouds("mvp17")).shape == (2, 4 * config.out_layers, 20, 32)
