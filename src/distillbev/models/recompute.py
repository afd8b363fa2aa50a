"""Less memory for more time: what lies inside a block is thrown away and computed again on the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, features: Tensor, recompute: bool) -> Tensor:
    """`block(features)`; with `recompute`, autograd keeps the input only. Values and gradients stay the same."""
    if not (recompute and torch.is_grad_enabled()):
        return block(features)
    result = checkpoint(
        block, features, use_reentrant=False, context_fn=lambda: (nullcontext(), statistics_kept(block))
    )
    assert isinstance(result, Tensor)
    return result


@contextmanager
def statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch norms see the second run of the same batch without counting it again."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
