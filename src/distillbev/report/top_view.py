"""The ground around the car, seen from above."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..boxes import box_corners
from ..data.schema import Sample
from .paint import (
    BACKGROUND,
    CLASS_COLOURS,
    FAINT,
    INK,
    PANEL,
    RING,
    SUPERSAMPLING,
    BoxLayer,
    Colour,
    draw_legend,
    font,
    legend_of_boxes,
    stamp_discs,
)
from .rig_lines import field_of_view

Placement = Callable[[NDArray[np.floating]], NDArray[np.floating]]  # metres seen from above -> pixels


CAMERA_COLOURS: tuple[Colour, ...] = tuple(CLASS_COLOURS.values())


def bev_picture(
    points: NDArray[np.floating] | None,
    layers: Sequence[BoxLayer],
    extent_m: float = 51.2,
    size_px: int = 900,
    title: str = "",
    rig: Sample | None = None,
) -> Image.Image:
    """The ground around the car from above: x to the right, y (forward) up, in the LiDAR frame.

    Ground truth (boxes without scores) is outlined, detections are filled and fade with their score; a tick
    shows where each box heads, a thin line where it will be in one second.

    Args:
        points: (P, >=3), brighter the higher they lie; or None.
        layers: drawn one over the other.
        extent_m: half the side of the square that is shown.
        size_px: its side in the picture.
        title: one line above it.
        rig: whose cameras are shown with their fields of view.
    """
    scale = SUPERSAMPLING
    side = size_px * scale
    per_metre = side / (2 * extent_m)

    def place(xy_m: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.stack([xy_m[..., 0] + extent_m, extent_m - xy_m[..., 1]], axis=-1) * per_metre

    field = Image.new("RGB", (side, side), BACKGROUND)
    _draw_rings(ImageDraw.Draw(field), extent_m, per_metre)
    if points is not None and len(points):
        field = _stamp_bev_points(field, np.asarray(points[:, :3], dtype=np.float64), place)
    pen = ImageDraw.Draw(field, "RGBA")
    _draw_ego(pen, place)
    if rig is not None:
        _draw_cameras(pen, rig, place, reach_m=0.3 * extent_m)
    for layer in layers:
        for index, box in enumerate(layer.boxes.boxes.cpu().numpy()):
            filled = layer.boxes.scores is not None
            _draw_bev_box(pen, box, layer.colour_of(index), layer.opacity_of(index), filled, place)
    field = field.reduce(scale)

    header, footer = 34 if title else 0, 34
    picture = Image.new("RGB", (size_px, size_px + header + footer), PANEL)
    picture.paste(field, (0, header))
    pen = ImageDraw.Draw(picture)
    pen.text((12, header / 2), title, INK, font=font(15), anchor="lm")
    draw_legend(pen, (12, header + size_px + footer / 2), legend_of_boxes(layers), size_px - 24)
    return picture


def _draw_rings(pen: ImageDraw.ImageDraw, extent_m: float, per_metre: float) -> None:
    """Distance from the LiDAR, every 10 m (5 m in small pictures), and the two axes."""
    spacing = 10 if extent_m > 30 else 5
    centre = extent_m * per_metre
    pen.line((centre, 0, centre, 2 * centre), fill=RING, width=SUPERSAMPLING)
    pen.line((0, centre, 2 * centre, centre), fill=RING, width=SUPERSAMPLING)
    for radius_m in np.arange(spacing, extent_m * 1.42, spacing):
        radius = radius_m * per_metre
        pen.ellipse(
            (centre - radius, centre - radius, centre + radius, centre + radius),
            outline=RING,
            width=SUPERSAMPLING,
        )
        if radius_m < extent_m:
            place = (centre + 4 * SUPERSAMPLING, centre - radius - 2 * SUPERSAMPLING)
            pen.text(place, f"{radius_m:.0f} m", FAINT, font=font(11 * SUPERSAMPLING), anchor="ls")


def _stamp_bev_points(field: Image.Image, points: NDArray[np.float64], place: Placement) -> Image.Image:
    """Ground dim, what stands on it bright; the LiDAR's own height above ground is about 1.8 m."""
    pixels = place(points[:, :2])
    inside = ((pixels >= 0) & (pixels < field.width)).all(axis=1)
    pixels, height_m = pixels[inside], points[inside, 2]
    order = np.argsort(height_m)
    brightness = np.clip((height_m[order] + 2.0) / 3.0, 0, 1)[:, None]
    colours = np.array(FAINT) + brightness * (np.array([176, 192, 222]) - np.array(FAINT))
    canvas = np.array(field)
    stamp_discs(canvas, pixels[order], colours.astype(np.uint8), radius_px=1.0)
    return Image.fromarray(canvas)


def _draw_ego(pen: ImageDraw.ImageDraw, place: Placement) -> None:
    """A car of usual size at the LiDAR, an arrowhead for its front."""
    body = place(np.array([[-0.9, -3.1], [0.9, -3.1], [0.9, 1.4], [-0.9, 1.4]]))
    pen.polygon([tuple(corner) for corner in body], fill=(*INK, 60), outline=(*INK, 200), width=SUPERSAMPLING)
    arrow = place(np.array([[-0.6, 0.0], [0.6, 0.0], [0.0, 1.1]]))
    pen.polygon([tuple(corner) for corner in arrow], fill=(*INK, 220))


def _draw_cameras(pen: ImageDraw.ImageDraw, sample: Sample, place: Placement, reach_m: float) -> None:
    """A wedge for each camera, from where it is to where it looks."""
    for number, camera in enumerate(sample.cameras):
        position, edges = field_of_view(sample, camera)
        colour = CAMERA_COLOURS[number % len(CAMERA_COLOURS)]
        corners = place(np.stack([position, position + reach_m * edges[0], position + reach_m * edges[1]]))
        wedge = [tuple(corner) for corner in corners]
        pen.polygon(wedge, fill=(*colour, 26))
        pen.line([wedge[1], wedge[0], wedge[2]], fill=(*colour, 220), width=SUPERSAMPLING)
        middle = place(position + 0.8 * reach_m * edges.mean(axis=0))
        label = camera.channel.removeprefix("CAM_").replace("_", " ").lower()
        pen.text(tuple(middle), label, colour, font=font(12 * SUPERSAMPLING), anchor="mm")


def _draw_bev_box(
    pen: ImageDraw.ImageDraw,
    box: NDArray[np.floating],
    colour: Colour,
    opacity: float,
    filled: bool,
    place: Placement,
) -> None:
    width = round(1.5 * SUPERSAMPLING)
    outline = [tuple(corner) for corner in place(box_corners(box[None])[0, :4, :2])]
    if filled:
        pen.polygon(outline, fill=(*colour, int(90 * opacity)))
    pen.line(
        [*outline, outline[0], outline[1]], fill=(*colour, int(255 * opacity)), width=width, joint="curve"
    )
    forward = np.array([np.cos(box[6]), np.sin(box[6])])
    tick = place(np.stack([box[:2], box[:2] + forward * (box[3] / 2 + 0.6)]))
    pen.line([tuple(end) for end in tick], fill=(*colour, int(255 * opacity)), width=width)
    if np.isfinite(box[7:9]).all() and np.hypot(box[7], box[8]) > 0.5:
        motion = place(np.stack([box[:2], box[:2] + box[7:9]]))
        pen.line([tuple(end) for end in motion], fill=(*colour, int(120 * opacity)), width=SUPERSAMPLING)
