"""A simulated driving world, written as a real nuScenes dataset whose truth is known exactly."""

from .settings import SplitConfig, Weather, WorldConfig
from .simulate import simulate

__all__ = ["SplitConfig", "Weather", "WorldConfig", "simulate"]
