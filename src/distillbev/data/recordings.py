"""Recordings of one's own, written as a nuScenes dataset: any cameras of any sizes, any LiDAR or none.

Frames (docs/frames.md): ego x forward, y left, z up, on the ground; camera x right, y down, z forward; global any
level frame that stands still, z up. Matrices are 4x4 `a2b`, lengths metres, times microseconds.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..classes import CATEGORY_TO_CLASS, CLASSES
from ..errors import DataError
from ..geometry import invert_rigid, pose_matrix, rotation_to_quaternion, transform_points
from .images import FORMATS
from .points import count_points_in_boxes
from .samples import LIDAR_CHANNEL, NOMINAL_LIDAR2EGO
from .table_writer import (
    ATTRIBUTES,
    CATEGORIES,
    Row,
    attribute_token,
    category_token,
    constant_tables,
    link,
    sensor_token,
    token,
    write_tables,
)

log = logging.getLogger(__name__)

UNKNOWN_POINTS = -1  # of a box that no LiDAR looked at; the devkit has the same mark
JPEG_QUALITY = 95
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


def write_dataset(root: Path | str, scenes: Iterable[Scene], version: str = "v1.0-rig") -> Path:
    """Writes scenes as a nuScenes dataset with all thirteen tables and splits.json; returns its folder.

    Image files are linked where the file system can do that, else copied. The folder appears whole or not at all.

    Args:
        root: new or empty folder.
        scenes: taken one after the other, a key frame at a time.
        version: name of the table folder.

    Raises:
        DataError: the folder is in use, or a scene is not as `Scene` and its parts say; names scene and key frame.
    """
    root = Path(root).resolve()
    if root.is_mount() or (root.exists() and (not root.is_dir() or any(root.iterdir()))):
        raise DataError(f"{root} is in use; choose a new or empty folder")
    partial = root.with_name(f".{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_all(partial, scenes, version)
        partial.replace(root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return root


def _write_all(root: Path, scenes: Iterable[Scene], version: str) -> None:
    (root / "maps").mkdir(parents=True)
    Image.new("L", (1, 1)).save(root / "maps" / "none.png")  # the devkit opens a map for every log
    splits: dict[str, list[str]] = {}
    cameras: dict[str, Literal["camera"]] = {}  # in the order of first mention
    rows = []
    for scene in scenes:
        _check_name("scene", scene.name)
        if any(scene.name in names for names in splits.values()):
            raise DataError(f"scene {scene.name!r} comes twice; give each its own name")
        splits.setdefault(scene.split, []).append(scene.name)
        cameras |= {camera.channel: "camera" for camera in scene.rig.cameras}
        rows.append(_SceneWriter(root, scene).rows())
    if not rows:
        raise DataError("no scene to write, expected at least one")
    constant = constant_tables({**cameras, LIDAR_CHANNEL: "lidar"})
    constant["log"] = [
        {"token": "log", "logfile": "rig", "vehicle": "rig", "date_captured": "", "location": "unknown"}
    ]
    constant["map"] = [
        {"token": "map", "log_tokens": ["log"], "category": "semantic_prior", "filename": "maps/none.png"}
    ]
    write_tables(root / version, constant, rows)
    (root / "splits.json").write_text(json.dumps(splits, indent=1))


class _SceneWriter:
    """Files and rows of one scene."""

    def __init__(self, root: Path, scene: Scene) -> None:
        self.root, self.scene = root, scene
        self.where = f"scene {scene.name!r}"
        self.cameras = {camera.channel: camera for camera in scene.rig.cameras}
        if len(self.cameras) < len(scene.rig.cameras):
            raise DataError(f"{self.where}: two cameras of one channel; name each its own")
        for camera in scene.rig.cameras:
            _check_camera(self.where, camera)
        lidar2ego = scene.rig.lidar2ego
        if lidar2ego is None:
            self.reference2ego, self.turn = NOMINAL_LIDAR2EGO, None
        else:
            lidar2ego = _rigid(f"{self.where}, lidar2ego", lidar2ego)
            self.reference2ego = pose_matrix(lidar2ego[:3, 3], NOMINAL_LIDAR2EGO[:3, :3])
            self.turn = invert_rigid(self.reference2ego) @ lidar2ego
        self.tables: dict[str, list[Row]] = {"sample": [], "ego_pose": [], "sample_annotation": []}
        self.data: dict[str, list[Row]] = {channel: [] for channel in (*self.cameras, LIDAR_CHANNEL)}
        self.annotations: dict[str, list[Row]] = {}
        self.categories: dict[str, str] = {}

    def rows(self) -> dict[str, list[Row]]:
        """Writes the files; returns the scene's rows by table."""
        name, tables = self.scene.name, self.tables
        for number, frame in enumerate(self.scene.key_frames):
            self._add_key_frame(number, frame)
        samples = tables["sample"]
        if not samples:
            raise DataError(f"{self.where} has no key frame, expected at least one")
        link(samples)
        for channel, recorded in self.data.items():
            for before, after in pairwise(recorded):
                if after["timestamp"] <= before["timestamp"]:
                    raise DataError(
                        f"{self.where}, {channel}: {after['timestamp']} us comes after {before['timestamp']} us; "
                        "give recordings in the order of time, sweeps before their key frame's points"
                    )
            link(recorded)
        for of_instance in self.annotations.values():
            link(of_instance)
        return tables | {
            "scene": [{
                "token": token(name), "name": name, "log_token": "log", "nbr_samples": len(samples),
                "first_sample_token": samples[0]["token"], "last_sample_token": samples[-1]["token"],
                "description": "",
            }],
            "sample_data": [row for recorded in self.data.values() for row in recorded],
            "calibrated_sensor": list(self._calibrations()),
            "sample_annotation": [row for rows in self.annotations.values() for row in rows],
            "instance": [
                {
                    "token": rows[0]["instance_token"],
                    "category_token": category_token(self.categories[instance]),
                    "nbr_annotations": len(rows),
                    "first_annotation_token": rows[0]["token"],
                    "last_annotation_token": rows[-1]["token"],
                }
                for instance, rows in self.annotations.items()
            ],
        }  # fmt: skip

    def _token(self, *parts: object) -> str:
        return token(self.scene.name, *parts)

    def _calibrations(self) -> Iterator[Row]:
        """The LiDAR's too where it recorded nothing: its place is the frame of the detections."""
        mounts = {channel: (camera.cam2ego, camera.cam2img) for channel, camera in self.cameras.items()}
        for channel, (sensor2ego, cam2img) in (mounts | {LIDAR_CHANNEL: (self.reference2ego, None)}).items():
            yield {
                "token": self._token("calibration", channel),
                "sensor_token": sensor_token(channel),
                **_pose_fields(sensor2ego),
                "camera_intrinsic": [] if cam2img is None else np.asarray(cam2img, dtype=float).tolist(),
            }

    def _add_key_frame(self, number: int, frame: KeyFrame) -> None:
        where = f"{self.where}, key frame {number}"
        sample = self._token("sample", number)
        us = _microseconds(where, frame.timestamp_us)
        samples = self.tables["sample"]
        if samples and us - samples[-1]["timestamp"] < 1000:
            raise DataError(
                f"{where} is {us - samples[-1]['timestamp']} us after the one before; key frames come in the order "
                "of time, in microseconds"
            )
        samples.append({"token": sample, "timestamp": us, "scene_token": token(self.scene.name)})
        if frame.images.keys() != self.cameras.keys():
            raise DataError(
                f"{where}: images of {', '.join(frame.images) or 'no camera'}, the rig has "
                f"{', '.join(self.cameras) or 'none'}; give one of each"
            )
        for channel, shot in frame.images.items():
            self._add_shot(f"{where}, {channel}", sample, us, channel, shot, is_key=True)
        points: NDArray[np.float32] | None = None
        for shot in frame.sweeps:
            self._add_shot(f"{where}, sweep", sample, us, LIDAR_CHANNEL, shot, is_key=False)
        if frame.points is not None:
            points = self._add_shot(f"{where}, points", sample, us, LIDAR_CHANNEL, frame.points, is_key=True)
        if frame.objects:
            reference = frame.points or min(
                frame.images.values(), key=lambda shot: abs(shot.timestamp_us - us)
            )
            self._add_objects(where, number, frame.objects, reference.ego2global, points)

    def _add_shot(
        self, where: str, sample: str, key_us: int, channel: str, shot: Shot, is_key: bool
    ) -> NDArray[np.float32] | None:
        """Writes the file and the rows of one recording; returns the points as written, if it has points."""
        us = _microseconds(where, shot.timestamp_us)
        if abs(us - key_us) > (1_000_000 if is_key else 10_000_000):
            raise DataError(
                f"{where}: recorded at {us} us, its key frame at {key_us} us; both are microseconds of one clock"
            )
        ego2global = _rigid(f"{where}, ego2global", shot.ego2global)
        camera = self.cameras.get(channel)
        stem = f"{'samples' if is_key else 'sweeps'}/{channel}/{self.scene.name}__{channel}__{us}"
        (self.root / stem).parent.mkdir(parents=True, exist_ok=True)
        points = None
        if camera is None:
            file = f"{stem}.pcd.bin"
            points = self._level_points(where, shot.content)
            points.tofile(self.root / file)
        else:
            file = _write_image(where, shot.content, camera, self.root, stem)
        width, height = (0, 0) if camera is None else camera.size_wh_px
        data = self._token("data", channel, us)
        self.tables["ego_pose"].append({"token": data, "timestamp": us, **_pose_fields(ego2global)})
        self.data[channel].append({
            "token": data, "sample_token": sample, "ego_pose_token": data, "timestamp": us,
            "calibrated_sensor_token": self._token("calibration", channel),
            "fileformat": "pcd" if camera is None else Path(file).suffix[1:],
            "is_key_frame": is_key, "width": width, "height": height, "filename": file,
        })  # fmt: skip
        return points

    def _level_points(self, where: str, content: Path | NDArray) -> NDArray[np.float32]:
        """(P, 5) float32 in the frame that is written; absent intensities and rings are 0."""
        if self.turn is None:
            raise DataError(f"{where}: points, but the rig has no LiDAR; give the rig's lidar2ego")
        found = np.asarray(content) if not isinstance(content, Path) else None
        if found is None or found.ndim != 2 or not 3 <= found.shape[1] <= 5 or len(found) == 0:
            shape = content if found is None else found.shape
            raise DataError(f"{where}: {shape}; expected an array (P, 3 to 5) of x, y, z, intensity, ring")
        if not np.isfinite(found).all():
            row = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])
            raise DataError(f"{where}: point {row} is {found[row].tolist()}; drop points without a return")
        points = np.zeros((len(found), 5), dtype="<f4")
        points[:, : found.shape[1]] = found
        points[:, :3] = transform_points(self.turn, found[:, :3].astype(np.float64))
        return points

    def _add_objects(
        self,
        where: str,
        number: int,
        objects: Sequence[LabelledObject],
        ego2global: NDArray[np.float64],
        points: NDArray[np.float32] | None,
    ) -> None:
        for thing in objects:
            self._check_object(f"{where}, object {thing.instance!r}", thing, ego2global)
        box2global = np.array([thing.box2global for thing in objects], dtype=np.float64)
        sizes = np.array([thing.size_lwh_m for thing in objects], dtype=np.float64)
        counts = np.full(len(objects), UNKNOWN_POINTS)
        if points is not None:
            global2reference = invert_rigid(ego2global @ self.reference2ego)
            counts = count_points_in_boxes(points, global2reference @ box2global, sizes)
        for thing, counted in zip(objects, counts.tolist(), strict=True):
            annotations = self.annotations.setdefault(thing.instance, [])
            sample = self.tables["sample"][number]["token"]
            if annotations and annotations[-1]["sample_token"] == sample:
                raise DataError(f"{where}: object {thing.instance!r} comes twice; name each object its own")
            length, width, height = map(float, thing.size_lwh_m)
            annotations.append({
                "token": self._token("annotation", number, thing.instance), "sample_token": sample,
                "instance_token": self._token("instance", thing.instance),
                "visibility_token": str(thing.visibility) if thing.visibility else "",
                "attribute_tokens": [attribute_token(thing.attribute)] if thing.attribute else [],
                **_pose_fields(thing.box2global), "size": [width, length, height],
                "num_lidar_pts": counted if thing.num_lidar_points is None else thing.num_lidar_points,
                "num_radar_pts": 0,
            })  # fmt: skip

    def _check_object(self, where: str, thing: LabelledObject, ego2global: NDArray[np.float64]) -> None:
        category = CATEGORY_OF_CLASS.get(thing.category, thing.category)
        if category not in CATEGORIES:
            raise DataError(
                f"{where}: category {thing.category!r}; expected one of {', '.join(CLASSES)}, or a category of "
                "nuScenes; leave other objects out"
            )
        if self.categories.setdefault(thing.instance, category) != category:
            raise DataError(f"{where}: {category}, in an earlier key frame {self.categories[thing.instance]}")
        box2global = _rigid(f"{where}, box2global", thing.box2global)
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
            raise DataError(
                f"{where}: attribute {thing.attribute!r}; expected one of {', '.join(ATTRIBUTES)}"
            )
        if thing.visibility not in range(5):
            raise DataError(f"{where}: visibility {thing.visibility}; expected 0 (unknown) to 4 (80-100 %)")


def _write_image(where: str, content: Path | NDArray, camera: RigCamera, root: Path, stem: str) -> str:
    """Returns the name of the file below the root."""
    expected = f"{camera.size_wh_px[0]}x{camera.size_wh_px[1]} as the rig says"
    if isinstance(content, Path):
        try:
            with Image.open(content, formats=FORMATS) as image:
                size = image.size
        except OSError as error:
            raise DataError(
                f"{where}: {content} cannot be read as an image ({error}); give another file"
            ) from None
        if size != tuple(camera.size_wh_px):
            raise DataError(f"{where}: {content} is {size[0]}x{size[1]} pixels, expected {expected}")
        file = f"{stem}{content.suffix.lower()}"
        try:
            os.link(content.resolve(), root / file)
        except OSError:
            shutil.copyfile(content, root / file)
        return file
    width, height = camera.size_wh_px
    if content.shape != (height, width, 3) or content.dtype != np.uint8:
        raise DataError(
            f"{where}: an array {content.shape} of {content.dtype}, expected ({height}, {width}, 3) of uint8, "
            f"{expected}"
        )
    Image.fromarray(content).save(root / f"{stem}.jpg", quality=JPEG_QUALITY)
    return f"{stem}.jpg"


def _check_camera(where: str, camera: RigCamera) -> None:
    _check_name("camera", camera.channel)
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
    cam2ego = _rigid(f"{where}, cam2ego", camera.cam2ego)
    if cam2ego[2, 1] > -0.3:
        log.warning(
            "%s: the image's lower edge does not point down; if the camera is upright, cam2ego is wrong (ego2cam "
            "given, or camera axes that are not x right, y down, z forward)",
            where,
        )


def _check_name(what: str, name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise DataError(f"{what} {name!r}: it names files; expected letters, digits, '_', '-' and '.'")


def _microseconds(where: str, timestamp_us: int) -> int:
    if not isinstance(timestamp_us, (int, np.integer)) or timestamp_us < 0:
        raise DataError(f"{where}: timestamp_us {timestamp_us!r}; expected a whole number of microseconds")
    return int(timestamp_us)


def _rigid(where: str, a2b: NDArray[np.float64]) -> NDArray[np.float64]:
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


def _pose_fields(a2b: NDArray[np.float64]) -> Row:
    matrix = np.asarray(a2b, dtype=np.float64)
    return {
        "translation": matrix[:3, 3].tolist(),
        "rotation": rotation_to_quaternion(matrix[:3, :3]).tolist(),
    }
