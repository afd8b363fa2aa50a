"""Recordings of one's own (`recordings.py`), written as a nuScenes dataset."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError
from ..geometry import invert_rigid, pose_matrix, rotation_to_quaternion, transform_points
from .images import FORMATS
from .points import count_points_in_boxes
from .recordings import (
    KeyFrame,
    LabelledObject,
    RigCamera,
    Scene,
    Shot,
    category_of,
    check_camera,
    check_name,
    microseconds,
    rigid,
)
from .samples import LIDAR_CHANNEL, NOMINAL_LIDAR2EGO
from .table_writer import (
    Row,
    attribute_token,
    category_token,
    constant_tables,
    link,
    sensor_token,
    token,
    write_tables,
)

UNKNOWN_POINTS = -1  # of a box that no LiDAR looked at; the devkit has the same mark
JPEG_QUALITY = 95


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
        check_name("scene", scene.name)
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
            check_camera(self.where, camera)
        lidar2ego = scene.rig.lidar2ego
        if lidar2ego is None:
            self.reference2ego, self.turn = NOMINAL_LIDAR2EGO, None
        else:
            lidar2ego = rigid(f"{self.where}, lidar2ego", lidar2ego)
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
        us = microseconds(where, frame.timestamp_us)
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
        if not frame.images and frame.points is None:
            raise DataError(f"{where}: no image and no points; leave it out")
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
        us = microseconds(where, shot.timestamp_us)
        if abs(us - key_us) > (1_000_000 if is_key else 10_000_000):
            raise DataError(
                f"{where}: recorded at {us} us, its key frame at {key_us} us; both are microseconds of one clock"
            )
        ego2global = rigid(f"{where}, ego2global", shot.ego2global)
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
            category = category_of(f"{where}, object {thing.instance!r}", thing, ego2global)
            known = self.categories.setdefault(thing.instance, category)
            if known != category:
                raise DataError(
                    f"{where}, object {thing.instance!r}: {category}, in an earlier key frame {known}"
                )
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


def _pose_fields(a2b: NDArray[np.float64]) -> Row:
    matrix = np.asarray(a2b, dtype=np.float64)
    return {
        "translation": matrix[:3, 3].tolist(),
        "rotation": rotation_to_quaternion(matrix[:3, :3]).tolist(),
    }
