"""Light and air of a scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .meshes import Floats
from .settings import Weather

# How often each occurs, where a world allows all: mostly daylight, as in recorded datasets.
FREQUENCY = {
    Weather.CLEAR: 0.42,
    Weather.OVERCAST: 0.24,
    Weather.RAIN: 0.12,
    Weather.DUSK: 0.11,
    Weather.NIGHT: 0.11,
}


@dataclass(frozen=True)
class Air:
    """Light, haze and wetness. Colours are linear RGB radiances (3,); `sun_direction` (3,) points to the sun."""

    weather: Weather
    sun_direction: Floats
    sun: Floats
    sky: Floats  # irradiance from above, per unit albedo
    zenith: Floats
    horizon: Floats
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
    direction = (np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation))
    strength, haze, exposure = rng.uniform(0.9, 1.1), rng.uniform(0.6, 1.6), rng.uniform(0.9, 1.1)
    clouds, wet = rng.random(2)
    match weather:
        case Weather.CLEAR:
            return Air(
                weather, _rgb(*direction), sun=_rgb(3.0, 2.8, 2.45) * np.float32(strength), sky=_rgb(0.44, 0.64, 1.05),
                zenith=_rgb(0.23, 0.44, 0.86), horizon=_rgb(0.85, 0.95, 1.05), haze_per_m=0.0009 * haze,
                cloud_cover=0.1 + 0.5 * clouds, wetness=0.0, dark=False, exposure=1.05 * exposure, noise=0.010,
                lidar_dropout=0.0,
            )  # fmt: skip
        case Weather.OVERCAST:
            return Air(
                weather, _rgb(*direction), sun=_rgb(0.3, 0.3, 0.3), sky=_rgb(1.08, 1.15, 1.26),
                zenith=_rgb(0.84, 0.89, 0.97), horizon=_rgb(0.99, 1.06, 1.15), haze_per_m=0.0014 * haze,
                cloud_cover=0.85, wetness=0.0, dark=False, exposure=1.05 * exposure, noise=0.012, lidar_dropout=0.0,
            )  # fmt: skip
        case Weather.RAIN:
            return Air(
                weather, _rgb(*direction), sun=_rgb(0, 0, 0), sky=_rgb(0.78, 0.82, 0.9), zenith=_rgb(0.53, 0.56, 0.61),
                horizon=_rgb(0.65, 0.69, 0.76), haze_per_m=0.0032 * haze, cloud_cover=1.0, wetness=1.0, dark=False,
                exposure=1.25 * exposure, noise=0.016, lidar_dropout=0.08,
            )  # fmt: skip
        case Weather.DUSK:
            return Air(
                weather, _rgb(*direction), sun=_rgb(1.15, 0.71, 0.39), sky=_rgb(0.38, 0.38, 0.5),
                zenith=_rgb(0.16, 0.22, 0.42), horizon=_rgb(1.05, 0.72, 0.5), haze_per_m=0.0022 * haze,
                cloud_cover=0.2 + 0.4 * clouds, wetness=0.0, dark=True, exposure=1.05 * exposure, noise=0.016,
                lidar_dropout=0.0,
            )  # fmt: skip
        case Weather.NIGHT:
            return Air(
                weather, _rgb(*direction), sun=_rgb(0, 0, 0), sky=_rgb(0.020, 0.024, 0.036),
                zenith=_rgb(0.004, 0.006, 0.014), horizon=_rgb(0.035, 0.03, 0.035), haze_per_m=0.004, cloud_cover=0.3,
                wetness=float(wet < 0.3), dark=True, exposure=2.1 * exposure, noise=0.028, lidar_dropout=0.0,
            )  # fmt: skip


def _rgb(red: float, green: float, blue: float) -> Floats:
    return np.array([red, green, blue], dtype=np.float32)
