"""Bring a student's map to the teacher's channels and cells. Adapters are dropped after training."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from ..config import Config
from ..errors import ConfigError


class IdentityAdapterConfig(Config, frozen=True):
    """No adapter: both maps have the same number of channels."""


class ConvAdapterConfig(Config, frozen=True):
    """One convolution with bias, no norm, no activation."""

    kernel_size: Literal[1, 3] = 1


class LayeredAdapterConfig(Config, frozen=True):
    """Layers of [1x1 convolution, batch norm, ReLU], widths in, ..., in, out.

    Attributes:
        num_layers: 3 is the published adapter of the encoder stages.
        upsample: bilinear, before the first layer, to the teacher's size; "align_corners" is the published
            rule and stretches the map by up to 1.5 cells at its border, "half_pixel" keeps the ground.
        final_relu: keeps the result non-negative, as rectified teacher maps are; off for normalised ones.
    """

    num_layers: Literal[2, 3] = 3
    upsample: Literal["half_pixel", "align_corners"] | None = "half_pixel"
    final_relu: bool = True


AdapterConfig = IdentityAdapterConfig | ConvAdapterConfig | LayeredAdapterConfig


def resample(features: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """(B, C, Y', X') -> (B, C, Y, X) over the same ground: bilinear to finer, means to coarser cells."""
    if tuple(features.shape[-2:]) == tuple(size):
        return features
    if features.shape[-2] > size[0] or features.shape[-1] > size[1]:
        return functional.adaptive_avg_pool2d(features, size)
    return functional.interpolate(features, size, mode="bilinear", align_corners=align_corners)


class LayeredAdapter(nn.Module):
    """[1x1 convolution, batch norm, ReLU] several times, after upsampling to the teacher's size."""

    def __init__(self, in_channels: int, out_channels: int, config: LayeredAdapterConfig) -> None:
        super().__init__()
        self.upsample = config.upsample
        widths = [in_channels] * config.num_layers + [out_channels]
        layers: list[nn.Module] = []
        for i in range(config.num_layers):
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], kernel_size=1),
                nn.BatchNorm2d(widths[i + 1]),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*(layers if config.final_relu else layers[:-1]))

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C_student, Y', X') and the teacher's (Y, X) -> (B, C_teacher, Y, X).

        Without upsampling the map keeps its own Y', X'.
        """
        if self.upsample is not None:
            features = resample(features, size, align_corners=self.upsample == "align_corners")
        return self.layers(features)


class ConvAdapter(nn.Module):
    """One convolution of stride one; the map keeps its size."""

    def __init__(self, in_channels: int, out_channels: int, config: ConvAdapterConfig) -> None:
        super().__init__()
        size = config.kernel_size
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=size, padding=size // 2)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(features)


class IdentityAdapter(nn.Module):
    """Gives the student's map as it is."""

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        return features


def build_adapter(config: AdapterConfig, student_channels: int, teacher_channels: int) -> nn.Module:
    """The module for one tap, called with the student's map and the teacher's (Y, X).

    Raises:
        ConfigError: no adapter is asked for, yet the maps have different numbers of channels.
    """
    if isinstance(config, LayeredAdapterConfig):
        return LayeredAdapter(student_channels, teacher_channels, config)
    if isinstance(config, ConvAdapterConfig):
        return ConvAdapter(student_channels, teacher_channels, config)
    if student_channels != teacher_channels:
        raise ConfigError(
            f"an identity adapter joins a student map of {student_channels} channels to a teacher map of "
            f"{teacher_channels}; choose ConvAdapterConfig"
        )
    return IdentityAdapter()
