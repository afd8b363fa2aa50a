"""Boxes, points and the ground on the pixels of the cameras.

Boxes are (n, 9) as BOX_FIELDS in the LiDAR frame; `lidar2img` takes that frame to (u*d, v*d, d, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..boxes import box_corners
from ..data.images import load_image
from ..data.schema import CameraFrame, Sample
from ..geometry import invert_rigid
from .paint import (
    BACKGROUND,
    INK,
    SUPERSAMPLING,
    BoxLayer,
    Colour,
    draw_legend,
    font,
    legend_of_boxes,
    stamp_discs,
)
from .rig_lines import DIRECTIONS, ground_lines, label_place

NEAR_M = 0.2  # what lies closer to the camera plane than this is cut off

# Near to far, an even walk from warm to cold that stays bright on dark and on street scenes.
DEPTH_COLOURS = np.array(
    [[255, 84, 60], [255, 176, 48], [214, 236, 72], [70, 226, 146], [52, 172, 246], [104, 98, 226]],
    dtype=np.float64,
)

# Pairs of `box_corners` indices: bottom, top, uprights. The front face is corners 0, 1, 5, 4.
BOX_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))
FRONT_FACE = (0, 1, 5, 4)


def camera_mosaic(
    sample: Sample,
    layers: Sequence[BoxLayer] = (),
    points: NDArray[np.floating] | None = None,
    tile_width_px: int = 560,
    title: str | None = None,
    ground: bool = False,
) -> Image.Image:
    """All cameras of a sample in rows of up to three, with boxes and points (LiDAR frame) on the pixels.

    Images of any sizes: those of a row have one height, and fill it where that is not too high. `ground` draws
    `draw_ground_on_image` over them.

    Raises:
        DataError: an image is absent, damaged or of another size than the tables say.
    """
    count = len(sample.cameras)
    columns = 2 if count in (2, 4) else min(3, max(count, 1))
    rows = [sample.cameras[first : first + columns] for first in range(0, count, columns)]
    legend = _legend_of_ground() if ground else legend_of_boxes(layers)
    gap, header, footer = 6, 34, 34 if legend else 0
    width = columns * (tile_width_px + gap) + gap
    heights: list[int] = []
    for row in rows:
        fitting = (width - gap * (len(row) + 1)) / sum(map(_aspect, row))
        # A last row with fewer images is no higher than the first.
        highest = heights[0] if heights and len(row) < columns else 0.75 * tile_width_px
        heights.append(round(min(fitting, highest)))
    picture = Image.new("RGB", (width, header + sum(heights) + gap * len(rows) + footer), BACKGROUND)
    top = header
    for row, height in zip(rows, heights, strict=True):
        tiles = [_camera_tile(sample, camera, layers, points, height, ground) for camera in row]
        left = gap if len(row) < columns else (width - sum(tile.width + gap for tile in tiles) + gap) // 2
        for tile in tiles:
            picture.paste(tile, (left, top))
            left += tile.width + gap
        top += height + gap
    pen = ImageDraw.Draw(picture)
    pen.text((gap + 6, header / 2), title or sample.scene, INK, font=font(15), anchor="lm")
    draw_legend(pen, (gap + 6, picture.height - footer / 2 - gap / 2), legend, width - 2 * gap)
    return picture


def _aspect(camera: CameraFrame) -> float:
    return max(camera.size_wh_px[0], 1) / max(camera.size_wh_px[1], 1)


def _camera_tile(
    sample: Sample,
    camera: CameraFrame,
    layers: Sequence[BoxLayer],
    points: NDArray[np.floating] | None,
    height_px: int,
    ground: bool,
) -> Image.Image:
    source = np.array(camera.size_wh_px)
    size = np.array([max(round(height_px * _aspect(camera)), 1), height_px])
    image = load_image(camera, float(height_px / max(source[1], 1))).image
    image = image.resize((int(size[0]), height_px), Image.Resampling.BICUBIC)
    lidar2img = np.diag([*(size / source), 1.0, 1.0]) @ lidar_to_image(sample, camera)
    if ground:
        image = draw_ground_on_image(image, sample.lidar2ego, lidar2img)
    if points is not None:
        image = draw_points_on_image(image, points, lidar2img)
    if layers:
        image = draw_boxes_on_image(image, layers, lidar2img)
    pen = ImageDraw.Draw(image, "RGBA")
    label = camera.channel.removeprefix("CAM_").replace("_", " ").lower()
    label += f"   {source[0]}x{source[1]}" if ground else ""
    pen.rounded_rectangle((6, 6, 18 + pen.textlength(label, font(12)), 26), 4, fill=(*BACKGROUND, 170))
    pen.text((12, 16), label, INK, font=font(12), anchor="lm")
    return image


def _legend_of_ground() -> list[tuple[str, Colour]]:
    names = {line.name: line.distance_m for line in ground_lines(np.eye(4)) if line.name.endswith(" m")}
    return [(f"{name} on the ground", line_colour(name, radius)) for name, radius in names.items()]


def lidar_to_image(sample: Sample, camera: CameraFrame) -> NDArray[np.float64]:
    """(4, 4): key LiDAR frame -> source pixels of the camera, with the car's motion between the two."""
    lidar2cam = invert_rigid(camera.ego2global @ camera.cam2ego) @ sample.lidar2global
    return camera.cam2img @ lidar2cam


def draw_boxes_on_image(
    image: Image.Image, layers: Sequence[BoxLayer], lidar2img: NDArray[np.float64], line_px: float = 1.6
) -> Image.Image:
    """A copy of the image with the edges of the boxes, front face tinted, far boxes first.

    Args:
        image: RGB, in the pixels that `lidar2img` speaks of.
        layers: drawn one over the other.
        lidar2img: (4, 4) LiDAR frame -> (u*d, v*d, d, 1); boxes that reach behind the camera are cut there.
        line_px: width of the edges.
    """
    scale = SUPERSAMPLING
    canvas = image.resize((image.width * scale, image.height * scale), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas, "RGBA")
    for layer in layers:
        boxes = layer.boxes.boxes.cpu().numpy()
        corners = _to_camera(lidar2img, box_corners(boxes))  # (n, 8, 3): u*d, v*d, d
        for index in np.argsort(-corners[..., 2].mean(axis=1)):
            _draw_box(
                pen, corners[index], layer.colour_of(index), layer.opacity_of(index), line_px, image.size
            )
    return canvas.reduce(scale)


def draw_points_on_image(
    image: Image.Image,
    points: NDArray[np.floating],
    lidar2img: NDArray[np.float64],
    max_depth_m: float = 60.0,
    radius_px: float = 1.3,
) -> Image.Image:
    """A copy of the image with the points (P, >=3) that fall into it, coloured by depth, near ones on top."""
    scale = SUPERSAMPLING
    canvas = np.array(image.resize((image.width * scale, image.height * scale), Image.Resampling.BILINEAR))
    projected = _to_camera(lidar2img, np.asarray(points[:, :3], dtype=np.float64))
    projected = projected[projected[:, 2] > NEAR_M]
    pixels = projected[:, :2] / projected[:, 2:]
    inside = ((pixels >= 0) & (pixels < image.size)).all(axis=1)
    pixels, depth = pixels[inside], projected[inside, 2]
    order = np.argsort(-depth)
    stamp_discs(canvas, pixels[order] * scale, depth_colours(depth[order], max_depth_m), radius_px * scale)
    return Image.fromarray(canvas).reduce(scale)


def draw_ground_on_image(
    image: Image.Image, lidar2ego: NDArray[np.float64], lidar2img: NDArray[np.float64]
) -> Image.Image:
    """A copy of the image with rings on flat ground, the horizon, and the car's directions by name.

    The horizon lies on the real one and the rings run on from camera to camera, or the calibration is wrong.
    """
    scale = SUPERSAMPLING
    canvas = image.resize((image.width * scale, image.height * scale), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas, "RGBA")
    for line in ground_lines(lidar2ego):
        corners = _to_camera(lidar2img, line.points_m)
        colour, opacity = line_colour(line.name, line.distance_m), 220 if line.name else 90
        for start, end in pairwise(corners):
            clipped = clip_segment(start, end)
            if clipped is not None:
                ends = [tuple(point[:2] / point[2] * scale) for point in clipped]
                pen.line(ends, fill=(*colour, opacity), width=round(1.5 * scale))
    for name in DIRECTIONS:
        u, v, depth = _to_camera(lidar2img, label_place(lidar2ego, name))
        if depth > NEAR_M:
            place = (u / depth * scale + 4 * scale, v / depth * scale)
            pen.text(
                place,
                name,
                INK,
                font=font(11 * scale),
                anchor="lb",
                stroke_width=scale,
                stroke_fill=BACKGROUND,
            )
    return canvas.reduce(scale)


def line_colour(name: str, distance_m: float) -> Colour:
    """Rings as points of that depth; horizon and directions like text."""
    if not name.endswith(" m"):
        return INK
    red, green, blue = depth_colours(np.array([distance_m]), 60.0)[0].tolist()
    return red, green, blue


def depth_colours(depth_m: NDArray[np.float64], max_depth_m: float) -> NDArray[np.uint8]:
    """(n,) depths -> (n, 3) colours, warm near, cold from `max_depth_m` on."""
    position = np.clip(depth_m / max_depth_m, 0, 1) ** 0.7 * (len(DEPTH_COLOURS) - 1)
    steps = np.arange(len(DEPTH_COLOURS))
    channels = [np.interp(position, steps, DEPTH_COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def clip_segment(
    start: NDArray[np.float64], end: NDArray[np.float64], near: float = NEAR_M
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """The part of a segment with depth (third coordinate) of at least `near`; None where there is none.

    Works on (u*d, v*d, d) as on camera coordinates: both are linear in space, pixels are not.
    """
    if start[2] < near and end[2] < near:
        return None
    if start[2] < near:
        start = end + (start - end) * ((end[2] - near) / (end[2] - start[2]))
    elif end[2] < near:
        end = start + (end - start) * ((start[2] - near) / (start[2] - end[2]))
    return start, end


def _to_camera(lidar2img: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 3) LiDAR frame -> (..., 3): u*d, v*d, d, without dividing."""
    return points @ lidar2img[:3, :3].T + lidar2img[:3, 3]


def _draw_box(
    pen: ImageDraw.ImageDraw,
    corners: NDArray[np.float64],
    colour: Colour,
    opacity: float,
    line_px: float,
    size_wh_px: tuple[int, int],
) -> None:
    scale = SUPERSAMPLING
    if (corners[:, 2] < NEAR_M).all():
        return
    lines = []
    for first, second in BOX_EDGES:
        clipped = clip_segment(corners[first], corners[second])
        if clipped is not None:
            lines.append([tuple(end[:2] / end[2] * scale) for end in clipped])
    ends = np.array(lines).reshape(-1, 2)
    if (ends.max(axis=0) < 0).any() or (ends.min(axis=0) > np.array(size_wh_px) * scale).any():
        return
    front = _clipped_face(corners[list(FRONT_FACE)])
    if len(front) >= 3:
        pen.polygon([tuple(corner * scale) for corner in front], fill=(*colour, int(70 * opacity)))
    width = max(round(line_px * scale), 1)
    for line in lines:
        pen.line(line, fill=(0, 0, 0, int(110 * opacity)), width=width + 2)
    for line in lines:
        pen.line(line, fill=(*colour, int(255 * opacity)), width=width)


def _clipped_face(face: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """(4, 3) corners as u*d, v*d, d -> pixels of the polygon in front of the camera."""
    polygon = []
    for first, second in zip(face, np.roll(face, -1, axis=0), strict=True):
        clipped = clip_segment(first, second)
        if clipped is not None:
            polygon += [end[:2] / end[2] for end in clipped]
    return polygon
