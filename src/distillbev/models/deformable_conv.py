"""Convolution whose taps are moved, and weighed, by what they see.

Sources: deformable convolution (arXiv:1703.06211), modulated (arXiv:1811.11168).
Letters: B batch, C channels, K taps of the kernel, H W rows and columns, H' W' of the result.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class DeformableConv2d(nn.Module):
    """A square, odd kernel, padded by half of it. Keys are those of public checkpoints.

    `conv_offset` gives, per tap, the move (dy, dx) in cells and, when modulated, the logit of a weight; it
    starts at zero, so that the layer starts as a plain convolution (of half the strength when modulated).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        modulated: bool = True,
    ) -> None:
        super().__init__()
        assert kernel % 2 == 1, kernel
        self.kernel, self.stride, self.groups, self.modulated = kernel, stride, groups, modulated
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        per_tap = 3 if modulated else 2
        self.conv_offset = nn.Conv2d(in_channels, per_tap * kernel**2, kernel, stride, kernel // 2)
        bound = 1 / math.sqrt(in_channels // groups * kernel**2)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.conv_offset.weight)
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C_out, H', W')."""
        taps = self.kernel**2
        moves = self.conv_offset(features).float()
        offsets = moves[:, : 2 * taps].unflatten(1, (taps, 2))  # (B, K, 2, H', W')
        strengths = moves[:, 2 * taps :].sigmoid() if self.modulated else None
        return deform_convolve(features, offsets, strengths, self.weight, self.bias, self.stride, self.groups)


def deform_convolve(
    features: Tensor,
    offsets: Tensor,
    strengths: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    groups: int = 1,
) -> Tensor:
    """Samples every tap bilinearly where it was moved to, zero outside, then sums as a convolution does.

    Args:
        features: (B, C, H, W).
        offsets: (B, K, 2, H', W'), dy and dx of each tap, taps row by row.
        strengths: (B, K, H', W') factors of the taps, or None for one.
        weight: (C_out, C / groups, k, k) with k * k = K.

    Returns:
        (B, C_out, H', W').
    """
    H, W = features.shape[2:]
    K, (rows, columns) = offsets.shape[1], offsets.shape[3:]
    k = weight.shape[-1]
    steps = torch.arange(k, device=features.device) - k // 2
    tap_y, tap_x = steps.repeat_interleave(k), steps.repeat(k)
    y = torch.arange(rows, device=features.device)[:, None] * stride + tap_y[:, None, None] + offsets[:, :, 0]
    x = torch.arange(columns, device=features.device) * stride + tap_x[:, None, None] + offsets[:, :, 1]
    grid = torch.stack([(2 * x + 1) / W - 1, (2 * y + 1) / H - 1], dim=-1)  # (B, K, H', W', 2)
    # fp32: bf16 cannot tell neighbouring pixels of a wide image apart.
    samples = functional.grid_sample(features.float(), grid.flatten(1, 2), align_corners=False)
    samples = samples.unflatten(2, (K, rows))  # (B, C, K, H', W')
    if strengths is not None:
        samples = samples * strengths[:, None]
    columns_of = samples.flatten(3).unflatten(1, (groups, -1)).flatten(2, 3)  # (B, groups, C/groups*K, H'*W')
    kernels = weight.flatten(1).unflatten(0, (groups, -1)).to(columns_of.dtype)
    result = torch.einsum("goc,bgcp->bgop", kernels, columns_of).flatten(1, 2).unflatten(2, (rows, columns))
    return (result if bias is None else result + bias[:, None, None]).to(weight.dtype)


def deform_convolve_by_loop(
    features: Tensor,
    offsets: Tensor,
    strengths: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    groups: int = 1,
) -> Tensor:
    """The slow twin of `deform_convolve`: one tap of one pixel at a time."""
    B, C, H, W = features.shape
    k, (rows, columns) = weight.shape[-1], offsets.shape[3:]
    result = []
    for b in range(B):
        for row in range(rows):
            for column in range(columns):
                taps = []
                for tap in range(k * k):
                    y = row * stride + tap // k - k // 2 + offsets[b, tap, 0, row, column]
                    x = column * stride + tap % k - k // 2 + offsets[b, tap, 1, row, column]
                    top, left = math.floor(y.item()), math.floor(x.item())
                    value = features.new_zeros(C)
                    for i in (top, top + 1):
                        for j in (left, left + 1):
                            if 0 <= i < H and 0 <= j < W:
                                value = (
                                    value + (1 - (y - i).abs()) * (1 - (x - j).abs()) * features[b, :, i, j]
                                )
                    taps.append(value if strengths is None else value * strengths[b, tap, row, column])
                seen = torch.stack(taps, dim=-1).unflatten(0, (groups, -1)).flatten(1)  # (groups, C/groups*K)
                kernels = weight.flatten(1).unflatten(0, (groups, -1))
                pixel = torch.einsum("goc,gc->go", kernels, seen).flatten()
                result.append(pixel if bias is None else pixel + bias)
    return torch.stack(result).view(B, rows, columns, -1).permute(0, 3, 1, 2)
