"""Sums over the processes of a distributed run, so that each sees the whole step's batch.

Every process computes the loss of its own samples, and gradients are averaged over the processes. What a loss
is divided by, and what a norm knows of its batch, must therefore be those of all samples. All functions here
must be reached by all processes in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm


def num_processes() -> int:
    """How many processes train together; 1 outside of a distributed run."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def total_over_processes(value: Tensor) -> Tensor:
    """A tensor summed over the processes, without gradient; itself where there is one process."""
    if num_processes() == 1:
        return value
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total


def average_over_processes(value: Tensor) -> Tensor:
    """A tensor averaged over the processes, without gradient; itself where there is one process."""
    return value if num_processes() == 1 else total_over_processes(value) / num_processes()


def values_per_channel(features: Tensor) -> float:
    """How many values a norm of (B, C, ...) features sees in each channel, over all processes."""
    own = features.numel() / features.shape[1]
    if num_processes() == 1:
        return own
    return float(total_over_processes(torch.tensor(own, device=features.device)))


def synchronise_norms(module: nn.Module) -> None:
    """Makes every batch norm inside use the statistics of all processes in training; keys stay as they are."""
    for part in module.modules():
        if isinstance(part, _BatchNorm) and not isinstance(part, _SynchronisedStatistics):
            kind = type(part)
            # Behind `kind` in the order of classes: what it does around a plain batch norm stays.
            part.__class__ = type(kind.__name__, (kind, _SynchronisedStatistics), {})  # pyright: ignore


class _SynchronisedStatistics(_BatchNorm):
    """A batch norm over the samples of all processes, on any device; outside training a plain one."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or num_processes() == 1:
            return super().forward(input)
        count, mean, variance = batch_statistics(input)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean), share)
            self.running_var.lerp_(unbiased.to(self.running_var), share)
        return _Normalise.apply(input, mean, variance, count, self.weight, self.bias, self.eps)


@torch.no_grad()
def batch_statistics(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count (), mean (C,) and biased variance (C,) of (B, C, ...) features over all processes.

    In fp32 at least. Processes may hold different numbers of values, also none.
    """
    values = features.to(torch.promote_types(features.dtype, torch.float32))
    count = values.new_tensor(values.numel() / values.shape[1])
    if values.numel():
        variance, mean = torch.var_mean(values, dim=all_but_channels(values), correction=0)
    else:
        variance, mean = values.new_zeros(2, values.shape[1])
    own = torch.cat([count[None], mean, variance])
    gathered = [torch.empty_like(own) for _ in range(num_processes())]
    distributed.all_gather(gathered, own)
    counts, means, variances = torch.stack(gathered).split([1, len(mean), len(mean)], dim=1)
    total = counts.sum()
    share = counts / total.clamp(min=1)
    mean = (means * share).sum(dim=0)
    # Squares of distances to the common mean, never differences of large squares.
    variance = ((variances + (means - mean) ** 2) * share).sum(dim=0)
    return total, mean, variance


def all_but_channels(features: Tensor) -> list[int]:
    return [axis for axis in range(features.ndim) if axis != 1]


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, where mean and variance depend on all processes' x."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(input, mean, variance, count, weight)
        ctx.eps = eps
        return functional.batch_norm(input, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        input, mean, variance, count, weight = ctx.saved_tensors
        shape = (1, -1) + (1,) * (input.ndim - 2)
        rest = all_but_channels(input)
        inverse = (variance + ctx.eps).rsqrt()
        dy = gradient.to(mean.dtype)
        normed = (input.to(mean.dtype) - mean.view(shape)) * inverse.view(shape)
        own = torch.stack([dy.sum(rest), (dy * normed).sum(rest)])  # (2, C): of bias and weight
        mean_dy, mean_dy_normed = total_over_processes(own) / count.clamp(min=1)
        scale = inverse if weight is None else inverse * weight
        dx = (dy - mean_dy.view(shape) - normed * mean_dy_normed.view(shape)) * scale.view(shape)
        dbias, dweight = own if weight is not None else (None, None)
        return dx.to(input.dtype), None, None, None, dweight, dbias, None
