"""The imitation loss, one function per term. Each gives one number per sample, (B,); all in fp32.

Symbols as in the paper: Z teacher map, S adapted student map, E = (S - Z)^2 (B, C, Y, X); A spatial attention
and Ac channel attention, mean one; s scale of a region. Source: DistillBEV (ICCV 2023), section 3.
With the reduction "sum" channels and cells are summed, as published, which ties the weights to the number of
channels; "mean" averages over channels (and, in the attention term, over cells).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import Config
from ..models.processes import average_over_processes
from .masks import Regions

Reduction = Literal["sum", "mean"]


def _weigh(error: Tensor, weight: Tensor, reduction: Reduction) -> Tensor:
    per_cell = (error * weight).sum(dim=(1, 2, 3))
    return per_cell if reduction == "sum" else per_cell / error.shape[1]


def foreground_term(error: Tensor, regions: Regions, attention: Tensor, reduction: Reduction) -> Tensor:
    """L_fg = sum over c, i, j of  E F s_fg A."""
    return _weigh(error, regions.foreground * regions.foreground_scale * attention, reduction)


def background_term(error: Tensor, regions: Regions, attention: Tensor, reduction: Reduction) -> Tensor:
    """L_bg = sum over c, i, j of  E Bk s_bg A,  s_bg = 1 / |Bk|."""
    return _weigh(error, regions.background * regions.background_scale * attention, reduction)


def false_positive_term(
    error: Tensor, regions: Regions, attention: Tensor, channels: Tensor | None, reduction: Reduction
) -> Tensor:
    """L_fp = sum over c, i, j of  E N A Ac / |N|;  zero where N is empty; `channels` is Ac."""
    weight = regions.false_positive * regions.false_positive_scale * attention
    return _weigh(error, weight if channels is None else weight * channels, reduction)


def attention_term(
    teacher: Tensor, student: Tensor, smooth: Callable[[Tensor], Tensor], signed: bool, reduction: Reduction
) -> Tensor:
    """L_sp = sum over i, j of | mean_c Z - k(mean_c S) |, k a learned 3x3 convolution of one channel.

    `signed` takes the means of the maps as published; otherwise of their magnitudes.
    """
    means = [(maps if signed else maps.abs()).mean(dim=1, keepdim=True) for maps in (teacher, student)]
    distance = (means[0] - smooth(means[1])).abs()
    return distance.sum(dim=(1, 2, 3)) if reduction == "sum" else distance.mean(dim=(1, 2, 3))


def affinity_term(teacher: Tensor, student: Tensor, cells: Tensor, reduction: Reduction) -> Tensor:
    """L_aff = mean over pairs p, q of selected cells of  SmoothL1(<S_p, S_q>, <Z_p, Z_q>).

    An inner product sums over channels, or with the reduction "mean" is their mean. `cells`: (B, 1, Y, X) bool,
    the cells of a sample that are compared with each other; without cells the term is zero.
    """
    terms = []
    for theirs, ours, chosen in zip(teacher, student, cells[:, 0], strict=True):
        z, s = theirs[:, chosen], ours[:, chosen]  # (C, n)
        products = [s.T @ s, z.T @ z]
        if reduction == "mean":
            products = [product / len(z) for product in products]
        total = functional.smooth_l1_loss(products[0], products[1], reduction="sum")
        terms.append(total / max(products[0].numel(), 1))
    return torch.stack(terms)


class ChannelStandardiseConfig(Config, frozen=True):
    """The student imitates z-scores: (Z - mean) / deviation of each teacher channel, clamped to +-`clamp`.

    `statistics`: "batch" over the cells of the present batch; "running" over all that was seen in training.
    """

    statistics: Literal["batch", "running"] = "running"
    clamp: float = 3.0


class LayerNormConfig(Config, frozen=True):
    """Both maps are brought to mean 0 and deviation 1 over each cell's channels before the comparison."""


NormaliseConfig = ChannelStandardiseConfig | LayerNormConfig


class ChannelStandardise(nn.Module):
    """Standardises teacher maps channel by channel; keeps running statistics if asked to."""

    mean: Tensor
    variance: Tensor
    num_batches: Tensor

    def __init__(self, channels: int, config: ChannelStandardiseConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("num_batches", torch.tensor(0))

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """(B, C, Y, X) -> the same, each channel of mean 0, deviation 1, clamped."""
        features = features.float()
        variance, own_mean = torch.var_mean(features, dim=(0, 2, 3), correction=0)
        mean = average_over_processes(own_mean)
        variance = average_over_processes(variance + (own_mean - mean) ** 2)
        if self.config.statistics == "running":
            if self.training:
                self.num_batches += 1
                # The plain mean of the first 100 batches, then an exponential one of that length.
                share = 1 / self.num_batches.clamp(max=100)
                self.mean += (mean - self.mean) * share
                self.variance += (variance - self.variance) * share
            seen = self.num_batches > 0
            mean = torch.where(seen, self.mean.float(), mean)
            variance = torch.where(seen, self.variance.float(), variance)
        deviation = (variance + 1e-5).sqrt()
        scores = (features - mean[:, None, None]) / deviation[:, None, None]
        return scores.clamp(-self.config.clamp, self.config.clamp)


def layer_norm(features: Tensor) -> Tensor:
    """(B, C, Y, X) -> mean 0 and deviation 1 over the channels of each cell."""
    variance, mean = torch.var_mean(features, dim=1, keepdim=True, correction=0)
    return (features - mean) / (variance + 1e-5).sqrt()
