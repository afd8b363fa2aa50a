"""The first convolution of an image network, brought to our pixels: RGB, with ImageNet's mean and spread."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..models.image_encoder import MEAN_RGB, STD_RGB


@dataclass(frozen=True)
class Pixels:
    """How images of 0 to 255 entered a network: channel c as (value - mean[c]) / spread[c]."""

    bgr: bool
    mean: tuple[float, ...]
    spread: tuple[float, ...]
    told: str

    @property
    def is_ours(self) -> bool:
        return not self.bgr and self.mean == MEAN_RGB and self.spread == STD_RGB


PIXELS = {
    "rgb": Pixels(False, MEAN_RGB, STD_RGB, "RGB, ImageNet's mean and spread"),
    "bgr": Pixels(True, MEAN_RGB[::-1], (1.0, 1.0, 1.0), "BGR, ImageNet's mean, not scaled"),
    "swapped": Pixels(True, MEAN_RGB, STD_RGB, "BGR, with mean and spread in the order of RGB"),
}


def pixels_by_name(name: str) -> Pixels:
    """Raises:
    CheckpointError: no such name.
    """
    if name not in PIXELS:
        raise CheckpointError(f"pixels {name!r}; expected one of {', '.join(PIXELS)}")
    return PIXELS[name]


def pixels_of_config(text: str) -> Pixels | None:
    """What an mmdetection configuration says under `img_norm_cfg`; None where it says nothing."""
    found = re.search(r"img_norm_cfg\s*=\s*(dict\(|\{)([^)}]*)", text)
    if found is None:
        return None
    numbers = {}
    for name in ("mean", "std"):
        listed = re.search(rf"{name}'?\s*[=:]\s*[\[(]([^\])]*)[\])]", found[2])
        if listed is None or len(listed[1].split(",")) != 3:
            return None
        numbers[name] = tuple(float(number) for number in listed[1].split(","))
    to_rgb = re.search(r"to_rgb'?\s*[=:]\s*True", found[2]) is not None
    order = "RGB" if to_rgb else "BGR"
    return Pixels(
        not to_rgb,
        numbers["mean"],
        numbers["std"],
        f"{order}, mean {numbers['mean']}, spread {numbers['std']}",
    )


def turn_stem(kernel: Tensor, pixels: Pixels) -> tuple[Tensor, Tensor]:
    """A first convolution for our pixels, and what its result then lacks.

    With our x and their y, y[c] = (x[k] ours_spread[k] + ours_mean[k] - mean[c]) / spread[c] for the same colour
    k: the factors go into the kernel, and the rest is a constant per output channel. It is exact but within a
    kernel's reach of the border, where each pads with its own zero.

    Args:
        kernel: (out, 3, k, k).

    Returns:
        (out, 3, k, k), and (out,), which the following norm's running mean must lose.
    """
    order = [2, 1, 0] if pixels.bgr else [0, 1, 2]  # our channel of each of theirs, and the other way round
    mean, spread = (torch.tensor(ours, dtype=torch.float64)[order] for ours in (MEAN_RGB, STD_RGB))
    their_mean, their_spread = (
        torch.tensor(theirs, dtype=torch.float64) for theirs in (pixels.mean, pixels.spread)
    )
    exact = kernel.double()
    constant = (exact.sum(dim=(2, 3)) * ((mean - their_mean) / their_spread)).sum(dim=1)
    turned = (exact * (spread / their_spread)[:, None, None])[:, order]
    return turned.to(kernel.dtype).contiguous(), constant.to(kernel.dtype)
