"""A feature pyramid that gives all its levels, for networks that look at several at once.

Source: feature pyramid networks (arXiv:1612.03144), section 3; further levels as RetinaNet
(arXiv:1708.02002).
Letters: B batch, C channels, H W rows and columns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from ..errors import ConfigError


class FeaturePyramid(nn.Module):
    """Brings stages to one width and lets the coarse ones flow into the fine ones.

    Args:
        in_channels: of the stages, fine to coarse.
        out_channels: of every level.
        levels: how many to give; those beyond the stages each halve the one before.
        normed: batch norm and ReLU after every convolution, and further levels by leaving out every second
        row
            and column, as the LiDAR teacher has it. Otherwise convolutions have a bias and nothing after
            them, and further levels are strided convolutions of the rectified level before.
        norm_eps, norm_momentum: of the batch norms.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        levels: int,
        normed: bool = False,
        norm_eps: float = 1e-3,
        norm_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        if levels < len(in_channels):
            raise ConfigError(
                f"a pyramid of {levels} levels on {len(in_channels)} stages; give as many levels or more"
            )
        self.levels, self.normed = levels, normed

        def layer(channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
            conv = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, bias=not normed)
            nn.init.xavier_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            if not normed:
                return nn.Sequential(OrderedDict(conv=conv))
            norm = nn.BatchNorm2d(out_channels, eps=norm_eps, momentum=norm_momentum)
            return nn.Sequential(OrderedDict(conv=conv, bn=norm, relu=nn.ReLU()))

        self.lateral_convs = nn.ModuleList(layer(channels, kernel=1) for channels in in_channels)
        further = 0 if normed else levels - len(in_channels)
        self.fpn_convs = nn.ModuleList(
            [layer(out_channels, kernel=3) for _ in in_channels]
            + [layer(out_channels, kernel=3, stride=2) for _ in range(further)]
        )

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Stages (B, C_i, H_i, W_i), fine to coarse -> levels (B, C, H, W), fine to coarse."""
        merged = [lateral(stage) for lateral, stage in zip(self.lateral_convs, stages, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            size = merged[i - 1].shape[2:]
            merged[i - 1] = merged[i - 1] + functional.interpolate(merged[i], size, mode="nearest")
        levels = [conv(level) for conv, level in zip(self.fpn_convs, merged, strict=False)]
        for i in range(len(levels), self.levels):
            levels.append(levels[-1][:, :, ::2, ::2] if self.normed else self.fpn_convs[i](levels[-1].relu()))
        return levels
