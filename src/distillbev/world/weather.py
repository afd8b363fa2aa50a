"""Light and air of a scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .settings import Weather

F32 = NDArray[np.float32]


# How often each occurs, where a world allows all: mostly daylight, as in recorded datasets.
FREQUENCY = {Weather.CLEAR: 0.42, Weather.OVERCAST: 0.24, Weather.RAIN: 0.12, Weather.DUSK: 0.11, Weather.NIGHT: 0.11}


@dataclass(frozen=True)
class Air:
    """Light, haze and wetness. Colours are linear RGB radiances (3,); `sun_direction` (3,) points to the sun."""

    weather: Weather
    sun_direction: F32
    sun: F32
    sky: F32  # irradiance from above, per unit albedo
    zenith: F32
    horizon: F32
    haze_per_m: float
    cloud_cover: float
    wetness: float
    dark: bool  # headlights and street lamps are on
    exposure: float
    noise: float  # of a pixel at mid grey, share of full scale
    lidar_dropout: float  # share of returns lost to rain


def draw_weather(allowed: tuple[Weather, ...], rng: np.random.Generator) -> Weather:
    weights = np.array([FREQUENCY[weather] for weather in allowed])
    return allowed[int(rng.choice(len(allowed), p=weights / weights.sum()))]


def draw_air(weather: Weather, rng: np.random.Generator) -> Air:
    azimuth = rng.uniform(-np.pi, np.pi)
    elevation = np.radians(rng.uniform(28, 62) if weather is not Weather.DUSK else rng.uniform(6, 13))
    direction = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    blue, grey = np.array([0.20, 0.38, 0.75]), np.array([0.62, 0.66, 0.72])
    if weather is Weather.CLEAR:
        warm = np.array([1.0, 0.94, 0.82])
        values = (3.0 * warm * rng.uniform(0.85, 1.1), blue * 1.1 + 0.22, blue * 1.15, np.array([0.85, 0.95, 1.05]),
                  0.0009 * rng.uniform(0.5, 2.0), rng.uniform(0.1, 0.6), 0.0, False, 1.05, 0.010)  # fmt: skip
    elif weather is Weather.OVERCAST:
        values = (0.3 * np.ones(3), grey * 1.75, grey * 1.35, grey * 1.6, 0.0013 * rng.uniform(0.6, 1.8), 0.85, 0.0, False,
                  1.05, 0.012)  # fmt: skip
    elif weather is Weather.RAIN:
        values = (0.0 * np.ones(3), grey * 1.25, grey * 0.85, grey * 1.05, 0.0045 * rng.uniform(0.6, 1.4), 1.0, 1.0, False,
                  1.25, 0.016)  # fmt: skip
    elif weather is Weather.DUSK:
        values = (1.15 * np.array([1.0, 0.62, 0.34]), np.array([0.34, 0.34, 0.46]) * 1.0, np.array([0.16, 0.22, 0.42]),
                  np.array([1.05, 0.72, 0.5]), 0.003 * rng.uniform(0.6, 1.4), rng.uniform(0.2, 0.6), 0.0, True, 1.0, 0.016)  # fmt: skip
    else:
        values = (0.0 * np.ones(3), np.array([0.020, 0.024, 0.036]), np.array([0.004, 0.006, 0.014]),
                  np.array([0.035, 0.03, 0.035]), 0.004, 0.3, float(rng.random() < 0.3), True, 2.1, 0.028)  # fmt: skip
    sun, sky, zenith, horizon, haze, clouds, wet, dark, exposure, noise = values
    return Air(
        weather, direction.astype(np.float32), sun.astype(np.float32), sky.astype(np.float32), zenith.astype(np.float32),
        horizon.astype(np.float32), float(haze), float(clouds), float(wet), dark, float(exposure * rng.uniform(0.9, 1.1)), noise,
        lidar_dropout=0.08 if weather is Weather.RAIN else 0.0,
    )  # fmt: skip
