"""From the lifted map to the map that enters the head: residual stages, and a neck that joins them.

Source: BEVDet (arXiv:2112.11790), section 3.2; the top-down neck is a feature pyramid's (arXiv:1612.03144),
the one of all stages side by side SECOND's (see second.py).
Letters: B batch, C channels, Y X rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import Config
from ..errors import ConfigError
from .image_encoder import BasicBlock
from .second import SecondFpn, SecondFpnConfig, joined_stride


class BevEncoderConfig(Config, frozen=True):
    """Residual stages, fine to coarse: the first block of a stage has its stride."""

    channels: tuple[int, ...] = (128, 256, 512)
    blocks: tuple[int, ...] = (2, 2, 2)
    strides: tuple[int, ...] = (2, 2, 2)

    def __post_init__(self) -> None:
        _check_stages(self.channels, self.blocks, self.strides)

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Of every map that the encoder gives, against the one before; of the first, against its input."""
        return self.strides


class BevResNetConfig(Config, frozen=True):
    """A ResNet of basic blocks whose first stage is a 7x7 convolution instead of a stem with pooling.

    The map that enters is passed on as the first of the stages. `strides[0]` is that of the 7x7 convolution,
    the blocks behind it keep the size. Source: BEVDepth (arXiv:2206.10092) as Megvii published it.
    """

    channels: tuple[int, ...] = (160, 320, 640)
    blocks: tuple[int, ...] = (2, 2, 2)
    strides: tuple[int, ...] = (2, 2, 2)

    def __post_init__(self) -> None:
        _check_stages(self.channels, self.blocks, self.strides)

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Of every map that the encoder gives, against the one before; of the first, against its input."""
        return (1, *self.strides)


class LssNeckConfig(Config, frozen=True):
    """Joins the first and the last stage at the first's size, then at `extra_upsample` times that size.

    `extra_norm_act` ends the neck in batch norm and ReLU, to match the rectified map of a teacher.
    `align_corners` is how published weights were trained; it shifts what it enlarges, by up to half an input
    cell at the borders.
    """

    out_channels: int = 256
    extra_upsample: int | None = 2
    extra_norm_act: bool = False
    align_corners: bool = True


class TopDownNeckConfig(Config, frozen=True):
    """Brings all stages to one width and adds them up, coarse to fine, at the size of the finest."""

    out_channels: int = 256
    upsample: Literal["bilinear", "nearest"] = "bilinear"


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    A block that opens a stage has a bare 3x3 convolution as shortcut (bias, no norm), whatever the channels
    and the stride, as BEVDet has it.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, opens_stage: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = (
            nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1) if opens_stage else nn.Identity()
        )

    def forward(self, bev: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(bev)), inplace=True)
        return functional.relu(self.bn2(self.conv2(hidden)) + self.downsample(bev), inplace=True)


class BevEncoder(nn.Module):
    """The residual stages."""

    def __init__(self, config: BevEncoderConfig, in_channels: int) -> None:
        super().__init__()
        self.out_channels = config.channels
        layers = []
        for channels, blocks, stride in zip(config.channels, config.blocks, config.strides, strict=True):
            opening = ResidualBlock(in_channels, channels, stride, opens_stage=True)
            others = [ResidualBlock(channels, channels, 1, opens_stage=False) for _ in range(blocks - 1)]
            layers.append(nn.Sequential(opening, *others))
            in_channels = channels
        self.layers = nn.ModuleList(layers)

    def forward(self, bev: Tensor) -> list[Tensor]:
        """(B, C, Y, X) -> one map per stage, fine to coarse."""
        stages = []
        for layer in self.layers:
            bev = layer(bev)
            stages.append(bev)
        return stages


class BevResNet(nn.Module):
    """The 7x7 convolution and the residual stages; their keys but `layers` are those of a public ResNet."""

    def __init__(self, config: BevResNetConfig, in_channels: int) -> None:
        super().__init__()
        self.out_channels = (in_channels, *config.channels)
        channels = config.channels[0]
        self.conv1 = nn.Conv2d(in_channels, channels, 7, stride=config.strides[0], padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        layers = []
        for index, (planes, blocks) in enumerate(zip(config.channels, config.blocks, strict=True)):
            opening = BasicBlock(channels, planes, config.strides[index] if index else 1)
            layers.append(nn.Sequential(opening, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1))))
            channels = planes
        self.layers = nn.ModuleList(layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, bev: Tensor) -> list[Tensor]:
        """(B, C, Y, X) -> that map and one per stage, fine to coarse."""
        stages = [bev]
        bev = functional.relu(self.bn1(self.conv1(bev)), inplace=True)
        for layer in self.layers:
            bev = layer(bev)
            stages.append(bev)
        return stages


AnyBevEncoderConfig = BevEncoderConfig | BevResNetConfig


def build_bev_encoder(config: AnyBevEncoderConfig, in_channels: int) -> BevEncoder | BevResNet:
    """The encoder that a configuration describes."""
    if isinstance(config, BevResNetConfig):
        return BevResNet(config, in_channels)
    return BevEncoder(config, in_channels)


class LssNeck(nn.Module):
    """BEVDet's neck: first and last stage, concatenated (those between are not used)."""

    def __init__(self, config: LssNeckConfig, in_channels: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.out_channels = config.out_channels
        width = config.out_channels * (1 if config.extra_upsample is None else 2)
        self.conv = nn.Sequential(
            *_conv_bn_relu(in_channels[0] + in_channels[-1], width), *_conv_bn_relu(width, width)
        )
        if config.extra_upsample is None:
            self.refine = None
        else:
            self.refine = nn.Sequential(
                *_conv_bn_relu(width, config.out_channels),
                nn.Conv2d(config.out_channels, config.out_channels, 1),
            )
            if config.extra_norm_act:
                self.refine.append(nn.BatchNorm2d(config.out_channels)).append(nn.ReLU(inplace=True))

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Maps of the stages, fine to coarse -> (B, C, Y, X)."""
        fine, coarse = stages[0], stages[-1]
        joined = self.conv(torch.cat([fine, self._enlarge(coarse, fine.shape[2:])], dim=1))
        if self.refine is None or self.config.extra_upsample is None:
            return joined
        rows, columns = joined.shape[2:]
        factor = self.config.extra_upsample
        return self.refine(self._enlarge(joined, (rows * factor, columns * factor)))

    def _enlarge(self, bev: Tensor, size: Sequence[int]) -> Tensor:
        return functional.interpolate(
            bev, tuple(size), mode="bilinear", align_corners=self.config.align_corners
        )


class TopDownNeck(nn.Module):
    """A 1x1 convolution per stage, sums from coarse to fine, one 3x3 convolution at the end.

    Cheaper than `LssNeck` by far and fit for small models; the student and the teacher of the demo share it.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        upsample: Literal["bilinear", "nearest"] = "bilinear",
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.upsample = upsample
        self.laterals = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.smooth = nn.Sequential(*_conv_bn_relu(out_channels, out_channels))

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Maps of the stages, fine to coarse -> (B, C, Y, X) of the finest one's size."""
        levels = [lateral(stage) for lateral, stage in zip(self.laterals, stages, strict=True)]
        total = levels[-1]
        for level in reversed(levels[:-1]):
            total = level + functional.interpolate(total, level.shape[2:], mode=self.upsample)
        return self.smooth(total)


BevNeckConfig = LssNeckConfig | TopDownNeckConfig | SecondFpnConfig


def build_bev_neck(config: BevNeckConfig, in_channels: Sequence[int]) -> LssNeck | TopDownNeck | SecondFpn:
    """The neck that a configuration describes, for stages of these channels."""
    if isinstance(config, LssNeckConfig):
        return LssNeck(config, in_channels)
    if isinstance(config, SecondFpnConfig):
        return SecondFpn(config, in_channels)
    return TopDownNeck(in_channels, config.out_channels, config.upsample)


def neck_reduction(encoder: AnyBevEncoderConfig, neck: BevNeckConfig) -> float:
    """How much longer the cells of the neck's map are than those of the encoder's input.

    Raises:
        ConfigError: the neck does not bring these stages to one size.
    """
    if isinstance(neck, SecondFpnConfig):
        return joined_stride(list(accumulate(encoder.stage_strides, mul)), neck)
    first = encoder.stage_strides[0]
    return first / (neck.extra_upsample or 1) if isinstance(neck, LssNeckConfig) else float(first)


def _check_stages(channels: tuple[int, ...], blocks: tuple[int, ...], strides: tuple[int, ...]) -> None:
    found = f"channels={channels}, blocks={blocks}, strides={strides}"
    if not channels or not len(channels) == len(blocks) == len(strides):
        raise ConfigError(f"{found}; expected one entry per stage in each")
    if min(channels + blocks + strides) < 1:
        raise ConfigError(f"{found}; expected whole numbers of 1 or more")


def _conv_bn_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]
