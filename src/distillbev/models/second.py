"""The plain convolutional trunk of LiDAR detectors, and the neck that brings its stages to one size.

Source: SECOND (Sensors 2018, 18(10), 3337), section 3.1.4, in the form that PointPillars gave it
(arXiv:1812.05784, section 2.2). Letters: B batch, C channels, Y X rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import ConfigError

NORM_EPS = 1e-3


class SecondConfig(Config, frozen=True):
    """Stages of a strided 3x3 convolution followed by `layers` more; the first stride sets the stem's."""

    channels: tuple[int, ...] = (64, 128, 256)
    layers: tuple[int, ...] = (3, 5, 5)
    strides: tuple[int, ...] = (2, 2, 2)

    def __post_init__(self) -> None:
        if not self.channels or not len(self.channels) == len(self.layers) == len(self.strides):
            raise ConfigError(
                f"channels={self.channels}, layers={self.layers}, strides={self.strides}; "
                "expected one entry per stage in each"
            )
        if min(self.channels) < 1 or min(self.layers) < 0 or min(self.strides) < 1:
            raise ConfigError(
                f"channels={self.channels}, layers={self.layers}, strides={self.strides}; "
                "expected positive channels and strides, layers of 0 or more"
            )


class SecondFpnConfig(Config, frozen=True):
    """Brings stage i to `channels[i]` at `upsample[i]` times its size; the results are concatenated.

    Factors are whole numbers, or one over a whole number for a stage finer than the result.
    """

    channels: tuple[int, ...] = (128, 128, 128)
    upsample: tuple[float, ...] = (0.5, 1.0, 2.0)

    def __post_init__(self) -> None:
        if not self.channels or len(self.channels) != len(self.upsample):
            raise ConfigError(
                f"channels={self.channels}, upsample={self.upsample}; expected one entry per stage in both"
            )
        for factor in self.upsample:
            whole = factor if factor >= 1 else 1 / max(factor, 1e-9)
            if abs(whole - round(whole)) > 1e-6:
                raise ConfigError(f"upsample={self.upsample}; {factor} is neither whole nor one over a whole")


def joined_stride(strides: Sequence[float], neck: SecondFpnConfig) -> float:
    """The stride that a neck brings stages of these strides to, all against one input.

    Raises:
        ConfigError: it expects another number of stages, or brings them to several sizes.
    """
    if len(neck.upsample) != len(strides):
        raise ConfigError(
            f"upsample={neck.upsample} for {len(strides)} stages of strides {tuple(strides)}; "
            "give one factor per stage"
        )
    joined = [round(stride / factor, 6) for stride, factor in zip(strides, neck.upsample, strict=True)]
    if len(set(joined)) > 1:
        raise ConfigError(
            f"upsample={neck.upsample} brings stages of strides {tuple(strides)} to strides {tuple(joined)}; "
            "choose factors that bring all to one"
        )
    return joined[0]


class Second(nn.Module):
    """The trunk: a list of maps, fine to coarse."""

    def __init__(self, config: SecondConfig, in_channels: int, norm_momentum: float = 0.01) -> None:
        super().__init__()
        self.out_channels = config.channels
        blocks = []
        for channels, layers, stride in zip(config.channels, config.layers, config.strides, strict=True):
            parts: list[nn.Module] = []
            for layer in range(layers + 1):
                parts += [
                    nn.Conv2d(
                        in_channels, channels, 3, stride=stride if layer == 0 else 1, padding=1, bias=False
                    ),
                    nn.BatchNorm2d(channels, eps=NORM_EPS, momentum=norm_momentum),
                    nn.ReLU(inplace=True),
                ]
                in_channels = channels
            blocks.append(nn.Sequential(*parts))
        self.blocks = nn.ModuleList(blocks)
        _initialise(self)

    def forward(self, bev: Tensor) -> list[Tensor]:
        """(B, C, Y, X) -> one map per stage."""
        stages = []
        for block in self.blocks:
            bev = block(bev)
            stages.append(bev)
        return stages


class SecondFpn(nn.Module):
    """The neck: every stage to one size, side by side along the channels."""

    def __init__(
        self, config: SecondFpnConfig, in_channels: Sequence[int], norm_momentum: float = 0.01
    ) -> None:
        super().__init__()
        if len(in_channels) != len(config.channels):
            raise ConfigError(
                f"neck has {len(config.channels)} levels for {len(in_channels)} stages of the backbone; "
                "give channels and upsample one entry per stage"
            )
        self.out_channels = sum(config.channels)
        self.deblocks = nn.ModuleList(
            nn.Sequential(
                _resize_conv(stage_channels, channels, factor),
                nn.BatchNorm2d(channels, eps=NORM_EPS, momentum=norm_momentum),
                nn.ReLU(inplace=True),
            )
            for stage_channels, channels, factor in zip(
                in_channels, config.channels, config.upsample, strict=True
            )
        )
        _initialise(self)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Maps of the stages -> (B, sum of channels, Y, X)."""
        return torch.cat(
            [deblock(stage) for deblock, stage in zip(self.deblocks, stages, strict=True)], dim=1
        )


def _resize_conv(in_channels: int, out_channels: int, factor: float) -> nn.Module:
    """A convolution whose windows touch without overlap: it changes the size and mixes no neighbours."""
    if factor > 1:
        size = round(factor)
        return nn.ConvTranspose2d(in_channels, out_channels, size, stride=size, bias=False)
    size = round(1 / factor)
    return nn.Conv2d(in_channels, out_channels, size, stride=size, bias=False)


def _initialise(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
