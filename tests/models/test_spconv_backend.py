"""Both backends give the same; runs on the kind of device that the installed spconv is built for."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distillbev.grid import BevGrid
from distillbev.models.sparse_conv import Sites, SparseConv3d, SparseTensor, SubmanifoldConv3d
from distillbev.models.spconv_backend import built_for
from distillbev.models.voxels import SparseVoxels, SparseVoxelsConfig

DEVICE = built_for()
needs_spconv = pytest.mark.skipif(
    DEVICE is None or (DEVICE == "cuda" and not torch.cuda.is_available()),
    reason="no spconv, or its build is for CUDA and no such device is here",
)


def draw_tensor(share: float, channels: int) -> SparseTensor:
    generator = torch.Generator().manual_seed(0)
    occupied = torch.rand(2, 9, 12, 14, generator=generator) < share
    sites = Sites(occupied.flatten().nonzero().squeeze(1).to(DEVICE), (2, 9, 12, 14))
    return SparseTensor(torch.randn(len(sites), channels, generator=generator).to(DEVICE), sites)


def by_spconv(tensor: SparseTensor) -> SparseTensor:
    return SparseTensor(tensor.features, Sites(tensor.sites.cells, tensor.sites.shape, by_spconv=True))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max().item() <= 1e-4 * expected.abs().max().item()


@needs_spconv
@pytest.mark.parametrize(
    "build",
    [
        lambda: SubmanifoldConv3d(16, 32),
        lambda: SubmanifoldConv3d(16, 16, (1, 3, 3)),
        lambda: SubmanifoldConv3d(16, 32, (1, 1, 1)),
        lambda: SparseConv3d(16, 32, stride=(2, 2, 2), padding=(1, 1, 1)),
        lambda: SparseConv3d(16, 32, stride=(2, 2, 2), padding=(0, 1, 1)),
        lambda: SparseConv3d(16, 32, (3, 1, 1), (2, 1, 1)),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.002, 0.3])
def test_a_layer_gives_the_same_with_spconv(
    build: Callable[[], SubmanifoldConv3d | SparseConv3d], share: float
) -> None:
    torch.manual_seed(0)
    layer, tensor = build().to(DEVICE), draw_tensor(share, channels=16)
    tensor.features.requires_grad_()
    expected, found = layer(tensor), layer(by_spconv(tensor))
    assert found.sites.shape == expected.sites.shape
    assert torch.equal(found.sites.cells, expected.sites.cells)
    if share:
        assert_close(found.features, expected.features)
    if DEVICE == "cuda":  # spconv's build for CPUs has no way back
        weights = torch.randn_like(expected.features)
        leaves = (tensor.features, layer.weight)
        pairs = [torch.autograd.grad((t.features * weights).sum(), leaves) for t in (found, expected)]
        for ours, theirs in zip(*pairs, strict=True):
            assert_close(ours, theirs)


@needs_spconv
def test_the_encoder_gives_the_same_map_with_spconv() -> None:
    torch.manual_seed(0)
    grid = BevGrid(x_range_m=(-6.4, 6.4), y_range_m=(-3.2, 3.2), cell_m=0.2)
    encoder = SparseVoxels(SparseVoxelsConfig(channels=(16, 16, 32), out_channels=32, z_cell_m=0.4), grid)
    encoder.eval().to(DEVICE)
    points = (torch.rand(2000, 5) - 0.5) * torch.tensor([13.0, 7.0, 9.0, 1.0, 0.5])
    voxels = encoder.voxelise([points.to(DEVICE), points[:50].to(DEVICE)])
    plain = replace(voxels, sites=Sites(voxels.sites.cells, voxels.sites.shape))
    with torch.no_grad():
        assert_close(encoder.encode(by_spconv(voxels))[1], encoder.encode(plain)[1])


@needs_spconv
def test_layers_on_the_same_sites_share_spconvs_tables() -> None:
    tensor = by_spconv(draw_tensor(0.3, channels=16))
    with torch.no_grad():
        SubmanifoldConv3d(16, 16).to(DEVICE)(tensor)
        (table,) = tensor.sites._spconv_tables.values()
        SubmanifoldConv3d(16, 32).to(DEVICE)(tensor)
    assert list(tensor.sites._spconv_tables.values()) == [table]


def test_voxels_on_a_cpu_stay_with_torch() -> None:
    grid = BevGrid(x_range_m=(-6.4, 6.4), y_range_m=(-3.2, 3.2), cell_m=0.2)
    assert not SparseVoxels(SparseVoxelsConfig(), grid).voxelise([torch.zeros(1, 5)]).sites.by_spconv
