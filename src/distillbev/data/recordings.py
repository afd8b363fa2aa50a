"""What a recording of one's own consists of: any cameras of any sizes, any LiDAR or none; and its checks.

Frames (docs/frames.md): ego x forward, y left, z up, on the ground; camera x right, y down, z forward; global any
level frame that stands still, z up. Matrices are 4x4 `a2b`, lengths metres, times microseconds.
`recording_writer.py` makes a dataset of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..classes import CATEGORY_TO_CLASS, CLASSES
from ..errors import DataError
from .samples import LIDAR_CHANNEL
from .table_writer import ATTRIBUTES, CATEGORIES

log = logging.getLogger(__name__)

FARTHEST_OBJECT_M = 300.0
# A class name stands for its most usual category.
CATEGORY_OF_CLASS = {name: category for category, name in reversed(CATEGORY_TO_CLASS.items())} | {
    "bus": "vehicle.bus.rigid"
}


@dataclass(frozen=True)
class RigCamera:
    """A pinhole camera; rectify distorted images first.

    `cam2img` (3, 3) takes the camera frame to pixels of an image of `size_wh_px`; `cam2ego` (4, 4) says where the
    camera sits.
    """

    channel: str
    size_wh_px: tuple[int, int]
    cam2img: NDArray[np.float64]
    cam2ego: NDArray[np.float64]


@dataclass(frozen=True)
class Rig:
    """The sensors of a car.

    `lidar2ego` (4, 4) has any axes: points are written level, x right and y forward of the car, with the LiDAR's
    place as origin, which is the frame of BEV maps and detections. Without a LiDAR give the place that a LiDAR had
    in training, if it had one; None takes that of nuScenes' cars.
    """

    cameras: tuple[RigCamera, ...]
    lidar2ego: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Shot:
    """What one sensor recorded at one time, and the pose of the car at that very time.

    `content` is, of a camera, an image file or (H, W, 3) uint8 RGB; of a LiDAR (P, 3 to 5) numbers in its own frame:
    x, y, z (m), intensity (0 to 255), ring.
    """

    timestamp_us: int
    ego2global: NDArray[np.float64]
    content: Path | NDArray


@dataclass(frozen=True)
class LabelledObject:
    """One object in one key frame.

    Attributes:
        instance: its name, the same in all key frames of the scene; velocities come from it.
        category: one of the ten classes, or a category of nuScenes.
        box2global: (4, 4), origin at the middle of the box, x along its length to the front, z up.
        size_lwh_m: length, width, height.
        attribute: of nuScenes, such as "vehicle.parked".
        visibility: 1 (up to 40 % visible) to 4 (80 % and more), 0 unknown.
        num_lidar_points: inside the box; None counts them where the key frame has points.
    """

    instance: str
    category: str
    box2global: NDArray[np.float64]
    size_lwh_m: tuple[float, float, float]
    attribute: str | None = None
    visibility: int = 0
    num_lidar_points: int | None = None


@dataclass(frozen=True)
class KeyFrame:
    """A moment to train on or to detect in: one image of every camera, by channel, and what is labelled.

    `points` are those of the moment, `sweeps` the LiDAR's turns since the key frame before.
    """

    timestamp_us: int
    images: Mapping[str, Shot]
    points: Shot | None = None
    sweeps: Sequence[Shot] = ()
    objects: Sequence[LabelledObject] = ()


@dataclass(frozen=True)
class Scene:
    """Key frames of one drive in the order of time; they may come from a generator."""

    name: str
    split: str
    rig: Rig
    key_frames: Iterable[KeyFrame]


def check_camera(where: str, camera: RigCamera) -> None:
    """Refuses what is no pinhole camera at all, and warns of what is unlikely.

    Raises (as all checks here):
        DataError: says where, what was found and what was expected.
    """
    check_name("camera", camera.channel)
    where = f"{where}, {camera.channel}"
    if camera.channel == LIDAR_CHANNEL:
        raise DataError(f"{where}: this is the LiDAR's name; choose another for the camera")
    if len(camera.size_wh_px) != 2 or not all(
        isinstance(side, int) and side > 0 for side in camera.size_wh_px
    ):
        raise DataError(f"{where}: size_wh_px {camera.size_wh_px}; expected width and height in pixels")
    matrix = np.asarray(camera.cam2img, dtype=np.float64)
    pinhole = matrix.shape == (3, 3) and np.isfinite(matrix).all() and np.array_equal(matrix[2], [0, 0, 1])
    if not (pinhole and min(matrix[0, 0], matrix[1, 1]) > 0):
        raise DataError(
            f"{where}: cam2img {matrix.tolist()}; expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels"
        )
    cam2ego = rigid(f"{where}, cam2ego", camera.cam2ego)
    if cam2ego[2, 1] > -0.3:
        log.warning(
            "%s: the image's lower edge does not point down; if the camera is upright, cam2ego is wrong (ego2cam "
            "given, or camera axes that are not x right, y down, z forward)",
            where,
        )


def check_name(what: str, name: str) -> None:
    """Refuses a name that cannot be part of file names everywhere."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise DataError(f"{what} {name!r}: it names files; expected letters, digits, '_', '-' and '.'")


def microseconds(where: str, timestamp_us: int) -> int:
    """The time stamp, once it is a whole number."""
    if not isinstance(timestamp_us, (int, np.integer)) or timestamp_us < 0:
        raise DataError(f"{where}: timestamp_us {timestamp_us!r}; expected a whole number of microseconds")
    return int(timestamp_us)


def rigid(where: str, a2b: NDArray[np.float64]) -> NDArray[np.float64]:
    """(4, 4) float64, once it is a rotation and a translation."""
    matrix = np.asarray(a2b, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or not np.array_equal(matrix[3], [0, 0, 0, 1]):
        raise DataError(f"{where}: {matrix.tolist()}; expected a finite 4x4 matrix with last row 0, 0, 0, 1")
    rotation = matrix[:3, :3]
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-4 or np.linalg.det(rotation) < 0:
        raise DataError(
            f"{where}: {rotation.tolist()} is no rotation (its columns are the axes of the first frame, right-handed "
            "and of length 1); mend the matrix"
        )
    return matrix


def category_of(where: str, thing: LabelledObject, ego2global: NDArray[np.float64]) -> str:
    """The nuScenes category of an object, once everything about it makes sense."""
    category = CATEGORY_OF_CLASS.get(thing.category, thing.category)
    if category not in CATEGORIES:
        raise DataError(
            f"{where}: category {thing.category!r}; expected one of {', '.join(CLASSES)}, or a category of "
            "nuScenes; leave other objects out"
        )
    box2global = rigid(f"{where}, box2global", thing.box2global)
    size = thing.size_lwh_m
    if np.shape(size) != (3,) or not np.isfinite(size).all() or min(size) <= 0:
        raise DataError(f"{where}: size_lwh_m {size}; expected three lengths above zero")
    distance = float(np.linalg.norm(box2global[:3, 3] - np.asarray(ego2global)[:3, 3]))
    if distance > FARTHEST_OBJECT_M:
        raise DataError(
            f"{where} is {distance:.0f} m away from the car; box2global ends in the global frame, as in "
            "ego2global @ box2ego"
        )
    if thing.attribute is not None and thing.attribute not in ATTRIBUTES:
        raise DataError(f"{where}: attribute {thing.attribute!r}; expected one of {', '.join(ATTRIBUTES)}")
    if thing.visibility not in range(5):
        raise DataError(f"{where}: visibility {thing.visibility}; expected 0 (unknown) to 4 (80-100 %)")
    return category
