"""Weights by gradient norm: how strongly each term pulls at the student's map, against the student's own loss.

A term's raw size depends on the teacher's range, the number of channels and cells and the number of objects; its
weight then has to be found anew for every pair. Measured against the student's own loss, a weight of 0.1 means a
tenth of that loss's pull whatever the pair. After GradNorm (arXiv:1711.02257), without its learned weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import ConfigError
from ..models.processes import num_processes, total_over_processes


class BalanceConfig(Config, frozen=True):
    """How often gradient norms are taken, how slowly they are believed, and how far they may carry.

    Attributes:
        every: training steps from one measurement to the next, each as dear as a backward pass down to the
            student's map for every term.
        smoothing: the share of the old norm in the new one.
        max_factor: upper bound of the factor, so that a term that has been learned is not blown up.
    """

    every: int = 20
    smoothing: float = 0.9
    max_factor: float = 1000.0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"balance.every={self.every}; choose 1 or more")
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"balance.smoothing={self.smoothing}; choose a share from 0 to below 1")
        if self.max_factor <= 0:
            raise ConfigError(f"balance.max_factor={self.max_factor}; choose a positive number")


def gradient_norms(losses: Mapping[str, Tensor], maps: Sequence[Tensor]) -> dict[str, float]:
    """Norm of each loss's gradient at the given maps taken together; the graph is kept for backward.

    Of the whole batch: in a distributed run all processes ask, with their maps, at the same time.
    """
    norms = {}
    watched = [features for features in maps if features.requires_grad]
    for name, loss in losses.items():
        gradients: tuple[Tensor | None, ...] = ()
        if watched and loss.requires_grad:
            gradients = torch.autograd.grad(loss, watched, retain_graph=True, allow_unused=True)
        squares = [g.float().square().sum() for g in gradients if g is not None]
        square = torch.stack(squares).sum() if squares else loss.new_zeros(())
        norms[name] = float(total_over_processes(square)) ** 0.5 / num_processes()
    return norms


def balance_factors(norms: Tensor, own: Tensor, max_factor: float) -> Tensor:
    """f_t = |dL_own/dM| / |dL_t/dM|, at most `max_factor`; zero for a term that has not pulled yet."""
    return torch.where(norms > 0, own / norms, 0.0).clamp(max=max_factor)


class GradientBalance(nn.Module):
    """Remembers smoothed gradient norms, as buffers: checkpoints hold them, so a resumed run weighs the same."""

    norms: Tensor  # of the student's own loss, then of the terms; zero until measured

    def __init__(self, names: Sequence[str], config: BalanceConfig) -> None:
        super().__init__()
        self.names = tuple(names)
        self.config = config
        self.register_buffer("norms", torch.zeros(1 + len(self.names)))

    def forward(
        self, own: Mapping[str, Tensor], terms: Mapping[str, Tensor], maps: Sequence[Tensor], step: int
    ) -> dict[str, Tensor]:
        """Factors of the terms, measured anew in training at every `config.every`-th step.

        Args:
            own: terms of the student's own loss; without any nothing is measured.
            terms: unweighted, by name.
            maps: the student's maps at which gradients are compared.
        """
        if self.training and own and step % self.config.every == 0:
            with torch.autocast(self.norms.device.type, enabled=False):
                found = gradient_norms({"": torch.stack(list(own.values())).sum(), **terms}, maps)
            self._remember(self.norms.new_tensor([found.get(name, 0.0) for name in ("", *self.names)]))
        factors = balance_factors(self.norms[1:], self.norms[0], self.config.max_factor)
        return dict(zip(self.names, factors, strict=True))

    def _remember(self, fresh: Tensor) -> None:
        smoothed = torch.lerp(fresh, self.norms, self.config.smoothing)
        smoothed = torch.where(self.norms > 0, smoothed, fresh)
        # A term without a gradient, such as one without cells in this batch, keeps what is known of it.
        self.norms.copy_(torch.where(fresh > 0, smoothed, self.norms))
