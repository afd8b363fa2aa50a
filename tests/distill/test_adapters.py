import pytest
import torch

from distillbev.distill.adapters import (
    AdapterConfig,
    ConvAdapterConfig,
    IdentityAdapterConfig,
    LayeredAdapterConfig,
    build_adapter,
    resample,
)
from distillbev.errors import ConfigError


@pytest.mark.parametrize(
    "config",
    [
        LayeredAdapterConfig(),
        LayeredAdapterConfig(num_layers=2),
        LayeredAdapterConfig(upsample="align_corners", final_relu=False),
    ],
)
def test_layered_adapter_brings_channels_and_cells_to_the_teacher_whatever_the_ratio(
    config: LayeredAdapterConfig,
) -> None:
    adapter = build_adapter(config, 6, 10)
    for size in ((16, 16), (12, 20), (15, 9)):
        adapted = adapter(torch.randn(2, 6, 4, 5), size)
        assert adapted.shape == (2, 10, *size)
        assert (adapted.min() >= 0) == config.final_relu


def test_number_of_layers_and_widths_are_as_published() -> None:
    adapter = build_adapter(LayeredAdapterConfig(num_layers=3), 256, 128)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 165_760
    adapter = build_adapter(LayeredAdapterConfig(num_layers=3), 512, 256)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 659_200
    adapter = build_adapter(ConvAdapterConfig(), 256, 384)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 98_688


def test_half_pixel_upsampling_keeps_the_ground_and_align_corners_stretches_it() -> None:
    where = (torch.arange(8.0) + 0.5) / 8  # the place of each coarse cell's centre, from 0 to 1
    coarse = where.expand(1, 1, 8, 8)
    truth = (torch.arange(32.0) + 0.5) / 32
    kept = resample(coarse, (32, 32))[0, 0, 0]
    torch.testing.assert_close(kept[2:-2], truth[2:-2])
    stretched = resample(coarse, (32, 32), align_corners=True)[0, 0, 0]
    assert (stretched - truth).abs().max() * 32 == pytest.approx(1.5, rel=1e-4)  # cells, at the border


def test_coarser_cells_are_the_means_of_finer_ones() -> None:
    fine = torch.randn(1, 3, 8, 12)
    torch.testing.assert_close(resample(fine, (4, 6)), torch.nn.functional.avg_pool2d(fine, 2))
    assert resample(fine, (8, 12)) is fine


@pytest.mark.parametrize(
    "config", [ConvAdapterConfig(), ConvAdapterConfig(kernel_size=3), IdentityAdapterConfig()]
)
def test_convolution_and_identity_keep_the_cells(config: AdapterConfig) -> None:
    channels = 4 if isinstance(config, IdentityAdapterConfig) else 9
    assert build_adapter(config, 4, channels)(torch.randn(2, 4, 5, 7), (10, 14)).shape == (2, channels, 5, 7)


def test_identity_refuses_other_channels() -> None:
    with pytest.raises(ConfigError, match="4 channels to a teacher map of 9"):
        build_adapter(IdentityAdapterConfig(), 4, 9)
