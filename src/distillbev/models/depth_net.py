"""Depth nets that know the cameras they look through: how far each pixel may be, and what is seen there.

Source: BEVDepth (arXiv:2206.10092), section 3.2: Megvii's own net, and the one of BEVDet's re-implementation, which
the students of DistillBEV use ("release" below).
Letters: B batch, N cameras, P = B*N images, C channels, K numbers per camera, D depth bins, H W rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import Config
from ..data.schema import Batch
from ..errors import ConfigError
from .bev_encoder import ResidualBlock
from .deformable_conv import DeformableConv2d


class ReleaseDepthNetConfig(Config, frozen=True):
    """The released student's net: only the depth knows the camera."""

    mid_channels: int = 256

    def __post_init__(self) -> None:
        _check_width(self.mid_channels, divisor=1)


class MegviiDepthNetConfig(Config, frozen=True):
    """Megvii's net: depth and context know the camera, and the depth sees the image at several scales.

    `modulated` with one group is the form of later re-implementations.
    """

    mid_channels: int = 512
    dropout: float = 0.5  # of whole branches' mixture, in training
    deform_groups: int = 4
    modulated: bool = False

    def __post_init__(self) -> None:
        _check_width(self.mid_channels, divisor=self.deform_groups)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout}; expected a probability from 0 to below 1")


DepthNetConfig = ReleaseDepthNetConfig | MegviiDepthNetConfig


def build_depth_net(
    config: DepthNetConfig, in_channels: int, context_channels: int, num_depth_bins: int
) -> ReleaseDepthNet | MegviiDepthNet:
    """The depth net that a configuration describes."""
    if isinstance(config, ReleaseDepthNetConfig):
        return ReleaseDepthNet(config, in_channels, context_channels, num_depth_bins)
    return MegviiDepthNet(config, in_channels, context_channels, num_depth_bins)


class ReleaseDepthNet(nn.Module):
    """Context straight from the features; depth from features whose channels the camera has weighed."""

    NUM_CAMERA_NUMBERS = 33

    def __init__(
        self, config: ReleaseDepthNetConfig, in_channels: int, context_channels: int, num_depth_bins: int
    ) -> None:
        super().__init__()
        mid = config.mid_channels
        self.context_conv = nn.Conv2d(in_channels, context_channels, 1)
        self.reduce_conv = nn.Conv2d(in_channels, mid, 1)
        self.camera_norm = nn.BatchNorm1d(self.NUM_CAMERA_NUMBERS)
        self.camera_gate = nn.Linear(self.NUM_CAMERA_NUMBERS, mid)
        self.blocks = nn.Sequential(*(ResidualBlock(mid, mid, 1, opens_stage=i == 0) for i in range(3)))
        self.deform = DeformableConv2d(mid, mid, bias=True)
        self.deform_norm = nn.BatchNorm2d(mid)  # no ReLU follows
        self.depth_conv = nn.Conv2d(mid, num_depth_bins, 1)

    def forward(self, features: Tensor, camera: Tensor) -> tuple[Tensor, Tensor]:
        """(P, C_in, H, W) features and (P, K) numbers -> depth logits (P, D, H, W), context (P, C, H, W)."""
        gate = self.camera_gate(self.camera_norm(camera)).sigmoid()[..., None, None]
        depth = self.deform_norm(self.deform(self.blocks(self.reduce_conv(features) * gate)))
        return self.depth_conv(depth), self.context_conv(features)

    @staticmethod
    def camera_numbers(batch: Batch) -> Tensor:
        """(B, N, 33): intrinsics (9), image augmentation (9 and 3), camera -> augmented LiDAR frame (9 and 3).

        Matrices lie row by row. The image augmentation stands as it acts on (u, v, d).
        """
        linear = batch.image_aug[..., :3, :3].clone()
        linear[..., :2, 2] = 0
        offset = functional.pad(batch.image_aug[..., :2, 2], (0, 1))
        rotation, place = batch.cam2lidar[..., :3, :3], batch.cam2lidar[..., :3, 3]
        parts = [
            source_intrinsics(batch).flatten(-2),
            linear.flatten(-2),
            offset,
            rotation.flatten(-2),
            place,
        ]
        return torch.cat(parts, dim=-1)


class MegviiDepthNet(nn.Module):
    """Keys are those of Megvii's `depth_net`; the last layer of the deformable convolution has no norm."""

    NUM_CAMERA_NUMBERS = 27

    def __init__(
        self,
        config: MegviiDepthNetConfig,
        in_channels: int,
        context_channels: int,
        num_depth_bins: int,
        num_camera_numbers: int = NUM_CAMERA_NUMBERS,
    ) -> None:
        super().__init__()
        mid = config.mid_channels
        self.reduce_conv = nn.Sequential(
            nn.Conv2d(in_channels, mid, 3, padding=1), nn.BatchNorm2d(mid), nn.ReLU(inplace=True)
        )
        self.bn = nn.BatchNorm1d(num_camera_numbers)
        self.context_mlp = CameraMlp(num_camera_numbers, mid)
        self.context_se = ChannelGate(mid)
        self.context_conv = nn.Conv2d(mid, context_channels, 1)
        self.depth_mlp = CameraMlp(num_camera_numbers, mid)
        self.depth_se = ChannelGate(mid)
        self.depth_conv = nn.Sequential(
            *(ResidualBlock(mid, mid, 1, opens_stage=False) for _ in range(3)),
            Aspp(mid, config.dropout),
            DeformableConv2d(mid, mid, groups=config.deform_groups, modulated=config.modulated),
            nn.Conv2d(mid, num_depth_bins, 1),
        )

    def forward(self, features: Tensor, camera: Tensor) -> tuple[Tensor, Tensor]:
        """(P, C_in, H, W) features and (P, K) numbers -> depth logits (P, D, H, W), context (P, C, H, W)."""
        numbers = self.bn(camera)
        reduced = self.reduce_conv(features)
        context = self.context_conv(self.context_se(reduced, self.context_mlp(numbers)))
        depth = self.depth_conv(self.depth_se(reduced, self.depth_mlp(numbers)))
        return depth, context

    @staticmethod
    def camera_numbers(batch: Batch) -> Tensor:
        """(B, N, 27): focal lengths and centre (4), image (6) and BEV augmentation (5), camera -> BEV frame (12).

        The last is free of BEV augmentation, three rows of a 3x4 matrix; the frame is the one that the map lies
        in, as published the ego frame (`BevDetConfig.frame`).
        """
        intrinsics, image_aug, bev_aug = source_intrinsics(batch), batch.image_aug, batch.bev_aug[:, None]
        with torch.autocast(image_aug.device.type, enabled=False):
            physical = torch.linalg.inv(bev_aug) @ batch.cam2lidar
        bev_aug = bev_aug.expand_as(physical)
        entries = [intrinsics[..., i, j] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2))]
        entries += [image_aug[..., i, j] for i in (0, 1) for j in (0, 1, 2)]
        entries += [bev_aug[..., i, j] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 2))]
        return torch.cat([torch.stack(entries, dim=-1), physical[..., :3, :].flatten(-2)], dim=-1)


class CameraMlp(nn.Module):
    """(P, K) -> (P, C), two layers."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels, channels)
        self.fc2 = nn.Linear(channels, channels)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.fc2(functional.relu(self.fc1(numbers)))


class ChannelGate(nn.Module):
    """Weighs the channels of a map by what (P, C) numbers say, squeeze and excitation without the squeeze."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, channels, 1)
        self.conv_expand = nn.Conv2d(channels, channels, 1)

    def forward(self, features: Tensor, numbers: Tensor) -> Tensor:
        gate = self.conv_expand(functional.relu(self.conv_reduce(numbers[..., None, None])))
        return features * gate.sigmoid()


class Aspp(nn.Module):
    """Atrous spatial pyramid: the same map seen through four dilations and as a whole.

    Source: DeepLab v3 (arXiv:1706.05587), section 3.3.
    """

    DILATIONS = (6, 12, 18)

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.aspp1 = AtrousBranch(channels, None)
        self.aspp2, self.aspp3, self.aspp4 = (AtrousBranch(channels, d) for d in self.DILATIONS)
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.conv1 = nn.Conv2d(5 * channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        branches = [branch(features) for branch in (self.aspp1, self.aspp2, self.aspp3, self.aspp4)]
        whole = self.global_avg_pool(features).expand_as(branches[0])
        return self.dropout(functional.relu(self.bn1(self.conv1(torch.cat([*branches, whole], dim=1)))))


class AtrousBranch(nn.Module):
    """A 1x1 convolution, or a dilated 3x3 one, with norm and ReLU."""

    def __init__(self, channels: int, dilation: int | None) -> None:
        super().__init__()
        kernel, padding = (1, 0) if dilation is None else (3, dilation)
        self.atrous_conv = nn.Conv2d(
            channels, channels, kernel, padding=padding, dilation=dilation or 1, bias=False
        )
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, features: Tensor) -> Tensor:
        return functional.relu(self.bn(self.atrous_conv(features)))


class DepthAggregation(nn.Module):
    """Lets neighbours along a row of pixels and along depth share what they see, before the splat.

    Source: BEVDepth, section 3.3 (depth refinement).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce_conv = nn.Sequential(*_conv_bn_relu(channels))
        self.conv = nn.Sequential(*_conv_bn_relu(channels), *_conv_bn_relu(channels))
        self.out_conv = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, volume: Tensor) -> Tensor:
        """(P, C, D, H, W) features along the rays -> the same; each image row is a picture of W by D."""
        slices = volume.permute(0, 3, 1, 4, 2).flatten(0, 1)  # (P*H, C, W, D)
        slices = self.reduce_conv(slices)
        slices = self.out_conv(self.conv(slices) + slices)
        return slices.unflatten(0, (volume.shape[0], volume.shape[3])).permute(0, 2, 4, 1, 3).contiguous()


def source_intrinsics(batch: Batch) -> Tensor:
    """(B, N, 3, 3) intrinsics on the source image, without the augmentation that `cam2img` includes."""
    with torch.autocast(batch.cam2img.device.type, enabled=False):
        return torch.linalg.inv(batch.image_aug[..., :3, :3]) @ batch.cam2img[..., :3, :3]


def _conv_bn_relu(channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    ]


def _check_width(mid_channels: int, divisor: int) -> None:
    if divisor < 1 or mid_channels < 1 or mid_channels % divisor:
        raise ConfigError(
            f"mid_channels={mid_channels} do not divide among deform_groups={divisor}; "
            "choose a positive multiple of a positive number of groups"
        )
