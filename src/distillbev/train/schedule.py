"""Learning rate and momentum over the steps of a run."""

import math
from typing import Literal

from ..config import Config
from ..errors import ConfigError


class ScheduleConfig(Config, frozen=True):
    """How the learning rate goes from its start to its end, as factors of the peak.

    `cosine` falls to `final_factor`, `step` multiplies by 0.1 after each of `milestones` (shares of the run),
    both after a linear warm-up; `one_cycle` rises along a cosine over `warmup_share` and falls along another.

    `momentum` is AdamW's beta1. With `peak_momentum` it goes there and back while the learning rate of a
    `one_cycle` goes to its peak and falls. Source: arXiv:1708.07120, section 3; the form is mmcv's.
    """

    shape: Literal["one_cycle", "cosine", "step"] = "one_cycle"
    warmup_share: float = 0.3
    start_factor: float = 0.04
    final_factor: float = 0.001
    milestones: tuple[float, ...] = (2 / 3, 11 / 12)
    momentum: float = 0.9
    peak_momentum: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_share < 1:
            raise ConfigError(
                f"warmup_share={self.warmup_share}; choose a share of the run from 0 to below 1"
            )
        for name in ("momentum", "peak_momentum"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{name}={value}; choose a share from 0 to below 1")
        if self.peak_momentum is not None and self.shape != "one_cycle":
            raise ConfigError(
                f"peak_momentum={self.peak_momentum} goes with shape='one_cycle', found {self.shape!r}; set it to null"
            )


def learning_rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The factor on the peak learning rate at `step` of `steps` (0-based)."""
    progress = step / max(steps - 1, 1)
    if progress < config.warmup_share:
        return config.start_factor + (1 - config.start_factor) * _height(config, progress)
    if config.shape == "step":
        return 0.1 ** sum(progress >= milestone for milestone in config.milestones)
    return config.final_factor + (1 - config.final_factor) * _height(config, progress)


def momentum_at(config: ScheduleConfig, step: int, steps: int) -> float:
    """AdamW's beta1 at `step` of `steps` (0-based)."""
    if config.peak_momentum is None:
        return config.momentum
    height = _height(config, step / max(steps - 1, 1))
    return config.momentum + (config.peak_momentum - config.momentum) * height


def _height(config: ScheduleConfig, progress: float) -> float:
    """0 at the start, 1 at the peak, 0 at the end of a run, `progress` of which (0 to 1) is over."""
    if progress < config.warmup_share:
        rise = progress / config.warmup_share
        return 0.5 - 0.5 * math.cos(math.pi * rise) if config.shape == "one_cycle" else rise
    fall = (progress - config.warmup_share) / (1 - config.warmup_share)
    return 0.5 + 0.5 * math.cos(math.pi * fall)
