"""What all pictures share: colours, layers of boxes, legends, the font. Pillow only.

Everything is drawn at `SUPERSAMPLING` times the size and shrunk, which smooths every edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageDraw, ImageFont

from ..boxes import Boxes3D
from ..classes import CLASSES
from ..data.schema import Annotations

Colour = tuple[int, int, int]

SUPERSAMPLING = 2

CLASS_COLOURS: dict[str, Colour] = {
    "car": (255, 170, 51),
    "truck": (255, 99, 72),
    "bus": (214, 72, 215),
    "trailer": (168, 118, 255),
    "construction_vehicle": (233, 205, 60),
    "pedestrian": (72, 149, 255),
    "motorcycle": (255, 92, 158),
    "bicycle": (46, 204, 160),
    "traffic_cone": (150, 220, 75),
    "barrier": (86, 205, 240),
}
OTHER_COLOUR: Colour = (150, 155, 165)
GROUND_TRUTH_COLOUR: Colour = (88, 236, 132)
BACKGROUND: Colour = (17, 20, 28)
PANEL: Colour = (27, 31, 42)
INK: Colour = (228, 231, 238)
RING: Colour = (38, 43, 57)
FAINT: Colour = (72, 80, 100)


@dataclass(frozen=True)
class BoxLayer:
    """One set of boxes to draw: coloured by class, or all in one `colour`; `name` goes into the legend."""

    boxes: Boxes3D
    name: str
    colour: Colour | None = None

    def colour_of(self, index: int) -> Colour:
        return self.colour or class_colour(int(self.boxes.labels[index]))

    def opacity_of(self, index: int) -> float:
        """1 for ground truth; detections fade with their score, yet never vanish."""
        return 1.0 if self.boxes.scores is None else 0.25 + 0.75 * float(self.boxes.scores[index])


def annotated_boxes(annotations: Annotations) -> Boxes3D:
    """The annotations of a sample as boxes; categories outside the detection challenge keep label -1."""
    return Boxes3D(torch.from_numpy(annotations.boxes), torch.from_numpy(annotations.labels))


def class_colour(label: int) -> Colour:
    """Label (index into CLASSES, -1 for any other category) -> colour."""
    return CLASS_COLOURS[CLASSES[label]] if 0 <= label < len(CLASSES) else OTHER_COLOUR


def legend_of_boxes(layers: Sequence[BoxLayer]) -> list[tuple[str, Colour]]:
    """Names of the layers, and of the classes that occur in those coloured by class."""
    entries = [(layer.name, layer.colour) for layer in layers if layer.colour]
    labels = {int(label) for layer in layers if not layer.colour for label in layer.boxes.labels}
    entries += [(CLASSES[label].replace("_", " "), class_colour(label)) for label in sorted(labels - {-1})]
    return entries + [("other", OTHER_COLOUR)] * (-1 in labels)


def draw_legend(
    pen: ImageDraw.ImageDraw,
    left_centre: tuple[float, float],
    entries: Sequence[tuple[str, Colour]],
    width_px: float,
) -> None:
    x, y = left_centre
    for text, colour in entries:
        needed = 16 + pen.textlength(text, font(12)) + 14
        if x + needed > left_centre[0] + width_px:
            break
        pen.rounded_rectangle((x, y - 5, x + 10, y + 5), 2, fill=colour)
        pen.text((x + 16, y), text, INK, font=font(12), anchor="lm")
        x += needed


def stamp_discs(
    canvas: NDArray[np.uint8], centres_px: NDArray[np.floating], colours: NDArray[np.uint8], radius_px: float
) -> None:
    """Paints filled discs into (H, W, 3), later ones over earlier ones."""
    height, width = canvas.shape[:2]
    reach = int(np.ceil(radius_px))
    columns, rows = np.floor(centres_px).astype(np.int64).T
    offsets = np.arange(-reach, reach + 1)
    dy, dx = np.meshgrid(offsets, offsets, indexing="ij")
    disc = dx**2 + dy**2 <= radius_px**2
    # Point by point, then offset by offset: with repeated indices numpy keeps the last, the nearest point.
    y = (rows[:, None] + dy[disc]).ravel()
    x = (columns[:, None] + dx[disc]).ravel()
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    canvas[y[inside], x[inside]] = np.repeat(colours, disc.sum(), axis=0)[inside]


@cache
def font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that Pillow brings along."""
    return ImageFont.load_default(size_px)
