"""Deformable convolution: fast against slow, and a plain convolution where nothing is moved."""

import pytest
import torch
from torch.nn import functional

from distillbev.models.deformable_conv import (
    DeformableConv2d,
    deform_convolve,
    deform_convolve_by_loop,
)


@pytest.mark.parametrize(
    ("stride", "groups", "modulated", "bias"), [(1, 1, True, False), (2, 2, True, True), (1, 2, False, False)]
)
def test_fast_is_slow_with_gradients(stride: int, groups: int, modulated: bool, bias: bool) -> None:
    torch.manual_seed(0)
    rows, columns = (5 - 1) // stride + 1, (4 - 1) // stride + 1
    leaves = [
        torch.randn(2, 4, 5, 4),
        torch.randn(2, 9, 2, rows, columns) * 1.5,
        torch.rand(2, 9, rows, columns),
        torch.randn(6, 4 // groups, 3, 3),
        torch.randn(6),
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    features, offsets, strengths, weight, shift = leaves
    results, gradients = [], []
    for convolve in (deform_convolve, deform_convolve_by_loop):
        out = convolve(
            features,
            offsets,
            strengths if modulated else None,
            weight,
            shift if bias else None,
            stride,
            groups,
        )
        results.append(out)
        gradients.append(torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    for fast, slow in zip(*gradients, strict=True):
        assert (fast is None) == (slow is None)
        if fast is not None:
            torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_fresh_layer_is_a_plain_convolution_of_half_the_strength(stride: int) -> None:
    layer = DeformableConv2d(3, 5, stride=stride)
    features = torch.randn(2, 3, 7, 6)
    plain = functional.conv2d(features, layer.weight, stride=stride, padding=1)
    torch.testing.assert_close(layer(features), plain / 2, rtol=1e-4, atol=1e-5)


def test_a_move_by_a_whole_cell_reads_the_next_cell() -> None:
    layer = DeformableConv2d(1, 1, modulated=False)
    assert layer.conv_offset.bias is not None
    layer.conv_offset.bias.data = torch.tensor([0.0, 1.0] * 9)  # dy 0, dx 1
    features = torch.randn(1, 1, 6, 6)
    moved = functional.pad(features[..., 1:], (0, 1))
    inner = slice(1, -2)
    plain = functional.conv2d(moved, layer.weight, padding=1)
    torch.testing.assert_close(layer(features)[..., inner], plain[..., inner], rtol=1e-4, atol=1e-5)
