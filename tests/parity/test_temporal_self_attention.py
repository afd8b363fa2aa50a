"""Temporal self-attention and the handling of ego motion against golden d1_temporal_self_attention.

The golden knows motion as signals of a CAN bus; they are brought to poses here.
"""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distillbev.grid import BevGrid
from distillbev.models.attention import TemporalSelfAttention, cell_reference
from distillbev.models.planar_motion import planar_motion, rotate_map

GOLDEN = Path(__file__).parents[1] / "golden" / "d1_temporal_self_attention"
INPUTS, OUTPUTS, GRADIENTS, WEIGHTS = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients", "weights")
)
GRID = BevGrid(x_range_m=(-20.0, 20.0), y_range_m=(-16.0, 16.0), cell_m=4.0)


def assert_gradient(actual: Tensor | None, expected: Tensor, name: str = "") -> None:
    assert actual is not None, name
    assert float((actual - expected).abs().max()) <= 1e-3 * float(expected.abs().max()), name


def lidar2global(can_bus: Tensor, previous: bool) -> Tensor:
    """Pose of a LiDAR over the vehicle's origin, its y axis pointing forward, now or one frame before.

    The signals hold the displacement since the frame before, the present yaw in radians (16) and its change
    in degrees (17).
    """
    signals = can_bus.double()
    yaw = signals[16] - (math.radians(signals[17]) if previous else 0.0) - math.pi / 2
    pose = torch.eye(4, dtype=torch.float64)
    pose[0, :2] = torch.stack([yaw.cos(), -yaw.sin()])
    pose[1, :2] = torch.stack([yaw.sin(), yaw.cos()])
    if not previous:
        pose[:3, 3] = signals[:3]
    return pose


@pytest.mark.parametrize("case", ["noprev", "prev", "inplace"])
def test_attention_is_the_reference_s_sample_by_sample(case: str) -> None:
    module = TemporalSelfAttention(32, heads=4, points=4).eval()
    module.load_state_dict(WEIGHTS)
    names = ("query", "query_pos", "prev_bev", "bev_query_init")
    query, position, history, initial = (INPUTS[f"tsa.{name}"].clone().requires_grad_() for name in names)
    grid = cell_reference((8, 10))[None]
    torch.testing.assert_close(grid, OUTPUTS["tsa.ref_2d"][:, :, 0])
    shifted = grid + INPUTS["tsa.shift"][:, None]
    maps = (query, query) if case == "noprev" else (history, initial)
    references = {"noprev": (grid, grid), "prev": (shifted, grid), "inplace": (shifted, shifted)}[case]
    out = query + module(query, position, maps, references, (8, 10))
    torch.testing.assert_close(out, OUTPUTS[f"tsa.{case}.expected"], rtol=1e-4, atol=1e-5)
    if case == "inplace":
        return  # the golden has no gradients for it
    (out * INPUTS["tsa.cotangent"]).sum().backward()
    used = names[:2] if case == "noprev" else names
    for name, tensor in zip(used, (query, position, history, initial), strict=False):
        assert_gradient(tensor.grad, GRADIENTS[f"tsa.{case}.{name}"], name)
    for name, parameter in module.named_parameters():
        assert_gradient(parameter.grad, GRADIENTS[f"tsa.{case}.weight.{name}"], name)


@pytest.mark.parametrize(
    ("centre", "output"), [("rot.center_xy", "rot.out"), ("rot.center_xy_far", "rot.out_far")]
)
def test_rotation_is_the_reference_s_to_the_cell(centre: str, output: str) -> None:
    before = INPUTS["rot.bev"].clone()
    x, y = INPUTS[centre].tolist()
    turned = rotate_map(INPUTS["rot.bev"], INPUTS["rot.angle_deg"].deg2rad(), (x, y))
    assert torch.equal(turned, OUTPUTS[output])
    assert torch.equal(INPUTS["rot.bev"], before)  # the reference overwrites it


def test_shift_from_poses_is_the_reference_s_from_its_signals() -> None:
    signals = INPUTS["shift.can_bus"]
    now = torch.stack([lidar2global(row, previous=False) for row in signals])
    before = torch.stack([lidar2global(row, previous=True) for row in signals])
    motion = planar_motion(torch.linalg.inv(now) @ before)
    extent = torch.tensor([40.0, 32.0])
    torch.testing.assert_close(
        motion.forward_m / extent, OUTPUTS["shift.xy_normalised"], rtol=1e-4, atol=1e-5
    )


def test_motion_over_a_sequence_is_the_reference_s_difference_of_signals() -> None:
    absolute, scenes = INPUTS["seq.can_bus_absolute"], INPUTS["seq.scene"]
    assert torch.equal(OUTPUTS["seq.can_bus_test"], OUTPUTS["seq.can_bus_train"])
    poses = []
    for row in absolute:
        relative = row.clone()
        relative[17] = 0
        poses.append(lidar2global(relative, previous=False))
    for i in range(1, len(poses)):
        if scenes[i] != scenes[i - 1]:
            assert not OUTPUTS["seq.prev_bev_exists_test"][i]
            continue
        motion = planar_motion((torch.linalg.inv(poses[i]) @ poses[i - 1])[None])
        expected = OUTPUTS["seq.can_bus_test"][i]
        degrees = float(motion.turn_rad.rad2deg())
        # The reference does not wrap the change of yaw: 359 -> 1 gives -358 there, 2 here.
        assert abs((degrees - float(expected[17]) + 180) % 360 - 180) < 1e-2
        assert abs(float(motion.signals[0, :2].norm()) - float(expected[:2].norm())) < 1e-3
