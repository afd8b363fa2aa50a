"""From images to several feature maps per camera, as BEVFormer looks at them.

Source: BEVFormer (arXiv:2203.17270). Letters: B batch, N cameras, C channels, H W rows and columns.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import Config
from ..errors import ConfigError
from .deformable_conv import DeformableConv2d
from .feature_pyramid import FeaturePyramid
from .image_encoder import (
    Bottleneck,
    PlainCnn,
    PlainCnnConfig,
    ResNet,
    ResNetConfig,
    TimmBackbone,
    TimmConfig,
    load_backbone_weights,
    normalise_images,
)


class ImagePyramidConfig(Config, frozen=True):
    """Backbone and feature pyramid.

    `strides` are the levels to give, in image pixels per cell: stages of the backbone, then further halvings.
    `deformable_stages` (0 to 3) of a ResNet-50 or -101 get modulated deformable 3x3 convolutions.
    """

    backbone: ResNetConfig | PlainCnnConfig | TimmConfig = ResNetConfig()
    strides: tuple[int, ...] = (8, 16, 32, 64)
    deformable_stages: tuple[int, ...] = ()
    weights: str | None = None

    def __post_init__(self) -> None:
        if not self.strides or any(b != 2 * a for a, b in zip(self.strides, self.strides[1:], strict=False)):
            raise ConfigError(f"strides={self.strides}; expected at least one, each twice the one before")
        if self.deformable_stages:
            bottlenecks = isinstance(self.backbone, ResNetConfig) and self.backbone.depth >= 50
            if not bottlenecks or not set(self.deformable_stages) <= {0, 1, 2, 3}:
                raise ConfigError(
                    f"deformable_stages={self.deformable_stages} with {self.backbone}; expected stages 0 to 3 of "
                    "a ResNet of depth 50 or 101"
                )


class ImagePyramid(nn.Module):
    """Backbone and neck on all cameras at once."""

    def __init__(self, config: ImagePyramidConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        if isinstance(config.backbone, ResNetConfig):
            self.backbone = ResNet(config.backbone)
            for stage in config.deformable_stages:
                make_deformable(getattr(self.backbone, f"layer{stage + 1}"))
        elif isinstance(config.backbone, PlainCnnConfig):
            self.backbone = PlainCnn(config.backbone)
        else:
            self.backbone = TimmBackbone(config.backbone)
        strides = list(self.backbone.strides)
        self.multiple_px = strides[-1]  # images are brought to a multiple of this
        if config.strides[0] not in strides:
            raise ConfigError(
                f"strides={config.strides}; the backbone's stages are at {strides}, start with one"
            )
        self.stages = [strides.index(stride) for stride in config.strides if stride in strides]
        stage_channels = [self.backbone.out_channels[stage] for stage in self.stages]
        self.neck = FeaturePyramid(stage_channels, channels, levels=len(config.strides))
        # Convolutions are faster so; keys, shapes and values stay.
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]: its stub lacks it

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that the levels show of images of this size: whole cells of the coarsest stage."""
        rows, columns = (-(-size // self.multiple_px) for size in (height, width))
        return rows * self.multiple_px, columns * self.multiple_px

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, N, 3, H, W), uint8 RGB or normalised floats -> levels (B, N, C, H', W'), fine to coarse.

        Levels show `padded_size` pixels: zeros, the mean colour, are put below and to the right, as published.
        """
        pixels = normalise_images(images.flatten(0, 1))
        height, width = pixels.shape[-2:]
        rows, columns = self.padded_size(height, width)
        pixels = functional.pad(pixels, (0, columns - width, 0, rows - height))
        stages = self.backbone(pixels)
        levels = self.neck([stages[stage] for stage in self.stages])
        return [level.unflatten(0, images.shape[:2]) for level in levels]

    def load_backbone_weights(self) -> str | None:
        """Loads `config.weights` into the backbone; says what was loaded, None without a file.

        The file is that of a plain backbone: what moves deformable taps starts at zero.
        """
        if self.config.weights is None:
            return None
        path = Path(self.config.weights)
        if not (self.config.deformable_stages and isinstance(self.config.backbone, ResNetConfig)):
            return load_backbone_weights(self.backbone, path)
        plain = ResNet(self.config.backbone)
        report = load_backbone_weights(plain, path)
        self.backbone.load_state_dict(plain.state_dict(), strict=False)
        return report


def make_deformable(stage: nn.Sequential) -> None:
    """Puts deformable convolutions in place of the 3x3 ones of a stage of bottlenecks."""
    for block in stage:
        assert isinstance(block, Bottleneck), block
        plain = block.conv2
        block.add_module(
            "conv2", DeformableConv2d(plain.in_channels, plain.out_channels, stride=plain.stride[0])
        )
