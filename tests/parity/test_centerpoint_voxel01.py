"""CenterPoint with 0.1 m voxels against golden b_centerpoint_voxel01, from points to gradients.

The golden has maps in the old box convention (width first, clockwise yaw); weights of the head's dim and rot
branches are turned to ours, and its maps are turned when compared.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distillbev.grid import BevGrid
from distillbev.models.center_head import CenterHeadConfig
from distillbev.models.centerpoint import CenterPoint, CenterPointConfig
from distillbev.models.second import SecondConfig, SecondFpnConfig
from distillbev.models.sparse_conv import Sites, SparseTensor
from distillbev.models.voxels import SparseVoxels, SparseVoxelsConfig
from distillbev.weights.rename import CENTERPOINT_VOXELS, renamed, turn_weight

GOLDEN = Path(__file__).parents[1] / "golden" / "b_centerpoint_voxel01"
INPUTS, OUTPUTS, GRADIENTS, WEIGHTS = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients", "weights")
)
GRID = BevGrid(x_range_m=(-4.0, 4.0), y_range_m=(-3.2, 3.2), cell_m=0.1)
ROWS, COLUMNS = GRID.shape


def our_name(name: str) -> str:
    ours = renamed(name, CENTERPOINT_VOXELS)
    assert ours is not None, name
    return ours


def our_map(name: str, value: Tensor) -> Tensor:
    if name == "dim":
        return value[:, [1, 0, 2]]
    return -value[:, [1, 0]] if name == "rot" else value


def detector(train: bool = False) -> CenterPoint:
    model = CenterPoint(
        CenterPointConfig(
            grid=GRID,
            pillars=SparseVoxelsConfig(channels=(4, 6, 8, 10), out_channels=10),
            backbone=SecondConfig(channels=(8, 12), layers=(5, 5), strides=(1, 2)),
            neck=SecondFpnConfig(channels=(10, 10), upsample=(1.0, 2.0)),
            head=CenterHeadConfig(shared_channels=8, branch_channels=8),
        )
    )
    model.load_state_dict({our_name(n): turn_weight(n, w) for n, w in WEIGHTS.items()})
    return model.train(train)


def encoder_of(model: CenterPoint) -> SparseVoxels:
    assert isinstance(model.pillars, SparseVoxels)
    return model.pillars


def golden_voxels() -> tuple[SparseTensor, Tensor]:
    """The voxels in our order with a gradient, and the order that sorts the golden's."""
    sites, order = Sites.from_coordinates(INPUTS["coors"], (2, 41, ROWS, COLUMNS))
    return SparseTensor(OUTPUTS["voxel_features"][order].requires_grad_(), sites), order


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    scale = max(float(expected.abs().max()), 1e-12)
    assert float((actual - expected).abs().max()) / scale <= tolerance, name


@pytest.mark.parametrize("train", [False, True])
def test_points_become_the_reference_s_voxels(train: bool) -> None:
    voxels = encoder_of(detector(train)).voxelise([INPUTS["points.0"], INPUTS["points.1"]])
    expected, _ = golden_voxels()
    assert torch.equal(voxels.sites.cells, expected.sites.cells)
    assert voxels.sites.shape == expected.sites.shape
    assert_relative(voxels.features, expected.features, 1e-6)


def test_every_stage_has_the_reference_s_sites_and_features() -> None:
    voxels, _ = golden_voxels()
    stages, bev = encoder_of(detector()).encode(voxels)
    assert [stage.sites.shape for stage in stages] == [
        (2, 21, 32, 40),
        (2, 11, 16, 20),
        (2, 5, 8, 10),
        (2, 5, 8, 10),
    ]
    for i, stage in enumerate(stages):
        assert torch.equal(stage.sites.coordinates(), OUTPUTS[f"encoder.{i}.coors"])
        assert_relative(stage.features, OUTPUTS[f"encoder.{i}.features"], 1e-4, f"stage {i}")
    assert_relative(bev, OUTPUTS["bev"], 1e-4)
    assert_relative(bev.square().sum(), OUTPUTS["scalar"], 1e-4)


def test_points_reach_the_reference_s_maps_through_the_whole_detector() -> None:
    model = detector()
    bev = model.pillars([INPUTS["points.0"], INPUTS["points.1"]])
    stages = model.backbone(bev)
    neck = model.neck(stages)
    for i, stage in enumerate(stages):
        assert_relative(stage, OUTPUTS[f"backbone.{i}"], 1e-4)
    assert_relative(neck, OUTPUTS["neck"], 1e-4)
    for t, task in enumerate(model.head(neck)):
        for name, value in task.items():
            assert_relative(our_map(name, value), OUTPUTS[f"head.task{t}.{name}"], 1e-4, f"{t} {name}")


def test_gradients_are_the_reference_s() -> None:
    model = detector()
    voxels, order = golden_voxels()
    _, bev = encoder_of(model).encode(voxels)
    bev.square().sum().backward()
    parameters = dict(model.pillars.named_parameters(prefix="pillars"))
    prefix = "eval.weights."
    names = [name.removeprefix(prefix) for name in GRADIENTS if name.startswith(prefix)]
    assert sorted(map(our_name, names)) == sorted(parameters)
    for name in names:
        gradient = parameters[our_name(name)].grad
        assert gradient is not None
        assert_relative(gradient, GRADIENTS[prefix + name], 1e-3, name)
    assert voxels.features.grad is not None
    assert_relative(voxels.features.grad, GRADIENTS["eval.voxel_features"][order], 1e-3)


def test_training_mode_is_the_reference_s_statistics_and_gradients_too() -> None:
    model = detector(train=True)
    voxels, order = golden_voxels()
    _, bev = encoder_of(model).encode(voxels)
    assert_relative(bev, OUTPUTS["train.bev"], 1e-4)
    assert_relative(model.neck(model.backbone(bev)), OUTPUTS["train.neck"], 1e-4)
    scalar = bev.square().sum()
    assert_relative(scalar, OUTPUTS["train.scalar"], 1e-4)
    scalar.backward()
    assert voxels.features.grad is not None
    assert_relative(voxels.features.grad, GRADIENTS["train.voxel_features"][order], 1e-3)
    state = model.state_dict()
    prefix = "train.state_after."
    for name, expected in OUTPUTS.items():
        if name.startswith(prefix):
            assert_relative(state[our_name(name.removeprefix(prefix))], expected, 1e-4, name)


@pytest.mark.parametrize(("cell_m", "reach_m", "map_cells"), [(0.1, 51.2, 128), (0.075, 54.0, 180)])
def test_the_published_configurations_have_the_published_number_of_parameters(
    cell_m: float, reach_m: float, map_cells: int
) -> None:
    config = CenterPointConfig(
        grid=BevGrid(x_range_m=(-reach_m, reach_m), y_range_m=(-reach_m, reach_m), cell_m=cell_m),
        pillars=SparseVoxelsConfig(),
        backbone=SecondConfig(channels=(128, 256), layers=(5, 5), strides=(1, 2)),
        neck=SecondFpnConfig(channels=(256, 256), upsample=(1.0, 2.0)),
    )
    with torch.device("meta"):
        model = CenterPoint(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_938_262
    assert model.pillars.out_channels == 256
    assert model.head.grid.shape == (map_cells, map_cells)
