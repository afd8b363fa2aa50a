"""Faults that need the recordings, or tables joined to key frames: files, cameras, boxes on pixels and points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..geometry import invert_rigid, project_to_image, transform_points
from .files import stays_inside
from .findings import Findings
from .images import has_hidden_damage, load_image
from .points import count_points_in_boxes, read_sweep
from .samples import NuScenes
from .schema import Annotations, CameraFrame, LidarSweep, Sample
from .tables import SampleDataRow

MOST_SWEEPS = 9  # before the key sweep, that recipes join
SEEN_WITHIN_M = 40.0  # an object with LiDAR points on it this near should be on some image
FEWEST_OBJECTS = 20  # that a share of objects is computed from
FEWEST_POINTS = 5  # of a box, for the lack of any to mean something


def check_files(
    root: Path, tables: dict[str, dict[str, Any]], files_per_channel: int | None, findings: Findings
) -> None:
    """Whether all files are there, and whether some of each channel (all where None) can be decoded."""
    by_channel: dict[tuple[str, str], list[SampleDataRow]] = {}
    for row in tables["sample_data"].values():
        calibration = tables["calibrated_sensor"].get(row.calibrated_sensor_token)
        sensor = None if calibration is None else tables["sensor"].get(calibration.sensor_token)
        if sensor is None or sensor.modality not in ("camera", "lidar"):
            continue  # radar is not read
        if not stays_inside(row.filename):
            findings.add("error", "file: its name leaves the dataset", repr(row.filename))
        elif (root / row.filename).is_file():
            by_channel.setdefault((sensor.modality, sensor.channel), []).append(row)
        else:
            kind = "a key frame" if row.is_key_frame else "a sweep"
            findings.add("error", f"file: {kind} of {sensor.channel} is absent", row.filename)
    for (modality, channel), rows in by_channel.items():
        rows.sort(key=lambda row: row.timestamp)
        for place in _spread(len(rows), files_per_channel):
            try:
                _read(root, rows[place], modality, channel)
            except DataError as error:
                what = "an image" if modality == "camera" else "LiDAR points"
                findings.add("error", f"file: {what} of {channel} cannot be used", str(error))
            else:
                if modality == "camera" and has_hidden_damage(root / rows[place].filename):
                    findings.add("warning", "file: an image is damaged, yet decodes", rows[place].filename)


def _read(root: Path, row: SampleDataRow, modality: str, channel: str) -> None:
    """Reads a recording as training does."""
    path, nowhere = root / row.filename, np.eye(4)
    if modality == "camera":
        size_wh_px = (row.width, row.height)
        load_image(CameraFrame(channel, path, row.timestamp, size_wh_px, nowhere, nowhere, nowhere))
    else:
        read_sweep(LidarSweep(path, row.timestamp, nowhere, nowhere))


def _spread(count: int, most: int | None) -> list[int]:
    """Numbers below `count`, at most so many of them, evenly spread."""
    chosen = count if most is None else min(most, count)
    return np.linspace(0, count - 1, chosen).astype(int).tolist()


def check_frames(nuscenes: NuScenes, findings: Findings) -> None:
    """Whether every key frame can be read and has the usual cameras, and annotated objects are where these look."""
    tokens_of_rig: dict[tuple[str, ...], list[str]] = {}
    num_objects = num_seen = 0
    seen_by: dict[str, int] = {}
    for token in nuscenes.sample_tokens():
        try:
            sample = nuscenes.sample(token, MOST_SWEEPS)
        except DataError as error:
            findings.add("error", "sample: cannot be read", str(error))
            continue
        tokens_of_rig.setdefault(tuple(camera.channel for camera in sample.cameras), []).append(token)
        if sample.annotations is None:
            continue
        centres = _near_centres(sample.annotations)
        seen = np.zeros(len(centres), dtype=bool)
        for camera in sample.cameras:
            in_image = _is_in_image(camera, sample, centres)
            seen_by[camera.channel] = seen_by.get(camera.channel, 0) + int(in_image.sum())
            seen |= in_image
        num_objects, num_seen = num_objects + len(centres), num_seen + int(seen.sum())
    usual = max(tokens_of_rig.values(), key=len, default=[])
    for names, tokens in tokens_of_rig.items():
        if tokens is not usual:
            for token in tokens:
                findings.add("warning", f"sample: with other cameras ({' '.join(names) or 'none'})", token)

    # Six cameras look all around, so that hardly an object is on none.
    if len(seen_by) >= 6 and num_objects >= FEWEST_OBJECTS and num_seen < 0.8 * num_objects:
        share = f"{num_objects - num_seen} of {num_objects} objects"
        findings.add("warning", "projection: annotated objects fall on no image", share)
    for channel, count in seen_by.items():
        if count == 0 and num_seen >= FEWEST_OBJECTS * len(seen_by):
            findings.add("warning", "projection: no annotated object falls on a camera", channel)


def _near_centres(annotations: Annotations) -> NDArray[np.float64]:
    """Centres (n, 3) in the LiDAR frame of the objects that are near and that the LiDAR saw."""
    near = np.linalg.norm(annotations.boxes[:, :2], axis=1) < SEEN_WITHIN_M
    return annotations.boxes[near & (annotations.num_lidar_points > 0), :3]


def _is_in_image(camera: CameraFrame, sample: Sample, centres: NDArray[np.float64]) -> NDArray[np.bool_]:
    lidar2cam = invert_rigid(camera.ego2global @ camera.cam2ego) @ sample.lidar2global
    pixels, depth = project_to_image(camera.cam2img, transform_points(lidar2cam, centres))
    return (depth > 0.5) & ((pixels >= 0) & (pixels < camera.size_wh_px)).all(axis=1)


def check_points_in_boxes(nuscenes: NuScenes, num_frames: int, findings: Findings) -> None:
    """Whether boxes of some key frames hold LiDAR points where the tables say so; faulty files are passed over."""
    tokens = nuscenes.sample_tokens()
    num_objects = num_empty = 0
    for place in _spread(len(tokens), num_frames):
        try:
            sample = nuscenes.sample(tokens[place])
            if sample.annotations is None or not sample.sweeps:
                continue
            points = read_sweep(sample.sweeps[0])
            box2global, size_lwh_m = nuscenes.annotation_poses(tokens[place])
        except DataError:
            continue
        hit = sample.annotations.num_lidar_points >= FEWEST_POINTS
        box2lidar = invert_rigid(sample.lidar2global) @ box2global[hit]
        num_objects += int(hit.sum())
        num_empty += int((count_points_in_boxes(points, box2lidar, size_lwh_m[hit]) == 0).sum())
    if num_objects >= FEWEST_OBJECTS and num_empty > 0.2 * num_objects:
        share = f"{num_empty} of {num_objects} objects"
        findings.add("warning", "points: boxes hold none where the tables count some", share)
