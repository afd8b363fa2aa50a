import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distillbev.errors import ConfigError
from distillbev.models import sparse_conv
from distillbev.models.sparse_conv import (
    Sites,
    SparseConv3d,
    SparseTensor,
    SubmanifoldConv3d,
    Triple,
    convolve,
    convolve_dense,
)


def draw_tensor(
    shape: tuple[int, int, int, int],
    share: float,
    channels: int,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> SparseTensor:
    generator = torch.Generator().manual_seed(seed)
    occupied = torch.rand(shape, generator=generator) < share
    sites = Sites(occupied.flatten().nonzero().squeeze(1), shape)
    return SparseTensor(torch.randn(len(sites), channels, generator=generator, dtype=dtype), sites)


def gradients(result: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    return torch.autograd.grad((result * weights).sum(), leaves)


def assert_layer_equals_its_dense_twin(
    tensor: SparseTensor, weight: Tensor, stride: Triple, padding: Triple, submanifold: bool
) -> None:
    tensor.features.requires_grad_()
    weight.requires_grad_()
    kernel = (weight.shape[1], weight.shape[2], weight.shape[3])
    if submanifold:
        sites, rulebook = tensor.sites, tensor.sites.submanifold(kernel)
    else:
        sites, rulebook = tensor.sites.strided(kernel, stride, padding)
    result = convolve(tensor.features, weight, rulebook)
    twin = convolve_dense(tensor, weight, stride, padding, submanifold)
    assert sites.shape == twin.sites.shape
    assert torch.equal(sites.cells, twin.sites.cells)
    assert torch.allclose(result, twin.features, atol=1e-10)
    for ours, theirs in zip(
        gradients(result, tensor.features, weight),
        gradients(twin.features, tensor.features, weight),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-10)


extents = st.tuples(st.integers(1, 3), *[st.integers(1, 6)] * 3)
seeds = st.integers(0, 2**31)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(extents, st.floats(0, 1), st.tuples(*[st.sampled_from([1, 3, 5])] * 3), seeds)
def test_submanifold_values_and_gradients_are_those_of_a_masked_dense_convolution(
    shape: tuple[int, int, int, int], share: float, kernel: Triple, seed: int
) -> None:
    tensor = draw_tensor(shape, share, 3, seed)
    weight = torch.randn(2, *kernel, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    assert_layer_equals_its_dense_twin(tensor, weight, (1, 1, 1), padding, submanifold=True)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    extents,
    st.floats(0, 1),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.tuples(*[st.integers(0, 1)] * 3),
    seeds,
)
def test_strided_values_and_gradients_are_those_of_a_masked_dense_convolution(
    shape: tuple[int, int, int, int], share: float, kernel: Triple, stride: Triple, padding: Triple, seed: int
) -> None:
    tensor = draw_tensor(shape, share, 3, seed)
    weight = torch.randn(2, *kernel, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if any(size + 2 * p < k for size, k, p in zip(shape[1:], kernel, padding, strict=True)):
        with pytest.raises(ConfigError, match="finds no place"):
            tensor.sites.strided(kernel, stride, padding)
        return
    assert_layer_equals_its_dense_twin(tensor, weight, stride, padding, submanifold=False)


def test_a_neighbour_across_the_border_of_a_row_layer_or_sample_is_none() -> None:
    # Each pair lies side by side in the linear order, or nearly so, yet on opposite borders.
    rows = torch.tensor([[0, 0, 2, 3], [0, 0, 3, 0], [0, 0, 7, 1], [0, 1, 0, 1], [0, 1, 7, 3], [1, 0, 0, 3]])
    sites, _ = Sites.from_coordinates(rows, (2, 2, 8, 4))
    assert sites.submanifold((3, 3, 3)).num_pairs == len(rows)  # every site meets itself alone


def test_a_hand_worked_row_gives_the_weighted_neighbours() -> None:
    sites, _ = Sites.from_coordinates(torch.tensor([[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4]]), (1, 1, 1, 6))
    features = torch.tensor([[1.0], [10.0], [100.0]])
    weight = torch.tensor([2.0, 3.0, 5.0]).view(1, 1, 1, 3, 1)  # left, self, right
    result = convolve(features, weight, sites.submanifold((1, 1, 3)))
    assert result.flatten().tolist() == [3 * 1 + 5 * 10, 2 * 1 + 3 * 10, 3 * 100]
    coarse, rulebook = sites.strided((1, 1, 3), (1, 1, 2), (0, 0, 1))
    assert coarse.coordinates()[:, 3].tolist() == [0, 1, 2]
    assert convolve(features, weight, rulebook).flatten().tolist() == [5 * 1, 2 * 1 + 3 * 10, 3 * 100]


def test_coordinates_survive_the_way_into_sites_and_back() -> None:
    tensor = draw_tensor((2, 3, 4, 5), 0.4, 1, seed=1)
    rows = tensor.sites.coordinates()
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    sites, order = Sites.from_coordinates(shuffled, (2, 3, 4, 5))
    assert torch.equal(sites.cells, tensor.sites.cells)
    assert torch.equal(shuffled[order], rows)


def test_layers_on_the_same_sites_share_one_rulebook() -> None:
    tensor = draw_tensor((1, 4, 4, 4), 0.5, 3, seed=2, dtype=torch.float32)
    between = SubmanifoldConv3d(3, 6)(tensor)
    rulebook = between.sites.submanifold((3, 3, 3))
    assert rulebook is tensor.sites.submanifold((3, 3, 3))
    halving = [SparseConv3d(6, 2, stride=(2, 2, 2), padding=(1, 1, 1)) for _ in range(2)]
    assert halving[0](between).sites is halving[1](between).sites


@pytest.mark.parametrize("stride", [None, (2, 2, 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_rulebook_of_many_blocks_holds_every_pair_once(
    stride: Triple | None, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_conv, "PAIRS_PER_BLOCK", 1000)
    sites = draw_tensor((2, 20, 30, 30), 0.5, 1, seed=6).sites
    kernel = (3, 3, 3)
    rulebook = sites.submanifold(kernel) if stride is None else sites.strided(kernel, stride, (1, 1, 1))[1]
    rulebook = rulebook.transposed if transposed else rulebook
    assert len(rulebook.blocks) > 27
    assert [block.first for block in rulebook.blocks] == [0, *(block.last for block in rulebook.blocks[:-1])]
    assert rulebook.blocks[-1].last == rulebook.num_outputs
    for k, (inputs, outputs) in enumerate(zip(rulebook.inputs, rulebook.outputs, strict=True)):
        assert (inputs.diff() > 0).all() and (outputs.diff() > 0).all()
        own = [step for block in rulebook.blocks for step in block.steps if step[0] == k]
        assert sum(len(step_inputs) for _, step_inputs, _ in own) == len(inputs)
        if own:
            assert torch.equal(torch.cat([step_inputs for _, step_inputs, _ in own]), inputs)
            assert torch.equal(torch.cat([step_outputs for _, _, step_outputs in own]), outputs)
    for block in rulebook.blocks:
        in_order = torch.cat([outputs for _, _, outputs in block.steps])[block.order]
        assert (in_order.diff() >= 0).all()
        assert torch.equal(block.starts, torch.searchsorted(in_order, torch.arange(block.first, block.last)))


def test_a_grid_of_many_blocks_equals_its_dense_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_conv, "PAIRS_PER_BLOCK", 1000)
    tensor = draw_tensor((2, 12, 20, 20), 0.5, 3, seed=7)
    weight = torch.randn(2, 3, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    assert len(tensor.sites.submanifold((3, 3, 3)).blocks) > 26
    assert_layer_equals_its_dense_twin(tensor, weight, (1, 1, 1), (1, 1, 1), submanifold=True)


def test_backward_keeps_no_more_than_features_and_weights() -> None:
    tensor = draw_tensor((1, 8, 8, 8), 0.5, 4, seed=3, dtype=torch.float32)
    tensor.features.requires_grad_()
    layer = SubmanifoldConv3d(4, 4)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(tensor)
    assert sum(kept) <= tensor.features.numel() + layer.weight.numel()


def test_autocast_gives_bfloat16_near_the_float32_result_and_float32_gradients_of_weights() -> None:
    tensor = draw_tensor((1, 6, 6, 6), 0.6, 16, seed=4, dtype=torch.float32)
    layer = SubmanifoldConv3d(16, 8)
    exact = layer(tensor).features
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(tensor).features
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max().item() < 0.02 * exact.abs().max().item()
    rounded.float().square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    ours = layer.weight.grad
    (exact_grad,) = torch.autograd.grad(exact.square().sum(), layer.weight)
    assert (ours - exact_grad).abs().max().item() < 0.02 * exact_grad.abs().max().item()


def test_a_batch_without_sites_passes_through_both_layers() -> None:
    tensor = draw_tensor((2, 5, 4, 4), 0.0, 3, seed=5, dtype=torch.float32)
    layer, halving = SubmanifoldConv3d(3, 4), SparseConv3d(4, 2, stride=(2, 2, 2), padding=(1, 1, 1))
    result = halving(layer(tensor))
    assert result.features.shape == (0, 2)
    assert torch.equal(result.dense(), torch.zeros(2, 2, 3, 2, 2))


def test_an_even_submanifold_kernel_is_refused() -> None:
    with pytest.raises(ConfigError, match="odd sizes"):
        SubmanifoldConv3d(1, 1, (3, 2, 3))
