"""Spatial cross-attention and deformable sampling against golden d2_spatial_cross_attention.

The golden keeps cameras before the batch in some tensors; they are brought to batch first here.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distillbev.grid import BevGrid
from distillbev.models.attention import (
    SpatialCrossAttention,
    cell_reference,
    find_sight,
    sample_deformably,
    sample_deformably_by_loop,
)
from distillbev.models.bevformer import pillar_anchors, project_anchors

GOLDEN = Path(__file__).parents[1] / "golden" / "d2_spatial_cross_attention"
INPUTS, OUTPUTS, GRADIENTS, WEIGHTS = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients", "weights")
)
GRID = BevGrid(x_range_m=(-20.0, 20.0), y_range_m=(-16.0, 16.0), cell_m=4.0)
PREFIX = "deformable_attention."


def shapes(name: str) -> list[tuple[int, int]]:
    return [(int(h), int(w)) for h, w in INPUTS[name]]


def assert_gradient(actual: Tensor | None, expected: Tensor, name: str = "") -> None:
    assert actual is not None, name
    assert float((actual - expected).abs().max()) <= 1e-3 * float(expected.abs().max()), name


def attention() -> SpatialCrossAttention:
    module = SpatialCrossAttention(32, heads=4, levels=2, points=8, anchors=4).eval()
    module.load_state_dict({name.removeprefix(PREFIX): weight for name, weight in WEIGHTS.items()})
    return module


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query (B, Q, C), value (B, N, S, C), anchors (B, N, Q, D, 2) and visibility (B, N, Q, D)."""
    return (
        INPUTS["sca.query"].clone().requires_grad_(),
        INPUTS["sca.value"].permute(2, 0, 1, 3).clone().requires_grad_(),
        OUTPUTS["geom.reference_points_cam"].transpose(0, 1),
        OUTPUTS["geom.bev_mask"].transpose(0, 1),
    )


@pytest.mark.parametrize("sample", [sample_deformably, sample_deformably_by_loop])
def test_deformable_sampling_is_the_reference_s_with_gradients(sample) -> None:
    names = ("value", "sampling_locations", "attention_weights")
    value, places, weights = (INPUTS[f"msda.{name}"].clone().requires_grad_() for name in names)
    out = sample(value, shapes("msda.spatial_shapes"), places, weights)
    torch.testing.assert_close(out, OUTPUTS["msda.out"], rtol=1e-4, atol=1e-5)
    (out * INPUTS["msda.cotangent"]).sum().backward()
    for tensor, name in zip((value, places, weights), names, strict=True):
        assert_gradient(tensor.grad, GRADIENTS[f"msda.{name}"], name)


def test_anchors_stand_where_the_reference_s_pillars_have_them() -> None:
    anchors = pillar_anchors(GRID, (-5.0, 3.0), 4)  # (Q, D, 3)
    extent = torch.tensor([40.0, 32.0, 8.0])
    expected = OUTPUTS["geom.ref_3d"][0].transpose(0, 1) * extent - torch.tensor([20.0, 16.0, 5.0])
    torch.testing.assert_close(anchors, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cell_reference((8, 10)), OUTPUTS["geom.ref_2d"][0, :, 0])


def test_projection_and_visibility_are_the_reference_s_for_every_sample() -> None:
    anchors = pillar_anchors(GRID, (-5.0, 3.0), 4)
    height, width = INPUTS["geom.img_shape"].tolist()
    uv, visible = project_anchors(anchors, INPUTS["geom.lidar2img"], (height, width))
    assert torch.equal(visible.transpose(0, 1), OUTPUTS["geom.bev_mask"])
    expected = OUTPUTS["geom.reference_points_cam"].transpose(0, 1)
    torch.testing.assert_close(uv[visible], expected[visible], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("samples", "case"), [(1, "b0"), (2, "batch")])
def test_attention_is_the_reference_s_with_visibility_per_sample(samples: int, case: str) -> None:
    module = attention()
    query, value, uv, visible = batch()
    out = query[:samples] + module(
        query[:samples],
        value[:samples],
        shapes("sca.spatial_shapes"),
        find_sight(uv[:samples], visible[:samples]),
    )
    expected = OUTPUTS["sca.b0.out" if case == "b0" else "sca.batch.expected"]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    (out * INPUTS["sca.cotangent"][:samples]).sum().backward()
    assert query.grad is not None and value.grad is not None
    wanted = GRADIENTS[f"sca.{case}.query"]
    assert_gradient(query.grad[: len(wanted)], wanted)
    wanted = GRADIENTS[f"sca.{case}.value"]
    assert_gradient(value.grad.permute(1, 2, 0, 3)[:, :, : wanted.shape[2]], wanted)
    for name, parameter in module.named_parameters():
        old = name if name.startswith("output_proj") else PREFIX + name
        assert_gradient(parameter.grad, GRADIENTS[f"sca.{case}.weight.{old}"], name)


def test_visibility_of_sample_zero_alone_gives_the_reference_s_fault() -> None:
    """The fault that is not ours, shown to be told apart by these inputs."""
    difference = OUTPUTS["sca.batch.expected"] - OUTPUTS["sca.batch.reference_as_is"]
    assert float(difference[0].abs().max()) < 1e-5 < 1e-2 < float(difference[1].abs().max())


def test_a_query_that_no_camera_sees_gets_the_output_bias() -> None:
    module = attention()
    query, value, uv, visible = batch()
    out = module(query, value, shapes("sca.spatial_shapes"), find_sight(uv, torch.zeros_like(visible)))
    torch.testing.assert_close(out, module.output_proj.bias.expand_as(out))
