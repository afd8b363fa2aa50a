"""The BEVFormer encoder over two frames against golden d3_encoder, values and gradients.

The golden knows motion as signals of a CAN bus: the embedding gets them as they are, the rest gets the motion
that follows from them.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from old_queries import assert_gradient, our_name
from safetensors.torch import load_file
from torch import Tensor

from distillbev.grid import BevGrid
from distillbev.models.bevformer import BevFormerConfig, BevFormerEncoder, EncoderConfig, Scene
from distillbev.models.image_pyramid import ImagePyramidConfig
from distillbev.models.planar_motion import BevHistory, PlanarMotion, rotate_map

GOLDEN = Path(__file__).parents[1] / "golden" / "d3_encoder"
INPUTS, OUTPUTS, GRADIENTS, WEIGHTS = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients", "weights")
)
EXTENT_M = torch.tensor([40.0, 32.0])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def name_of(old: str) -> str:
    return our_name(old, "temporal", "spatial")


def model() -> BevFormerEncoder:
    config = BevFormerConfig(
        grid=BevGrid(x_range_m=(-20.0, 20.0), y_range_m=(-16.0, 16.0), cell_m=4.0),
        z_range_m=(-5.0, 3.0),
        image_encoder=ImagePyramidConfig(strides=(8, 16)),
        num_cameras=4,
        channels=32,
        encoder=EncoderConfig(layers=2, heads=4, ffn_channels=64),
    )
    encoder = BevFormerEncoder(config).eval()
    encoder.load_state_dict({name_of(old): weight for old, weight in WEIGHTS.items()})
    return encoder


def arguments(frame: int) -> tuple[list[Tensor], Tensor, tuple[int, int], PlanarMotion]:
    signals = INPUTS[f"frame{frame}.can_bus"][None]
    motion = PlanarMotion(
        turn_rad=signals[:, 17].deg2rad(),
        forward_m=OUTPUTS[f"frame{frame}.encoder_in.shift"] * EXTENT_M,
        signals=signals,
    )
    height, width = INPUTS["img_shape"].tolist()
    features = [INPUTS[f"frame{frame}.feat.{level}"].clone().requires_grad_() for level in (0, 1)]
    return features, INPUTS[f"frame{frame}.lidar2img"], (height, width), motion


def as_map(cells: Tensor) -> Tensor:
    """(1, Q, C) -> (1, C, Y, X)."""
    return cells.transpose(1, 2).unflatten(2, (8, 10))


def history_of(cells: Tensor) -> BevHistory:
    nowhere = torch.eye(4)[None]
    return BevHistory(as_map(cells), nowhere.double(), nowhere, torch.tensor([True]))


HISTORY = {0: None, 1: history_of(OUTPUTS["frame0.bev"])}


def run_layer0(encoder: BevFormerEncoder, scene: Scene) -> dict[str, Tensor]:
    layer, steps = encoder.layers[0], {}
    query = scene.initial
    maps = (scene.history, scene.initial)
    references = (scene.history_reference, scene.reference)
    query = query + layer.temporal(query, scene.position, maps, references, scene.shape)
    steps["temporal"] = query
    steps["norm0"] = query = layer.norms[0](query)
    query = query + layer.spatial(query, scene.value, scene.value_shapes, scene.sight)
    steps["spatial"] = query
    steps["norm1"] = query = layer.norms[1](query)
    steps["ffn"] = query = query + layer.feed_forward(query)
    steps["norm2"] = layer.norms[2](query)
    return steps


@pytest.mark.parametrize("frame", [0, 1])
def test_what_the_layers_look_at_is_the_reference_s(frame: int) -> None:
    encoder = model()
    scene = encoder.look_around(*arguments(frame), HISTORY[frame])
    prefix = f"frame{frame}"
    close(scene.position, OUTPUTS["bev_pos"][0].flatten(1).T)
    close(scene.initial[0], OUTPUTS[f"{prefix}.encoder_in.bev_query"][:, 0])
    expected = OUTPUTS[f"{prefix}.encoder_in.value"]  # of camera 0 only in frame 1
    close(scene.value[0, : len(expected)], expected)
    seen = OUTPUTS[f"{prefix}.bev_mask"].any(dim=-1)  # (N, 1, Q)
    assert torch.equal(scene.sight.cameras[0, :, 0], seen.sum(dim=0)[0])
    for camera, rows in enumerate(scene.sight.rows.view(4, -1)):
        assert torch.equal(rows[scene.sight.found[camera]], seen[camera, 0].nonzero()[:, 0])
    pairs = torch.cat([scene.history_reference, scene.reference])
    close(pairs, OUTPUTS[f"{prefix}.ref_2d_pairs"][:, :, 0])
    if frame == 1:
        close(scene.history[0], OUTPUTS["frame1.encoder_in.prev_bev_rotated"][:, 0])


@pytest.mark.parametrize("frame", [0, 1])
def test_every_step_of_a_layer_is_the_reference_s(frame: int) -> None:
    encoder = model()
    scene = encoder.look_around(*arguments(frame), HISTORY[frame])
    for name, value in run_layer0(encoder, scene).items():
        close(value, OUTPUTS[f"frame{frame}.layer0.{name}"])
    first = encoder.layers[0](scene.initial, scene)
    close(first, OUTPUTS[f"frame{frame}.layer0"])
    close(encoder.layers[1](first, scene), OUTPUTS[f"frame{frame}.layer1"])


def test_two_frames_give_the_reference_s_map_and_gradients() -> None:
    encoder = model()
    cotangent = as_map(INPUTS["cotangent"])
    features, *rest = arguments(0)
    first = encoder(features, *rest)
    close(first, as_map(OUTPUTS["frame0.bev"]))
    (first * cotangent).sum().backward()
    for level, feature in enumerate(features):
        assert_gradient(feature.grad, GRADIENTS[f"frame0.feat.{level}"])

    encoder.zero_grad()
    features, *rest = arguments(1)
    kept = first.detach().clone()
    history = replace(HISTORY[1], bev=kept)
    second = encoder(features, *rest, history)
    close(second, as_map(OUTPUTS["frame1.bev"]))
    assert torch.equal(kept, first)  # the reference turns the caller's map
    (second * cotangent).sum().backward()
    for level, feature in enumerate(features):
        assert_gradient(feature.grad, GRADIENTS[f"frame1.feat.{level}"])
    parameters = dict(encoder.named_parameters())
    for old in WEIGHTS:
        assert_gradient(parameters[name_of(old)].grad, GRADIENTS[f"frame1.weight.{old}"], old)
    assert len(WEIGHTS) == len(parameters)


def test_shifting_both_references_gives_the_reference_s_fault() -> None:
    """The fault that is not ours: the present map shifted along with the history."""
    encoder = model()
    scene = encoder.look_around(*arguments(1), HISTORY[1])
    scene = replace(scene, reference=scene.history_reference)
    query = scene.initial
    for layer in encoder.layers:
        query = layer(query, scene)
    close(query, OUTPUTS["inplace_variant.frame1.bev"])
    assert float((OUTPUTS["inplace_variant.frame1.bev"] - OUTPUTS["frame1.bev"]).abs().max()) > 1e-2


def test_samples_of_a_batch_with_and_without_history_do_not_touch_each_other() -> None:
    encoder = model()
    one, two = arguments(0), arguments(1)
    features = [torch.cat(pair) for pair in zip(one[0], two[0], strict=True)]
    fields = ("turn_rad", "forward_m", "signals")
    motion = PlanarMotion(*(torch.cat([getattr(a[3], field) for a in (one, two)]) for field in fields))
    nowhere = torch.eye(4).expand(2, 4, 4)
    # Sample 0 has no history; what lies in its place must not be looked at.
    bev = torch.cat([torch.full((1, 32, 8, 10), 7.0), as_map(OUTPUTS["frame0.bev"])])
    history = BevHistory(bev, nowhere.double(), nowhere, torch.tensor([False, True]))
    both = encoder(features, torch.cat([one[1], two[1]]), one[2], motion, history)
    close(both[:1], as_map(OUTPUTS["frame0.bev"]))
    close(both[1:], as_map(OUTPUTS["frame1.bev"]))


def test_a_turn_of_the_map_and_back_keeps_what_stayed_inside() -> None:
    bev = torch.rand(1, 1, 10, 10)
    quarter = torch.tensor([torch.pi / 2])
    there = rotate_map(bev, quarter, (5.0, 5.0))
    assert torch.equal(rotate_map(there, -quarter, (5.0, 5.0)), bev)
    assert not torch.equal(there, bev)
