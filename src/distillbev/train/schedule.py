"""Learning rate over the steps of a run."""

import math
from typing import Literal

from ..config import Config
from ..errors import ConfigError


class ScheduleConfig(Config, frozen=True):
    """How the learning rate goes from its start to its end, as factors of the peak.

    `cosine` falls to `final_factor`, `step` multiplies by 0.1 after each of `milestones` (shares of the run),
    both after a linear warm-up; `one_cycle` rises along a cosine over `warmup_share` and falls along another.
    """

    shape: Literal["one_cycle", "cosine", "step"] = "one_cycle"
    warmup_share: float = 0.3
    start_factor: float = 0.04
    final_factor: float = 0.001
    milestones: tuple[float, ...] = (2 / 3, 11 / 12)

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_share < 1:
            raise ConfigError(
                f"warmup_share={self.warmup_share}; choose a share of the run from 0 to below 1"
            )


def learning_rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The factor on the peak learning rate at `step` of `steps` (0-based)."""
    progress = step / max(steps - 1, 1)
    if progress < config.warmup_share:
        rise = progress / config.warmup_share
        if config.shape == "one_cycle":
            rise = 0.5 - 0.5 * math.cos(math.pi * rise)
        return config.start_factor + (1 - config.start_factor) * rise
    if config.shape == "step":
        return 0.1 ** sum(progress >= milestone for milestone in config.milestones)
    fall = (progress - config.warmup_share) / (1 - config.warmup_share)
    return config.final_factor + (1 - config.final_factor) * (0.5 + 0.5 * math.cos(math.pi * fall))
