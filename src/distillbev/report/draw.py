"""Pictures of a sample: boxes and points on the pixels, and the ground seen from above. Pillow only.

Boxes are (n, 9) as BOX_FIELDS in the LiDAR frame; `lidar2img` takes that frame to (u*d, v*d, d, 1).
Everything is drawn at `SUPERSAMPLING` times the size and shrunk, which smooths every edge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..boxes import Boxes3D, box_corners
from ..classes import CLASSES
from ..data.images import load_image
from ..data.points import load_points
from ..data.schema import Annotations, CameraFrame, Sample
from ..geometry import invert_rigid
from .rig_lines import DIRECTIONS, field_of_view, ground_lines, label_place

Colour = tuple[int, int, int]
Placement = Callable[[NDArray[np.floating]], NDArray[np.floating]]  # metres seen from above -> pixels

SUPERSAMPLING = 2
NEAR_M = 0.2  # what lies closer to the camera plane than this is cut off

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

CAMERA_COLOURS: tuple[Colour, ...] = tuple(CLASS_COLOURS.values())

# Near to far, an even walk from warm to cold that stays bright on dark and on street scenes.
DEPTH_COLOURS = np.array(
    [[255, 84, 60], [255, 176, 48], [214, 236, 72], [70, 226, 146], [52, 172, 246], [104, 98, 226]],
    dtype=np.float64,
)

# Pairs of `box_corners` indices: bottom, top, uprights. The front face is corners 0, 1, 5, 4.
BOX_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))
FRONT_FACE = (0, 1, 5, 4)


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


def class_colour(label: int) -> Colour:
    """Label (index into CLASSES, -1 for any other category) -> colour."""
    return CLASS_COLOURS[CLASSES[label]] if 0 <= label < len(CLASSES) else OTHER_COLOUR


def lidar_to_image(sample: Sample, camera: CameraFrame) -> NDArray[np.float64]:
    """(4, 4): key LiDAR frame -> source pixels of the camera, with the car's motion between the two."""
    lidar2cam = invert_rigid(camera.ego2global @ camera.cam2ego) @ sample.lidar2global
    return camera.cam2img @ lidar2cam


def annotated_boxes(annotations: Annotations) -> Boxes3D:
    """The annotations of a sample as boxes; categories outside the detection challenge keep label -1."""
    return Boxes3D(torch.from_numpy(annotations.boxes), torch.from_numpy(annotations.labels))


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
    _stamp_discs(canvas, pixels[order] * scale, depth_colours(depth[order], max_depth_m), radius_px * scale)
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
    legend = _legend_of_ground() if ground else _legend_of_boxes(layers)
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
    _draw_legend(pen, (gap + 6, picture.height - footer / 2 - gap / 2), legend, width - 2 * gap)
    return picture


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
    _draw_legend(pen, (12, header + size_px + footer / 2), _legend_of_boxes(layers), size_px - 24)
    return picture


def inspect_sample(sample: Sample, out_dir: Path) -> list[Path]:
    """Draws what a sample holds, so that calibration and labels can be judged by eye before any training.

    Returns:
        The pictures written: on the cameras boxes, LiDAR points, and rings on the ground, which need neither;
        and the view from above, with the cameras' fields of view.

    Raises:
        DataError: an image or a point file is absent or damaged.
    """
    points = load_points(sample)
    layers, count = [], "not annotated"
    if sample.annotations is not None:
        layers = [BoxLayer(annotated_boxes(sample.annotations), "annotations")]
        count = f"{len(sample.annotations.boxes)} annotated boxes"
    title = f"{sample.scene}   {sample.token[:8]}   {count}"
    pictures: dict[str, Image.Image] = {}
    if sample.cameras:
        pictures["boxes.jpg"] = camera_mosaic(sample, layers, title=title)
    if sample.cameras and len(points):
        title_points = (
            f"{sample.scene}   {sample.token[:8]}   {len(points):,} LiDAR points, near warm, far cold"
        )
        pictures["points.jpg"] = camera_mosaic(sample, points=points, title=title_points)
    if sample.cameras:
        ground = f"{sample.scene}   {sample.token[:8]}   flat ground and horizon as the calibration has them"
        pictures["ground.jpg"] = camera_mosaic(sample, title=ground, ground=True)
    pictures["bev.png"] = bev_picture(points, layers, title=title, rig=sample)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in pictures.items():
        paths.append(out_dir / f"{sample.scene}_{sample.token}_{name}")
        picture.save(paths[-1], quality=92)
    return paths


@cache
def font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that Pillow brings along."""
    return ImageFont.load_default(size_px)


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


def _stamp_discs(
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


def _legend_of_boxes(layers: Sequence[BoxLayer]) -> list[tuple[str, Colour]]:
    """Names of the layers, and of the classes that occur in those coloured by class."""
    entries = [(layer.name, layer.colour) for layer in layers if layer.colour]
    labels = {int(label) for layer in layers if not layer.colour for label in layer.boxes.labels}
    entries += [(CLASSES[label].replace("_", " "), class_colour(label)) for label in sorted(labels - {-1})]
    return entries + [("other", OTHER_COLOUR)] * (-1 in labels)


def _legend_of_ground() -> list[tuple[str, Colour]]:
    names = {line.name: line.distance_m for line in ground_lines(np.eye(4)) if line.name.endswith(" m")}
    return [(f"{name} on the ground", line_colour(name, radius)) for name, radius in names.items()]


def _draw_legend(
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
    _stamp_discs(canvas, pixels[order], colours.astype(np.uint8), radius_px=1.0)
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
