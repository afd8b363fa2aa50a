"""Deformable attention: fast against slow, and what must not touch what."""

import torch
from torch import Tensor

from distillbev.models.attention import (
    DeformableAttention,
    SpatialCrossAttention,
    TemporalSelfAttention,
    cell_reference,
    find_sight,
    flatten_maps,
    offset_layer,
    sample_deformably,
    sample_deformably_by_loop,
)


def randomise(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


def test_fast_sampling_is_the_slow_one_with_gradients_also_outside_the_maps() -> None:
    torch.manual_seed(0)
    shapes = [(3, 5), (2, 2)]
    leaves = (
        torch.randn(2, 19, 2, 3, requires_grad=True),
        (torch.rand(2, 3, 2, 2, 2, 2) * 1.6 - 0.3).requires_grad_(),
        torch.rand(2, 3, 2, 2, 2, requires_grad=True),
    )
    cotangent = torch.randn(2, 3, 6)
    gradients: list[tuple[Tensor, ...]] = []
    results = []
    for sample in (sample_deformably, sample_deformably_by_loop):
        results.append(sample(leaves[0], shapes, leaves[1], leaves[2]))
        gradients.append(torch.autograd.grad((results[-1] * cotangent).sum(), leaves))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_what_the_places_show_is_not_kept_for_the_way_back() -> None:
    value = torch.randn(1, 4, 1, 64, requires_grad=True)
    places, weights = (torch.rand(1, 50, 1, 1, 8, *last).requires_grad_() for last in ((2,), ()))
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        sample_deformably(value, [(2, 2)], places, weights)
    assert sum(kept.values()) < 64 * weights.numel() / 4  # a number per channel and place would be 64 times


def test_a_place_at_a_cell_s_centre_reads_that_cell() -> None:
    value = torch.arange(12.0).view(1, 12, 1, 1)
    places = cell_reference((3, 4)).view(1, 12, 1, 1, 1, 2)
    read = sample_deformably(value, [(3, 4)], places, torch.ones(1, 12, 1, 1, 1))
    torch.testing.assert_close(read.flatten(), torch.arange(12.0))


def test_at_the_start_the_heads_look_in_different_directions_in_steps_of_a_cell() -> None:
    offsets = offset_layer(8, heads=4, groups=3, points=2).bias.view(4, 3, 2, 2)
    torch.testing.assert_close(offsets[0, 0], torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    torch.testing.assert_close(offsets[1, 2], torch.tensor([[0.0, 1.0], [0.0, 2.0]]), atol=1e-6, rtol=0)
    assert torch.equal(offsets[:, 0], offsets[:, 1])


def test_levels_are_flattened_row_by_row_one_after_the_other() -> None:
    flat, shapes = flatten_maps([torch.arange(6.0).view(1, 1, 2, 3), torch.full((1, 1, 1, 1), 9.0)])
    assert flat.flatten().tolist() == [0, 1, 2, 3, 4, 5, 9]
    assert shapes == [(2, 3), (1, 1)]


def test_samples_of_a_batch_see_by_their_own_visibility() -> None:
    torch.manual_seed(1)
    attention = SpatialCrossAttention(8, heads=2, levels=1, points=4, anchors=2)
    randomise(attention)
    B, N, Q, D, shapes = 3, 2, 7, 2, [(4, 5)]
    query, value = torch.randn(B, Q, 8), torch.randn(B, N, 20, 8)
    uv, visible = torch.rand(B, N, Q, D, 2), torch.rand(B, N, Q, D) < 0.4
    visible[2] = False
    together = attention(query, value, shapes, find_sight(uv, visible))
    for b in range(B):
        alone = attention(
            *(t[b : b + 1] for t in (query, value)), shapes, find_sight(uv[b : b + 1], visible[b : b + 1])
        )
        torch.testing.assert_close(together[b : b + 1], alone)


def test_a_camera_that_does_not_see_a_pillar_has_no_say_in_it() -> None:
    torch.manual_seed(2)
    attention = SpatialCrossAttention(8, heads=2, levels=1, points=2, anchors=2)
    randomise(attention)
    query, uv = torch.randn(1, 5, 8), torch.rand(1, 2, 5, 2, 2)
    visible = torch.zeros(1, 2, 5, 2, dtype=torch.bool)
    visible[0, 0, :, 1] = True
    value = torch.randn(1, 2, 12, 8)
    other = value.clone()
    other[:, 1] = torch.randn(12, 8)
    assert torch.equal(
        attention(query, value, [(3, 4)], find_sight(uv, visible)),
        attention(query, other, [(3, 4)], find_sight(uv, visible)),
    )


def test_temporal_attention_averages_its_two_maps() -> None:
    torch.manual_seed(3)
    attention = TemporalSelfAttention(8, heads=2, points=2)
    query, position = torch.randn(1, 12, 8), torch.zeros(12, 8)
    torch.nn.init.eye_(attention.value_proj.weight)
    torch.nn.init.eye_(attention.output_proj.weight)
    torch.nn.init.zeros_(attention.sampling_offsets.bias)
    grid = cell_reference((3, 4))[None]
    maps = (torch.full((1, 12, 8), 2.0), torch.full((1, 12, 8), 6.0))
    torch.testing.assert_close(
        attention(query, position, maps, (grid, grid), (3, 4)), torch.full((1, 12, 8), 4.0)
    )


def test_attention_in_bf16_autocast_stays_near_its_fp32_result() -> None:
    torch.manual_seed(4)
    attention = DeformableAttention(16, heads=4, levels=2, points=2)
    randomise(attention)
    query, value, shapes = torch.randn(1, 6, 16), torch.randn(1, 20, 16), [(4, 4), (2, 2)]
    reference = torch.rand(1, 6, 2)
    exact = attention(query, value, shapes, reference)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = attention(query, value, shapes, reference)
    assert float((rough - exact).detach().abs().max()) < 0.05 * float(exact.detach().abs().max())
