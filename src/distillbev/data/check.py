"""Examines a whole dataset and lists everything that is wrong, where reading stops at the first fault."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ..errors import DataError
from ..geometry import invert_rigid, project_to_image, transform_points
from .samples import NuScenes
from .tables import (
    AnnotationRow,
    CalibratedSensorRow,
    EgoPoseRow,
    InstanceRow,
    NamedRow,
    Row,
    RowT,
    SampleDataRow,
    SampleRow,
    SceneRow,
    SensorRow,
    find_version_folder,
    read_rows,
)

Severity = Literal["error", "warning"]
ROW_TYPES: dict[str, type[Row]] = {
    "scene": SceneRow,
    "sample": SampleRow,
    "sample_data": SampleDataRow,
    "ego_pose": EgoPoseRow,
    "calibrated_sensor": CalibratedSensorRow,
    "sensor": SensorRow,
    "sample_annotation": AnnotationRow,
    "instance": InstanceRow,
    "category": NamedRow,
    "attribute": NamedRow,
}
# Table, field, the table it leads to, whether it may be empty.
LINKS = (
    ("sample", "scene_token", "scene", False),
    ("sample", "prev", "sample", True),
    ("sample", "next", "sample", True),
    ("sample_data", "sample_token", "sample", False),
    ("sample_data", "ego_pose_token", "ego_pose", False),
    ("sample_data", "calibrated_sensor_token", "calibrated_sensor", False),
    ("sample_data", "prev", "sample_data", True),
    ("calibrated_sensor", "sensor_token", "sensor", False),
    ("sample_annotation", "sample_token", "sample", False),
    ("sample_annotation", "instance_token", "instance", False),
    ("sample_annotation", "prev", "sample_annotation", True),
    ("sample_annotation", "next", "sample_annotation", True),
    ("instance", "category_token", "category", False),
)
LONGEST_SIDE_M = 50.0  # nothing on a road is longer
NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """One kind of fault: an "error" stops or spoils training, a "warning" wants a look."""

    severity: Severity
    what: str
    count: int
    examples: str


class _Findings:
    def __init__(self) -> None:
        self._found: dict[tuple[Severity, str], list[str]] = {}

    def add(self, severity: Severity, what: str, where: str) -> None:
        self._found.setdefault((severity, what), []).append(where)

    def listed(self) -> list[Finding]:
        """Errors first."""
        return [
            Finding(severity, what, len(places), ", ".join(places[:NUM_EXAMPLES]))
            for (severity, what), places in sorted(self._found.items(), key=lambda item: item[0])
        ]


def check_dataset(
    root: Path, version: str | None = None, files_per_channel: int | None = None
) -> list[Finding]:
    """Everything that is wrong with a dataset; an empty list where nothing is.

    Args:
        root: as of `NuScenes`.
        version: as of `NuScenes`.
        files_per_channel: how many files of each channel are decoded, spread over time; None for all. That files
            exist is looked up for all of them.
    """
    folder = find_version_folder(root, version)
    findings = _Findings()
    tables: dict[str, dict[str, Any]] = {}
    for name, row_type in ROW_TYPES.items():
        try:
            tables[name] = _by_token(name, read_rows(folder / f"{name}.json", row_type), findings)
        except DataError as error:
            findings.add("error", f"{name}.json cannot be read", str(error))
    if len(tables) < len(ROW_TYPES):
        return findings.listed()

    _check_links(tables, findings)
    _check_time(tables, findings)
    _check_poses(tables, findings)
    _check_boxes(tables["sample_annotation"].values(), findings)
    _check_files(folder.parent, tables, files_per_channel, findings)
    if not any(finding.severity == "error" and ": " in finding.what for finding in findings.listed()):
        _check_samples(NuScenes(folder, use_index=False), findings)
    return findings.listed()


def _by_token(table: str, rows: list[RowT], findings: _Findings) -> dict[str, RowT]:
    found: dict[str, RowT] = {}
    for row in rows:
        if row.token in found:
            findings.add("error", f"{table}: token occurs twice", row.token)
        found[row.token] = row
    return found


def _check_links(tables: dict[str, dict[str, Any]], findings: _Findings) -> None:
    for table, field, target, may_be_empty in LINKS:
        for row in tables[table].values():
            token = getattr(row, field)
            if token not in tables[target] and not (may_be_empty and not token):
                findings.add("error", f"{table}: {field} is not in {target}.json", row.token)
    for row in tables["sample_annotation"].values():
        if any(token not in tables["attribute"] for token in row.attribute_tokens):
            findings.add("error", "sample_annotation: attribute_tokens are not in attribute.json", row.token)


def _check_time(tables: dict[str, dict[str, Any]], findings: _Findings) -> None:
    samples, data, boxes = (tables[name] for name in ("sample", "sample_data", "sample_annotation"))
    for row in samples.values():
        before = samples.get(row.prev)
        if before is not None and before.timestamp >= row.timestamp:
            findings.add("error", "sample: prev is not earlier", row.token)
        if before is not None and before.scene_token != row.scene_token:
            findings.add("error", "sample: prev is of another scene", row.token)
    for row in data.values():
        before = data.get(row.prev)
        if before is not None and before.timestamp >= row.timestamp:
            findings.add("error", "sample_data: prev is not earlier", row.token)
        sample = samples.get(row.sample_token)
        if row.is_key_frame and sample is not None and abs(sample.timestamp - row.timestamp) > 500_000:
            findings.add("warning", "sample_data: key frame over 0.5 s away from its sample", row.token)
    for row in boxes.values():
        before = boxes.get(row.prev)
        if before is None:
            continue
        earlier, now = samples.get(before.sample_token), samples.get(row.sample_token)
        if before.instance_token != row.instance_token:
            findings.add("error", "sample_annotation: prev is of another instance", row.token)
        if earlier is not None and now is not None and earlier.timestamp >= now.timestamp:
            findings.add("error", "sample_annotation: prev is not earlier", row.token)


def _check_poses(tables: dict[str, dict[str, Any]], findings: _Findings) -> None:
    for table in ("ego_pose", "calibrated_sensor"):
        for row in tables[table].values():
            if not _is_unit(row.rotation):
                findings.add("error", f"{table}: rotation is no unit quaternion", row.token)
            if not all(map(math.isfinite, row.translation)):
                findings.add("error", f"{table}: translation is not finite", row.token)
    for row in tables["calibrated_sensor"].values():
        sensor = tables["sensor"].get(row.sensor_token)
        if sensor is None or sensor.modality != "camera":
            continue
        try:
            matrix = np.array(row.camera_intrinsic, dtype=np.float64).reshape(3, 3)
        except ValueError:
            findings.add("error", "calibrated_sensor: camera_intrinsic is not 3x3", row.token)
            continue
        right = np.isfinite(matrix).all() and matrix[0, 0] > 0 and matrix[1, 1] > 0
        if not (right and np.array_equal(matrix[2], [0, 0, 1])):
            findings.add("error", "calibrated_sensor: camera_intrinsic is no pinhole matrix", row.token)
        if np.abs(row.translation).max() > 10:
            findings.add("warning", "calibrated_sensor: over 10 m away from the ego origin", row.token)


def _check_boxes(rows: Iterable[AnnotationRow], findings: _Findings) -> None:
    for row in rows:
        if not all(map(math.isfinite, (*row.translation, *row.size))) or min(row.size) <= 0:
            findings.add("error", "sample_annotation: translation or size makes no box", row.token)
        elif max(row.size) > LONGEST_SIDE_M:
            findings.add("warning", f"sample_annotation: a side over {LONGEST_SIDE_M:.0f} m", row.token)
        if not _is_unit(row.rotation):
            findings.add("error", "sample_annotation: rotation is no unit quaternion", row.token)
        if row.num_lidar_pts < -1 or row.num_radar_pts < 0:  # -1: no LiDAR looked
            findings.add("error", "sample_annotation: a negative number of points", row.token)


def _check_files(
    root: Path, tables: dict[str, dict[str, Any]], files_per_channel: int | None, findings: _Findings
) -> None:
    by_channel: dict[str, list[SampleDataRow]] = {}
    modality: dict[str, str] = {}
    for row in tables["sample_data"].values():
        calibration = tables["calibrated_sensor"].get(row.calibrated_sensor_token)
        sensor = None if calibration is None else tables["sensor"].get(calibration.sensor_token)
        if sensor is None or sensor.modality not in ("camera", "lidar"):
            continue  # radar is not read
        modality[sensor.channel] = sensor.modality
        if Path(row.filename).is_absolute() or ".." in Path(row.filename).parts:
            findings.add("error", "file: its name leaves the dataset", row.filename)
        elif (root / row.filename).is_file():
            by_channel.setdefault(sensor.channel, []).append(row)
        else:
            kind = "a key frame" if row.is_key_frame else "a sweep"
            findings.add("error", f"file: {kind} of {sensor.channel} is absent", row.filename)
    for channel, rows in by_channel.items():
        count = len(rows) if files_per_channel is None else min(files_per_channel, len(rows))
        for place in np.linspace(0, len(rows) - 1, count).astype(int):
            row = rows[place]
            check = _image_fault if modality[channel] == "camera" else _points_fault
            fault = check(root / row.filename, row)
            if fault:
                findings.add("error", f"file: {fault}", row.filename)


def _image_fault(path: Path, row: SampleDataRow) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
            size = image.size
    except Exception:  # Pillow's decoders raise many types, and any of them means the same here
        return "the image cannot be decoded"
    return None if size == (row.width, row.height) else "the image has another size than its row"


def _points_fault(path: Path, row: SampleDataRow) -> str | None:
    if path.stat().st_size % 20:
        return "the LiDAR file is no whole number of points"
    points = np.fromfile(path, dtype="<f4").reshape(-1, 5)
    if len(points) == 0:
        return "the LiDAR file is empty"
    return None if np.isfinite(points[:, :4]).all() else "a LiDAR point is not finite"


def _check_samples(nuscenes: NuScenes, findings: _Findings) -> None:
    """What only joined tables show: splits, cameras, and whether boxes are where cameras look."""
    try:
        nuscenes.splits()
    except DataError as error:
        findings.add("error", "splits.json", str(error))
    channels: dict[tuple[str, ...], list[str]] = {}
    seen = inside = 0
    for token in nuscenes.sample_tokens():
        try:
            sample = nuscenes.sample(token)
        except DataError as error:
            findings.add("error", "sample cannot be read", str(error))
            continue
        channels.setdefault(tuple(camera.channel for camera in sample.cameras), []).append(token)
        if not sample.cameras or sample.annotations is None:
            continue
        annotations = sample.annotations
        hit = (annotations.num_lidar_points > 0) & (np.linalg.norm(annotations.boxes[:, :2], axis=1) < 40)
        centres = annotations.boxes[hit, :3]
        visible = np.zeros(len(centres), dtype=bool)
        for camera in sample.cameras:
            lidar2cam = invert_rigid(camera.ego2global @ camera.cam2ego) @ sample.lidar2global
            pixels, depth = project_to_image(camera.cam2img, transform_points(lidar2cam, centres))
            visible |= (depth > 0.5) & ((pixels >= 0) & (pixels < camera.size_wh_px)).all(axis=1)
        seen, inside = seen + len(centres), inside + int(visible.sum())
    usual = max(channels.values(), key=len, default=[])
    for names, tokens in channels.items():
        if tokens is not usual:
            for token in tokens:
                findings.add("warning", f"sample with other cameras: {' '.join(names) or 'none'}", token)
    num_cameras = max((len(names) for names in channels), default=0)
    if num_cameras >= 6 and seen >= 20 and inside < 0.8 * seen:
        findings.add(
            "warning", "projection: annotated objects fall on no image", f"{seen - inside} of {seen} objects"
        )


def _is_unit(rotation: Iterable[float]) -> bool:
    return abs(math.sqrt(sum(value * value for value in rotation)) - 1) < 1e-3
