"""Augmentation of images and of the bird's-eye view: draw, matrix, and the application of that very matrix.

Pixel coordinates are continuous (data/images.py). What was drawn stands in a small frozen dataclass; its
`matrix` is what the batch carries, and pixels, points and boxes are moved by that very matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config import Config
from ..errors import ConfigError
from ..geometry import rotation_about_z, transform_points, wrap_angle
from .images import DecodedImage

ImageFit = Literal["width", "whole"]


class ImageAugConfig(Config, frozen=True):
    """What each camera draws for itself in training; the defaults are those of the published students.

    Source: BEVDet (arXiv:2112.11790), section 3.2. The scale is network width / source width (`fitting_scale`) +
    U(resize_range); the crop has a free left edge and keeps the bottom of the image, less a share
    U(crop_bottom_range) of its height; the rotation is counter-clockwise.
    """

    resize_range: tuple[float, float] = (-0.06, 0.11)
    crop_bottom_range: tuple[float, float] = (0.0, 0.0)
    rotation_deg: tuple[float, float] = (-5.4, 5.4)
    flip_probability: float = 0.5

    def __post_init__(self) -> None:
        for name in ("resize_range", "crop_bottom_range", "rotation_deg"):
            _check_range(name, getattr(self, name))
        _check_probability("flip_probability", self.flip_probability)

    def draw(
        self,
        rng: np.random.Generator,
        source_wh_px: tuple[int, int],
        target_wh_px: tuple[int, int],
        fit: ImageFit = "width",
    ) -> ImageAugmentation:
        scale = fitting_scale(source_wh_px, target_wh_px, fit) + rng.uniform(*self.resize_range)
        _check_scale(scale, source_wh_px, target_wh_px)
        resized_w, resized_h = int(source_wh_px[0] * scale), int(source_wh_px[1] * scale)
        slack = resized_w - target_wh_px[0]
        return ImageAugmentation(
            scale=scale,
            left=int(rng.uniform(min(0, slack) if fit == "whole" else 0, max(0, slack))),
            top=int((1 - rng.uniform(*self.crop_bottom_range)) * resized_h) - target_wh_px[1],
            size_wh_px=target_wh_px,
            flip=bool(rng.random() < self.flip_probability),
            rotation_deg=float(rng.uniform(*self.rotation_deg)),
        )


@dataclass(frozen=True)
class ImageAugmentation:
    """Resize by `scale`, crop `size_wh_px` at (left, top), mirror left to right, rotate about the centre.

    The crop may reach over the resized image; what lies outside is black. The rotation is counter-clockwise
    as seen on the screen.
    """

    scale: float
    left: int
    top: int
    size_wh_px: tuple[int, int]
    flip: bool = False
    rotation_deg: float = 0.0

    @property
    def matrix(self) -> NDArray[np.float64]:
        """(4, 4): source pixels (u*d, v*d, d, 1) -> network pixels (u*d, v*d, d, 1)."""
        w, h = self.size_wh_px
        linear = self.scale * np.eye(2)
        offset = np.array([-self.left, -self.top], dtype=np.float64)
        if self.flip:
            mirror = np.diag([-1.0, 1.0])
            linear, offset = mirror @ linear, mirror @ offset + [w, 0]
        if self.rotation_deg:
            angle, centre = np.deg2rad(self.rotation_deg), np.array([w, h]) / 2
            turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            linear, offset = turn @ linear, turn @ (offset - centre) + centre
        matrix = np.eye(4)
        matrix[:2, :2] = linear
        matrix[:2, 2] = offset
        return matrix

    def apply(self, decoded: DecodedImage) -> NDArray[np.uint8]:
        """(H, W, 3) network image: the pixels moved as `matrix` says."""
        image = self._resized_crop(decoded)
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.rotation_deg:
            # To the nearest pixel, as the reference does; bilinear costs as much as all else together.
            image = image.rotate(self.rotation_deg, resample=Image.Resampling.NEAREST)
        return np.array(image)

    def _resized_crop(self, decoded: DecodedImage) -> Image.Image:
        """Resize and crop in one step: only the pixels that the crop shows are computed."""
        w, h = self.size_wh_px
        per_pixel = 1 / (self.scale * decoded.reduction)  # decoded pixels per network pixel
        # The part of the crop that the image covers, in whole network pixels.
        right = min(self.left + w, int(decoded.source_wh_px[0] * self.scale + 1e-6))
        bottom = min(self.top + h, int(decoded.source_wh_px[1] * self.scale + 1e-6))
        left, top = max(self.left, 0), max(self.top, 0)
        if right <= left or bottom <= top:
            return Image.new("RGB", (w, h))
        # The reference resizes with Pillow's bicubic; bilinear costs half and looks the same to a network.
        resample = Image.Resampling.BICUBIC if decoded.exact else Image.Resampling.BILINEAR
        box = (
            left * per_pixel,
            top * per_pixel,
            min(right * per_pixel, decoded.image.width),
            min(bottom * per_pixel, decoded.image.height),
        )
        part = decoded.image.resize((right - left, bottom - top), resample, box=box)
        if part.size == (w, h):
            return part
        canvas = Image.new("RGB", (w, h))
        canvas.paste(part, (left - self.left, top - self.top))
        return canvas


def fitting_scale(source_wh_px: tuple[int, int], target_wh_px: tuple[int, int], fit: ImageFit) -> float:
    """Network pixels per source pixel: the width fits, or the whole image does and the rest is black."""
    width, height = target_wh_px[0] / source_wh_px[0], target_wh_px[1] / source_wh_px[1]
    return width if fit == "width" else min(width, height)


def plain_image_augmentation(
    source_wh_px: tuple[int, int],
    target_wh_px: tuple[int, int],
    resize_offset: float = 0.0,
    fit: ImageFit = "width",
) -> ImageAugmentation:
    """The setting for tests: fit the image (plus an offset of the scale), centre it, keep the bottom.

    The published students test with an offset of 0.04.
    """
    scale = fitting_scale(source_wh_px, target_wh_px, fit) + resize_offset
    _check_scale(scale, source_wh_px, target_wh_px)
    resized_w, resized_h = int(source_wh_px[0] * scale + 1e-6), int(source_wh_px[1] * scale + 1e-6)
    slack = resized_w - target_wh_px[0]
    return ImageAugmentation(
        scale=scale,
        left=(slack if fit == "whole" else max(0, slack)) // 2,
        top=resized_h - target_wh_px[1],
        size_wh_px=target_wh_px,
    )


class BevAugConfig(Config, frozen=True):
    """What each sample draws for its bird's-eye view: points, boxes and camera poses move together."""

    rotation_rad: tuple[float, float] = (-0.3925, 0.3925)
    scale: tuple[float, float] = (0.95, 1.05)
    flip_x_probability: float = 0.5  # negates x
    flip_y_probability: float = 0.5  # negates y

    def __post_init__(self) -> None:
        _check_range("rotation_rad", self.rotation_rad)
        _check_range("scale", self.scale)
        if self.scale[0] <= 0:
            raise ConfigError(f"scale={self.scale} reaches zero; choose factors near 1, such as (0.95, 1.05)")
        _check_probability("flip_x_probability", self.flip_x_probability)
        _check_probability("flip_y_probability", self.flip_y_probability)

    def draw(self, rng: np.random.Generator) -> BevAugmentation:
        return BevAugmentation(
            rotation_rad=float(rng.uniform(*self.rotation_rad)),
            scale=float(rng.uniform(*self.scale)),
            flip_x=bool(rng.random() < self.flip_x_probability),
            flip_y=bool(rng.random() < self.flip_y_probability),
        )


@dataclass(frozen=True)
class BevAugmentation:
    """Rotate about z (counter-clockwise seen from above), scale all axes, then negate x and y where asked."""

    rotation_rad: float = 0.0
    scale: float = 1.0
    flip_x: bool = False
    flip_y: bool = False

    @property
    def matrix(self) -> NDArray[np.float64]:
        """(4, 4): physical -> augmented LiDAR frame. Not rigid: it scales, and a flip mirrors."""
        flips = np.diag([-1.0 if self.flip_x else 1.0, -1.0 if self.flip_y else 1.0, 1.0])
        matrix = np.eye(4)
        matrix[:3, :3] = flips @ (self.scale * rotation_about_z(self.rotation_rad))
        return matrix


def augment_boxes(bev_aug: NDArray[np.float64], boxes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Boxes (n, 9) as BOX_FIELDS through a (4, 4) `BevAugmentation.matrix`; NaN stays NaN."""
    boxes = np.array(boxes, dtype=np.float64)
    scale = np.linalg.norm(bev_aug[:3, 0])
    boxes[:, :3] = transform_points(bev_aug, boxes[:, :3])
    boxes[:, 3:6] *= scale
    heading = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], axis=-1) @ bev_aug[:2, :2].T
    boxes[:, 6] = wrap_angle(np.arctan2(heading[:, 1], heading[:, 0]))
    boxes[:, 7:9] = boxes[:, 7:9] @ bev_aug[:2, :2].T
    return boxes


def augment_points(bev_aug: NDArray[np.float64], points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Points (P, >=3) through a (4, 4) matrix: a copy with x, y, z moved, the other columns as they are."""
    matrix = bev_aug.astype(np.float32)
    moved = np.empty_like(points)
    for start in range(0, len(points), 8192):  # what is made on the way stays small and in the cache
        rows = slice(start, start + 8192)
        moved[rows] = points[rows]
        moved[rows, :3] = points[rows, :3] @ matrix[:3, :3].T + matrix[:3, 3]
    return moved


def _check_range(name: str, limits: tuple[float, float]) -> None:
    if not (np.isfinite(limits).all() and limits[0] <= limits[1]):
        raise ConfigError(f"{name}={limits} is not a range; give (low, high) with low <= high")


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}={value} is not a probability; choose a number from 0 to 1")


def _check_scale(scale: float, source_wh_px: tuple[int, int], target_wh_px: tuple[int, int]) -> None:
    if scale <= 0:
        raise ConfigError(
            f"images of {source_wh_px[0]}x{source_wh_px[1]} would be scaled by {scale:.3f} to fit "
            f"{target_wh_px[0]}x{target_wh_px[1]}; choose a resize above -{target_wh_px[0]}/{source_wh_px[0]}"
        )
