"""How training changes the look of images and moves nothing: their colours, and squares that are hidden.

Both work on bytes of the network's image, after `ImageAugmentation`. What was drawn stands in a small frozen
dataclass. Letters: N images, H W rows and columns.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..errors import ConfigError

MEAN_BYTES = (124, 116, 104)  # ImageNet's mean, RGB: nothing (below 0.01), once images are normalised
PIXELS_AT_ONCE = 8192  # what is made on the way stays in the cache


class ColourAugConfig(Config, frozen=True):
    """What each image draws for its colours in training; the defaults are those of the published BEVFormer.

    Source: SSD (arXiv:1512.02325), section 2.2, in the form of mmdetection. Each of brightness, contrast,
    saturation, hue and the exchange of channels comes with `probability` of its own; contrast stands before
    saturation and hue or behind them, as often.
    """

    brightness: float = 32.0  # at most this is added or taken away, of 255
    contrast: tuple[float, float] = (0.5, 1.5)  # range of the factor
    saturation: tuple[float, float] = (0.5, 1.5)  # range of the factor, of HSV's saturation
    hue_deg: float = 18.0  # HSV's hue turns by at most this
    exchange_channels: bool = True
    probability: float = 0.5

    def __post_init__(self) -> None:
        for name in ("contrast", "saturation"):
            low, high = getattr(self, name)
            if not 0 <= low <= high < np.inf:
                raise ConfigError(f"{name}={(low, high)}; give factors (low, high) with 0 <= low <= high")
        for name, limit in (("brightness", 255), ("hue_deg", 180), ("probability", 1)):
            if not 0 <= getattr(self, name) <= limit:
                raise ConfigError(f"{name}={getattr(self, name)}; choose a number from 0 to {limit}")

    def draw(self, rng: np.random.Generator) -> Colours:
        def changes() -> bool:
            return bool(rng.random() < self.probability)

        return Colours(
            brightness=rng.uniform(-self.brightness, self.brightness) if changes() else 0.0,
            contrast=rng.uniform(*self.contrast) if changes() else 1.0,
            contrast_first=bool(rng.random() < 0.5),
            saturation=rng.uniform(*self.saturation) if changes() else 1.0,
            hue_deg=rng.uniform(-self.hue_deg, self.hue_deg) if changes() else 0.0,
            channels=tuple(rng.permutation(3).tolist())
            if self.exchange_channels and changes()
            else (0, 1, 2),
        )


@dataclass(frozen=True)
class Colours:
    """Add brightness, multiply saturation and turn hue, with the contrast before or behind; exchange channels.

    Channel c of the result is channel `channels[c]` of what comes before.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    contrast_first: bool = False
    saturation: float = 1.0
    hue_deg: float = 0.0
    channels: tuple[int, ...] = (0, 1, 2)

    def apply(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(3, H, W) RGB -> the same, changed. Only the end is rounded and cut off at 0 and 255."""
        if self == Colours():
            return image
        pixels = image.reshape(3, -1)
        changed = np.empty_like(pixels)
        for start in range(0, pixels.shape[1], PIXELS_AT_ONCE):
            part = slice(start, start + PIXELS_AT_ONCE)
            changed[:, part] = np.rint(self.change(pixels[:, part].astype(np.float32)).clip(0, 255))
        return changed[list(self.channels)].reshape(image.shape)

    def change(self, rgb: NDArray[np.float32]) -> NDArray[np.float32]:
        """(3, n) RGB of 0 to 255 -> the same, all but the exchange of channels; may leave 0 to 255."""
        rgb = rgb + np.float32(self.brightness)
        if self.contrast_first:
            rgb *= np.float32(self.contrast)
        if self.saturation != 1 or self.hue_deg != 0:
            rgb = shift_hue_and_saturation(rgb, self.hue_deg, self.saturation)
        if not self.contrast_first:
            rgb *= np.float32(self.contrast)
        return rgb


def shift_hue_and_saturation(
    rgb: NDArray[np.float32], hue_deg: float, saturation: float
) -> NDArray[np.float32]:
    """(3, n) RGB of any range -> the same with HSV's hue turned and saturation multiplied; its value stays.

    A saturation beyond 1 is not cut off.
    """
    value = rgb.max(axis=0)
    if hue_deg == 0:
        return value - np.float32(saturation) * (value - rgb)
    red, green, blue = rgb
    chroma = value - rgb.min(axis=0)
    divisor = np.maximum(chroma, np.finfo(np.float32).tiny)
    hue = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue += np.float32(hue_deg / 60)
    hue -= 6 * np.floor(hue / 6)  # sixths of a turn from red; five times as fast as %
    chroma *= np.float32(saturation)
    shifted = np.empty_like(rgb)
    # What each channel lacks of the value, in chromas.
    for channel, lacking in enumerate((2 - abs(hue - 3), abs(hue - 2) - 1, abs(hue - 4) - 1)):
        shifted[channel] = value - chroma * lacking.clip(0, 1)
    return shifted


def shift_hue_and_saturation_by_loop(
    rgb: NDArray[np.float32], hue_deg: float, saturation: float
) -> NDArray[np.float32]:
    """The slow, readable twin of `shift_hue_and_saturation`: one pixel after another."""
    shifted = np.empty_like(rgb)
    for pixel in range(rgb.shape[1]):
        hue, old_saturation, value = colorsys.rgb_to_hsv(*rgb[:, pixel].tolist())
        shifted[:, pixel] = colorsys.hsv_to_rgb((hue + hue_deg / 360) % 1, old_saturation * saturation, value)
    return shifted


class GridMaskConfig(Config, frozen=True):
    """Squares between bars are hidden, the same in all present images of a sample; earlier frames stay whole.

    Source: GridMask (arXiv:2001.04086); the defaults are those of the published BEVFormer. The period is drawn
    from 2 pixels to the image's height, and `bar_share` of it stays visible.
    """

    probability: float = 0.7
    bar_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("probability", "bar_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}; choose a number from 0 to 1")

    def draw(self, rng: np.random.Generator, height: int) -> GridMask | None:
        """For images of `height` pixels; None where nothing is hidden."""
        if rng.random() >= self.probability:
            return None
        period = int(rng.integers(2, max(height, 3)))
        bar = min(max(int(period * self.bar_share + 0.5), 1), period - 1)
        first_row, first_column = rng.integers(period, size=2).tolist()
        return GridMask(period, bar, first_row, first_column)


@dataclass(frozen=True)
class GridMask:
    """Horizontal and vertical bars of `bar` pixels every `period`.

    As published, they are laid on a canvas of one and a half times the image around it: the first begin
    `first_row` and `first_column` pixels from its border, and there are as many as whole periods fit.
    """

    period: int
    bar: int
    first_row: int
    first_column: int

    def visible(self, height: int, width: int) -> NDArray[np.bool_]:
        """(H, W): where a bar lies."""
        rows = self._in_bar(height, self.first_row)
        columns = self._in_bar(width, self.first_column)
        return rows[:, None] | columns

    def _in_bar(self, size: int, first: int) -> NDArray[np.bool_]:
        canvas = int(1.5 * size)
        place = np.arange(size) + (canvas - size) // 2 - first
        return (
            (place >= 0) & (place // self.period < canvas // self.period) & (place % self.period < self.bar)
        )

    def apply(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(N, 3, H, W) RGB -> the same with the mean colour where no bar lies."""
        masked = images.copy()
        hidden = ~self.visible(*images.shape[-2:])
        np.copyto(masked, np.array(MEAN_BYTES, dtype=np.uint8)[:, None, None], where=hidden)
        return masked
