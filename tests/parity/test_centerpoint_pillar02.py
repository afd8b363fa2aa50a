"""CenterPoint with 0.2 m pillars against golden a_centerpoint_pillar02, from points to gradients.

The golden has maps in the old box convention (width first, clockwise yaw). Weights are brought to ours by
turning the output channels of the dim and rot branches, gradients are turned back the same way.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distillbev.grid import BevGrid
from distillbev.models.center_head import CenterHeadConfig
from distillbev.models.centerpoint import CenterPoint, CenterPointConfig
from distillbev.models.pillars import (
    HardPillars,
    HardPillarsConfig,
    Slots,
    fill_slots,
    fill_slots_by_loop,
    point_cells,
    scatter_to_map,
)
from distillbev.models.second import SecondConfig, SecondFpnConfig
from distillbev.weights.rename import CENTERPOINT_PILLARS, renamed
from distillbev.weights.rename import turn_weight as turn

GOLDEN = Path(__file__).parents[1] / "golden" / "a_centerpoint_pillar02"
INPUTS, OUTPUTS, GRADIENTS, WEIGHTS = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients", "weights")
)
GRID = BevGrid(x_range_m=(-6.4, 6.4), y_range_m=(-4.8, 4.8), cell_m=0.2)
ROWS, COLUMNS = GRID.shape
CELLS = ROWS * COLUMNS


def config() -> CenterPointConfig:
    return CenterPointConfig(
        grid=GRID,
        pillars=HardPillarsConfig(channels=(8,)),
        backbone=SecondConfig(channels=(8, 12, 16)),
        neck=SecondFpnConfig(channels=(10, 10, 10)),
        head=CenterHeadConfig(shared_channels=12, branch_channels=10),
    )


def our_map(name: str, value: Tensor) -> Tensor:
    if name == "dim":
        return value[:, [1, 0, 2]]
    return -value[:, [1, 0]] if name == "rot" else value


def our_name(name: str) -> str:
    ours = renamed(name, CENTERPOINT_PILLARS)
    assert ours is not None, name
    return ours


def model(train: bool = False) -> CenterPoint:
    detector = CenterPoint(config())
    state = {our_name(n): turn(n, w) for n, w in WEIGHTS.items() if n.startswith("pts_")}
    detector.load_state_dict(state)
    return detector.train(train)


def golden_slots() -> Slots:
    coors = INPUTS["coors"]
    cells = coors[:, 0] * CELLS + coors[:, 2] * COLUMNS + coors[:, 3]
    return Slots(points=INPUTS["voxels"].clone(), counts=INPUTS["num_points"], cells=cells)


def batch_points() -> tuple[Tensor, Tensor]:
    """All points inside the ranges and their cells over the batch."""
    clouds = [INPUTS["points.0"], INPUTS["points.1"]]
    cells = torch.cat([point_cells(p, GRID, (-5.0, 3.0)) + b * CELLS for b, p in enumerate(clouds)])
    inside = torch.cat([point_cells(p, GRID, (-5.0, 3.0)) >= 0 for p in clouds])
    return torch.cat(clouds)[inside], cells[inside]


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    assert actual.shape == expected.shape
    scale = max(float(expected.abs().max()), 1e-12)
    assert float((actual.detach() - expected).abs().max()) / scale <= tolerance, name


@pytest.mark.parametrize("sample", [0, 1])
def test_points_fall_into_the_reference_s_cells(sample: int) -> None:
    expected = OUTPUTS[f"voxelize_dynamic.{sample}.coors"]
    flat = torch.where(expected[:, 0] < 0, -1, expected[:, 1] * COLUMNS + expected[:, 2])
    assert torch.equal(point_cells(INPUTS[f"points.{sample}"], GRID, (-5.0, 3.0)), flat)


@pytest.mark.parametrize("fill", [fill_slots, fill_slots_by_loop])
def test_hard_voxelisation_is_exact(fill) -> None:
    points, cells = batch_points()
    slots, expected = fill(points, cells, CELLS, 2, 20, 40_000), golden_slots()
    assert torch.equal(slots.points, expected.points)
    assert torch.equal(slots.counts, expected.counts)
    assert torch.equal(slots.cells, expected.cells)
    opened = torch.bincount(slots.cells // CELLS).tolist()
    assert opened == [int(OUTPUTS[f"voxelize_full.{b}.num_voxels"]) for b in (0, 1)]


@pytest.mark.parametrize("fill", [fill_slots, fill_slots_by_loop])
def test_hard_voxelisation_is_exact_at_both_limits(fill) -> None:
    points, cells = batch_points()
    slots = fill(points, cells, CELLS, 2, 3, 40)
    coors = [OUTPUTS[f"voxelize_cap.{b}.coors"] for b in (0, 1)]
    expected = torch.cat([b * CELLS + c[:, 1] * COLUMNS + c[:, 2] for b, c in enumerate(coors)])
    assert torch.equal(slots.cells, expected)
    assert torch.equal(slots.points, torch.cat([OUTPUTS[f"voxelize_cap.{b}.voxels"] for b in (0, 1)]))
    assert torch.equal(slots.counts, torch.cat([OUTPUTS[f"voxelize_cap.{b}.num_points"] for b in (0, 1)]))


@pytest.mark.parametrize(
    ("weights", "output", "encoder"),
    [
        ("pts_voxel_encoder", "pillar_features", HardPillarsConfig(channels=(8,))),
        ("pts_voxel_encoder", "legacy.pillar_features", HardPillarsConfig(channels=(8,), overwrite_xy=True)),
        ("variant_two_pfn", "variant_two_pfn.pillar_features", HardPillarsConfig(channels=(8, 8))),
        (
            "variant_avg_dist",
            "variant_avg_dist.pillar_features",
            HardPillarsConfig(channels=(8,), reduction="mean", with_distance=True),
        ),
        ("variant_v1x", "variant_v1x.pillar_features", HardPillarsConfig(channels=(8,), offset_axes="xyz")),
    ],
)
def test_pillar_features_are_the_reference_s(weights: str, output: str, encoder: HardPillarsConfig) -> None:
    pillars = HardPillars(encoder, GRID).eval()
    pillars.load_state_dict(
        {n.removeprefix(f"{weights}."): w for n, w in WEIGHTS.items() if n.startswith(f"{weights}.")}
    )
    assert_relative(pillars.encode(golden_slots()), OUTPUTS[output], 1e-5)


def run(detector: CenterPoint, slots: Slots) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    features = detector.pillars.encode(slots)
    canvas = scatter_to_map(features, slots.cells, 2, GRID)
    stages = detector.backbone(canvas)
    neck = detector.neck(stages)
    maps = {"pillar_features": features, "canvas": canvas, "neck": neck}
    return maps | {f"backbone.{i}": s for i, s in enumerate(stages)}, detector.head(neck)


def scalar_of(heads: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([m.square().mean() for task in heads for m in task.values()]).sum() / 2


def test_every_map_is_the_reference_s() -> None:
    maps, heads = run(model(), golden_slots())
    for name, value in maps.items():
        assert_relative(value, OUTPUTS[name], 1e-5, name)
    for t, task in enumerate(heads):
        for name, value in task.items():
            assert_relative(our_map(name, value), OUTPUTS[f"head.task{t}.{name}"], 1e-5, f"{t} {name}")
    assert_relative(scalar_of(heads), OUTPUTS["scalar"], 1e-5)


def test_points_reach_the_same_heads_through_the_whole_forward() -> None:
    detector = model()
    canvas = detector.pillars([INPUTS["points.0"], INPUTS["points.1"]])
    assert_relative(canvas, OUTPUTS["canvas"], 1e-5)


def test_gradients_are_the_reference_s() -> None:
    detector, slots = model(), golden_slots()
    slots.points.requires_grad_()
    maps, heads = run(detector, slots)
    maps["canvas"].retain_grad()
    maps["neck"].retain_grad()
    scalar_of(heads).backward()
    parameters = dict(detector.named_parameters())
    seen = 0
    for name, expected in GRADIENTS.items():
        if not name.startswith("eval.weights."):
            continue
        old = name.removeprefix("eval.weights.")
        gradient = parameters[our_name(old)].grad
        assert gradient is not None
        assert_relative(turn(old, gradient), expected, 1e-4, name)
        seen += 1
    assert seen == len(parameters)
    for value, name in (
        (slots.points, "eval.inputs.voxels"),
        (maps["neck"], "eval.outputs.neck"),
        (maps["canvas"], "eval.outputs.canvas"),
    ):
        assert value.grad is not None
        assert_relative(value.grad, GRADIENTS[name], 1e-4, name)


def test_training_mode_is_the_reference_s_statistics_and_gradients_too() -> None:
    detector = model(train=True)
    maps, heads = run(detector, golden_slots())
    assert_relative(maps["pillar_features"], OUTPUTS["train.pillar_features"], 1e-5)
    assert_relative(maps["neck"], OUTPUTS["train.neck"], 1e-5)
    for name, value in heads[0].items():
        assert_relative(our_map(name, value), OUTPUTS[f"train.head.task0.{name}"], 1e-5, name)
    scalar = scalar_of(heads)
    assert_relative(scalar, OUTPUTS["train.scalar"], 1e-5)
    state = detector.state_dict()
    for name, expected in OUTPUTS.items():
        if name.startswith("train.state_after."):
            old = name.removeprefix("train.state_after.")
            assert_relative(state[our_name(old)], expected, 1e-5, name)
    scalar.backward()
    parameters = dict(detector.named_parameters())
    for name, expected in GRADIENTS.items():
        if name.startswith("train.weights."):
            old = name.removeprefix("train.weights.")
            gradient = parameters[our_name(old)].grad
            assert gradient is not None
            assert_relative(turn(old, gradient), expected, 1e-4, name)


def test_the_published_configuration_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        detector = CenterPoint(CenterPointConfig())
    assert sum(p.numel() for p in detector.parameters()) == 5_982_790
    assert detector.head.grid.shape == (128, 128)
