"""From images to one feature map per camera: a backbone, and a neck that brings its last stages together.

Source: ResNet (arXiv:1512.03385), feature pyramid (arXiv:1612.03144), as BEVDet (arXiv:2112.11790) uses them.
Letters: B batch, N cameras, C channels, H W rows and columns.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ..config import Config
from ..errors import CheckpointError, ConfigError, DataError
from .recompute import run_block
from .second import SecondFpn, SecondFpnConfig, joined_stride

# ImageNet's, RGB in 0-255: what every public backbone was trained with.
MEAN_RGB = (123.675, 116.28, 103.53)
STD_RGB = (58.395, 57.12, 57.375)

RESNET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class ResNetConfig(Config, frozen=True):
    """Our ResNet; its keys are those of public checkpoints. `base_width` 64 is the published one.

    `stride_on`: the convolution of a bottleneck that halves the map; the first in weights of the "caffe" style.
    `checkpoint_blocks` computes each block again on the way back instead of keeping it in memory.
    """

    depth: Literal[18, 34, 50, 101] = 50
    base_width: int = 64
    stride_on: Literal["3x3", "1x1"] = "3x3"
    checkpoint_blocks: bool = False

    def __post_init__(self) -> None:
        if self.base_width < 1:
            raise ConfigError(f"base_width={self.base_width}; choose 1 or more channels (64 is published)")
        if self.stride_on == "1x1" and self.depth < 50:
            raise ConfigError(
                f"stride_on='1x1' with depth={self.depth}; only 50 and 101 have such convolutions"
            )


class PlainCnnConfig(Config, frozen=True):
    """Stages of 3x3 convolutions, batch norm and ReLU, each halving the image: for small CPU students.

    The first stage works on most pixels; a second convolution there costs a twelfth of a tiny student's step.
    """

    widths: tuple[int, ...] = (16, 32, 64, 128)
    convs: tuple[int, ...] = (1, 2, 2, 2)

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.convs) or min(self.widths + self.convs) < 1:
            raise ConfigError(
                f"widths={self.widths}, convs={self.convs}; expected one entry of 1 or more per stage in each"
            )


class TimmConfig(Config, frozen=True):
    """A backbone of the timm library by its name there.

    `pretrained` lets timm fetch its weights, `checkpoint_blocks` trades time for memory as timm does it.
    `image_size_px` (width, height) is for models that are built for one size, as Swin.
    """

    name: str = "convnext_tiny"
    pretrained: bool = False
    checkpoint_blocks: bool = False
    image_size_px: tuple[int, int] | None = None


class ImageEncoderConfig(Config, frozen=True):
    """Backbone and neck.

    `output_stride` is how many image pixels a feature cell spans; the neck joins that stage and all coarser
    ones. With `neck` the last stages stand side by side at that stride instead, as Megvii's BEVDepth has them.
    `weights` is a file with the backbone's weights, trained on normalised RGB as torchvision's are, read by
    `ImageEncoder.load_backbone_weights`.
    """

    backbone: ResNetConfig | PlainCnnConfig | TimmConfig = ResNetConfig()
    out_channels: int = 512
    output_stride: int = 16
    neck: SecondFpnConfig | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.neck is not None and sum(self.neck.channels) != self.out_channels:
            raise ConfigError(
                f"neck.channels={self.neck.channels} stand side by side, which makes {sum(self.neck.channels)}; "
                f"found out_channels={self.out_channels}, set it so"
            )


class ResNet(nn.Module):
    """The four stages, at strides 4, 8, 16 and 32."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        block = Bottleneck if config.depth >= 50 else BasicBlock
        width = config.base_width
        self.checkpoint_blocks = config.checkpoint_blocks
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.strides = (4, 8, 16, 32)
        self.out_channels = tuple(width * 2**stage * block.expansion for stage in range(4))
        layers = []
        in_channels = width
        for stage, blocks in enumerate(RESNET_BLOCKS[config.depth]):
            planes = width * 2**stage
            layer = nn.Sequential()
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                layer.append(block(in_channels, planes, stride, config.stride_on))
                in_channels = planes * block.expansion
            layers.append(layer)
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised -> one map per stage, fine to coarse; odd sizes round up."""
        features = self.maxpool(functional.relu(self.bn1(self.conv1(images)), inplace=True))
        stages = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                features = run_block(block, features, self.checkpoint_blocks)
            stages.append(features)
        return stages


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int, stride_on: str = "3x3") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _shortcut(in_channels, planes, stride)

    def forward(self, features: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(features)), inplace=True)
        return functional.relu(self.bn2(self.conv2(hidden)) + self.downsample(features), inplace=True)


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up to four times the width, and a shortcut (ResNet-50 and -101)."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int, stride_on: str = "3x3") -> None:
        super().__init__()
        out_channels = planes * self.expansion
        first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, planes, 1, stride=first, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=second, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, features: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(features)), inplace=True)
        hidden = functional.relu(self.bn2(self.conv2(hidden)), inplace=True)
        return functional.relu(self.bn3(self.conv3(hidden)) + self.downsample(features), inplace=True)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class PlainCnn(nn.Module):
    """Stage i is at stride 2^(i + 1)."""

    def __init__(self, config: PlainCnnConfig) -> None:
        super().__init__()
        self.out_channels = config.widths
        self.strides = tuple(2 ** (stage + 1) for stage in range(len(config.widths)))
        stages = []
        in_channels = 3
        for width, convs in zip(config.widths, config.convs, strict=True):
            parts: list[nn.Module] = []
            for index in range(convs):
                stride = 2 if index == 0 else 1
                parts += [
                    nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                in_channels = width
            stages.append(nn.Sequential(*parts))
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised -> one map per stage, fine to coarse."""
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps


class TimmBackbone(nn.Module):
    """A backbone of timm, its stages as (B, C, H, W) whatever the library's own layout."""

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        timm = _import_timm()
        if not timm.is_model(config.name):
            nearest = difflib.get_close_matches(config.name, timm.list_models(), n=3, cutoff=0.4)
            raise ConfigError(
                f"timm has no model {config.name!r}; "
                + (f"did you mean {' or '.join(nearest)}?" if nearest else "see timm.list_models()")
            )
        try:
            size = {} if config.image_size_px is None else {"img_size": config.image_size_px[::-1]}
            self.model = timm.create_model(
                config.name, pretrained=config.pretrained, features_only=True, **size
            )
            if config.checkpoint_blocks:
                self.model.set_grad_checkpointing(True)
        except (RuntimeError, AttributeError, OSError, TypeError, ValueError) as error:
            raise ConfigError(f"timm cannot build {config.name!r} as a backbone: {error}") from None
        self.out_channels = tuple(self.model.feature_info.channels())
        self.strides = tuple(self.model.feature_info.reduction())

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised -> one map per stage, fine to coarse."""
        stages = self.model(images)
        # Swin and its kin put the channels last.
        return [
            stage if stage.shape[1] == channels else stage.permute(0, 3, 1, 2)
            for stage, channels in zip(stages, self.out_channels, strict=True)
        ]


def _import_timm() -> Any:
    try:
        return importlib.import_module("timm")
    except Exception as error:  # torchvision built for another torch raises RuntimeError, not ImportError
        raise ConfigError(
            f"backbones of timm need timm and a torchvision that fits torch {torch.__version__}; importing "
            f"timm says: {error}; install the extra `timm` with both from one index, or take a ResNetConfig"
        ) from None


class FpnNeck(nn.Module):
    """A feature pyramid that gives its finest level only: 1x1 laterals, nearest upsampling, one 3x3."""

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.smooth = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Maps of the stages, fine to coarse -> (B, C, H, W) of the finest one's size."""
        levels = [lateral(stage) for lateral, stage in zip(self.laterals, stages, strict=True)]
        total = levels[-1]
        for level in reversed(levels[:-1]):
            total = level + functional.interpolate(total, level.shape[2:], mode="nearest")
        return self.smooth(total)


class ImageEncoder(nn.Module):
    """Backbone and neck on all cameras at once; batch norm sees all cameras of the batch."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.out_channels = config.out_channels
        self.stride = config.output_stride
        if isinstance(config.backbone, ResNetConfig):
            self.backbone = ResNet(config.backbone)
        elif isinstance(config.backbone, PlainCnnConfig):
            self.backbone = PlainCnn(config.backbone)
        else:
            self.backbone = TimmBackbone(config.backbone)
        strides = list(self.backbone.strides)
        if config.output_stride not in strides:
            raise ConfigError(
                f"output_stride={config.output_stride} is no stride of the backbone; choose one of {strides}"
            )
        if config.neck is None:
            self.first_level = strides.index(config.output_stride)
            self.neck = FpnNeck(self.backbone.out_channels[self.first_level :], config.out_channels)
        else:
            self.first_level = max(len(strides) - len(config.neck.channels), 0)
            joined = joined_stride(strides[self.first_level :], config.neck)
            if joined != config.output_stride:
                raise ConfigError(
                    f"neck.upsample={config.neck.upsample} brings the stages to stride {joined:g}; "
                    f"found output_stride={config.output_stride}, set it so"
                )
            self.neck = SecondFpn(config.neck, self.backbone.out_channels[self.first_level :])

    def forward(self, images: Tensor) -> Tensor:
        """(B, N, 3, H, W), uint8 RGB or normalised floats -> (B, N, C, H / stride, W / stride).

        Raises:
            DataError: a `SecondFpn` cannot bring images of this size to one map.
        """
        coarsest = self.backbone.strides[-1]
        if isinstance(self.neck, SecondFpn) and any(size % coarsest for size in images.shape[-2:]):
            raise DataError(
                f"images of {images.shape[-1]}x{images.shape[-2]} pixels; this neck expects multiples of "
                f"{coarsest}, so set data.image_size_px"
            )
        pixels = normalise_images(images.flatten(0, 1))  # (B*N, 3, H, W)
        stages = self.backbone(pixels)
        return self.neck(stages[self.first_level :]).unflatten(0, images.shape[:2])

    def load_backbone_weights(self) -> str | None:
        """Loads `config.weights` into the backbone; says what was loaded and left, None without a file."""
        if self.config.weights is None:
            return None
        return load_backbone_weights(self.backbone, Path(self.config.weights))


def normalise_images(images: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 RGB -> float32 with ImageNet's mean and spread taken out.

    Floats are passed on as they are: somebody normalised them before. Done on the device, so that what
    travels there is a quarter of the size.
    """
    if images.dtype != torch.uint8:
        return images
    if images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)  # as the weights are, see BevDet
    mean = torch.tensor(MEAN_RGB, device=images.device).view(3, 1, 1)
    scale = 1 / torch.tensor(STD_RGB, device=images.device).view(3, 1, 1)
    return torch.addcmul(-mean * scale, images.float(), scale)


def load_backbone_weights(backbone: nn.Module, path: Path) -> str:
    """Loads a backbone strictly, from a public checkpoint or from the weights of a student of ours.

    Of a public checkpoint the classifier (`fc.*`) is the one thing left out; of a student, all but its backbone.

    Args:
        backbone: the module; every key of it must be in the file, with its shape.
        path: `.safetensors`, or what torch.save wrote (read with weights_only, so that nothing runs).

    Returns:
        What was loaded and what was left out, in one line.

    Raises:
        CheckpointError: the file is absent, damaged or of another architecture.
    """
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
            found = found.get("state_dict", found)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected weights of the image backbone") from None
    except (SafetensorError, UnpicklingError, RuntimeError, OSError, AttributeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: not readable as plain weights ({reason}); give a state dict"
        ) from None
    student_prefix = "image_encoder.backbone."
    if any(key.startswith(student_prefix) for key in found):
        found = {
            key.removeprefix(student_prefix): tensor
            for key, tensor in found.items()
            if key.startswith(student_prefix)
        }
    expected = backbone.state_dict()
    missing = sorted(expected.keys() - found.keys())
    left = sorted(found.keys() - expected.keys())
    surplus = [key for key in left if not key.startswith("fc.")]
    reshaped = [key for key in expected if key in found and expected[key].shape != found[key].shape]
    wrong = [*missing, *surplus, *reshaped]
    if wrong:
        raise CheckpointError(
            f"{path}: not the weights of this {type(backbone).__name__}: {len(missing)} keys missing, "
            f"{len(surplus)} unknown, {len(reshaped)} of another shape (first: {wrong[0]}); "
            "set depth and base_width to those of the file"
        )
    backbone.load_state_dict({key: found[key] for key in expected})
    return f"{path}: {len(expected)} tensors loaded" + (f", left out {', '.join(left)}" if left else "")
