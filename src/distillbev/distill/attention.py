"""How strongly each cell and channel of a map responds, as weights of mean one; fp32, no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Config
from ..errors import ConfigError


class AttentionConfig(Config, frozen=True):
    """Spatial attention of a tap.

    Attributes:
        temperature: T of the softmax.
        student_share: r in (A(Z) + r A(S)) / (1 + r); None for the teacher's attention alone.
        standardise: bring each magnitude map to mean 0 and deviation 1, clamped to +-3, before the softmax.
            Raw magnitudes have no natural scale: one cell can take all attention of a map.
        cap: upper bound of the attention (its mean is then below one), None for none.
    """

    temperature: float = 0.5
    student_share: float | None = 1.0
    standardise: bool = False
    cap: float | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "student_share", "cap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(
                    f"attention {name}={value}; choose a positive number (None switches it off)"
                )


def magnitude(features: Tensor) -> Tensor:
    """(B, C, Y, X) -> (B, 1, Y, X), P(M) = mean over channels of |M|."""
    return features.float().abs().mean(dim=1, keepdim=True)


@torch.no_grad()
def spatial_attention(features: Tensor, config: AttentionConfig) -> Tensor:
    """(B, C, Y, X) -> (B, 1, Y, X), A(M) = Y X softmax over cells of P(M) / T; mean one.

    Source: DistillBEV (ICCV 2023), section 3; Focal and Global Knowledge Distillation (arXiv:2111.11837).
    """
    strength = magnitude(features)
    if config.standardise:
        mean = strength.mean(dim=(2, 3), keepdim=True)
        deviation = strength.std(dim=(2, 3), keepdim=True, correction=0)
        strength = ((strength - mean) / deviation.clamp(min=1e-6)).clamp(-3, 3)
    logits = strength.flatten(1) / config.temperature
    attention = (logits.softmax(dim=1) * logits.shape[1]).view_as(strength)
    return attention if config.cap is None else attention.clamp(max=config.cap)


@torch.no_grad()
def shared_attention(teacher: Tensor, student: Tensor, config: AttentionConfig | None) -> Tensor:
    """Attention of teacher map Z and adapted student map S, (A(Z) + r A(S)) / (1 + r); ones for None."""
    if config is None:
        return teacher.new_ones(len(teacher), 1, *teacher.shape[2:], dtype=torch.float32)
    attention = spatial_attention(teacher, config)
    if config.student_share is None:
        return attention
    share = config.student_share
    return (attention + share * spatial_attention(student, config)) / (1 + share)


@torch.no_grad()
def channel_attention(features: Tensor, temperature: float) -> Tensor:
    """(B, C, Y, X) -> (B, C, 1, 1), C softmax over channels of (mean over cells of |M|) / Tc; mean one."""
    strength = features.float().abs().mean(dim=(2, 3), keepdim=True)
    return (strength / temperature).softmax(dim=1) * features.shape[1]


def attention_statistics(attention: Tensor) -> dict[str, float]:
    """What tells a collapsed attention: its largest value, and the share of the top one per cent of cells."""
    cells = attention.flatten(1)
    top = cells.topk(max(1, cells.shape[1] // 100), dim=1).values
    return {
        "largest": cells.max().item(),
        "top_percent_share": (top.sum(dim=1) / cells.sum(dim=1).clamp(min=1e-12)).mean().item(),
    }
