"""Faults that the rows of the JSON tables show by themselves: links, times, poses, intrinsics, boxes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .findings import Findings
from .tables import (
    AnnotationRow,
    CalibratedSensorRow,
    EgoPoseRow,
    InstanceRow,
    NamedRow,
    Row,
    SampleDataRow,
    SampleRow,
    SceneRow,
    SensorRow,
    read_rows,
)

RowsByName = dict[str, dict[str, Any]]  # table -> token -> row

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
OF_ANNOTATIONS = ("instance", "category", "attribute")  # not read where nothing is annotated
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
FARTHEST_SENSOR_M = 10.0  # from the ego origin
FASTEST_CAR_M_S = 70.0
JUMP_M = 5.0  # that positioning may make besides
FARTHEST_KEY_US = 500_000  # of a key frame's recording from its sample: key frames are 0.5 s apart


def rows_by_token(folder: Path, findings: Findings) -> RowsByName | None:
    """All tables; None where one cannot be read."""
    tables: RowsByName = {}
    for name, row_type in ROW_TYPES.items():
        path = folder / f"{name}.json"
        if name in OF_ANNOTATIONS and tables.get("sample_annotation") == {} and not path.exists():
            tables[name] = {}
            continue
        try:
            rows = read_rows(path, row_type)
        except DataError as error:
            findings.add("error", f"{name}.json: cannot be read", str(error))
            continue
        found = tables[name] = {}
        for row in rows:
            if found.setdefault(row.token, row) is not row:
                findings.add("error", f"{name}: token occurs twice", row.token)
    if "sample" in tables and not tables["sample"]:
        findings.add("error", "sample: no key frames", "sample.json")
    return tables if len(tables) == len(ROW_TYPES) else None


def check_links(tables: RowsByName, findings: Findings) -> None:
    for table, field, target, may_be_empty in LINKS:
        for row in tables[table].values():
            token = getattr(row, field)
            if token not in tables[target] and not (may_be_empty and not token):
                findings.add("error", f"{table}: {field} is not in {target}.json", row.token)
    for table in ("sample", "sample_annotation"):
        for row in tables[table].values():
            after = tables[table].get(row.next)
            if after is not None and after.prev != row.token:
                findings.add("error", f"{table}: prev of next leads elsewhere", row.token)
    for row in tables["sample_annotation"].values():
        if any(token not in tables["attribute"] for token in row.attribute_tokens):
            findings.add("error", "sample_annotation: attribute_tokens are not in attribute.json", row.token)


def check_time(tables: RowsByName, findings: Findings) -> None:
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
        if before is not None and _sensor_of(tables, before) != _sensor_of(tables, row):
            findings.add("error", "sample_data: prev is of another sensor", row.token)
        sample = samples.get(row.sample_token)
        delay_us = abs(sample.timestamp - row.timestamp) if row.is_key_frame and sample is not None else 0
        if delay_us > FARTHEST_KEY_US:
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


def _sensor_of(tables: RowsByName, row: SampleDataRow) -> str | None:
    calibration = tables["calibrated_sensor"].get(row.calibrated_sensor_token)
    return None if calibration is None else calibration.sensor_token


def check_poses(tables: RowsByName, findings: Findings) -> None:
    for table in ("ego_pose", "calibrated_sensor"):
        for row in tables[table].values():
            if not _is_unit(row.rotation):
                findings.add("error", f"{table}: rotation is no unit quaternion", row.token)
            if not all(map(math.isfinite, row.translation)):
                findings.add("error", f"{table}: translation is not finite", row.token)
    for row in tables["calibrated_sensor"].values():
        if max(map(abs, row.translation)) > FARTHEST_SENSOR_M:
            findings.add("warning", "calibrated_sensor: over 10 m away from the ego origin", row.token)
    poses, data = tables["ego_pose"], tables["sample_data"]
    for row in data.values():
        before = data.get(row.prev)
        here = poses.get(row.ego_pose_token)
        there = None if before is None else poses.get(before.ego_pose_token)
        if before is None or here is None or there is None:
            continue
        seconds = 1e-6 * abs(row.timestamp - before.timestamp)
        if math.dist(here.translation, there.translation) > JUMP_M + FASTEST_CAR_M_S * seconds:
            findings.add("warning", "ego_pose: the car jumps between two recordings", row.ego_pose_token)


def check_intrinsics(tables: RowsByName, findings: Findings) -> None:
    sizes = {
        row.calibrated_sensor_token: (row.width, row.height)
        for row in tables["sample_data"].values()
        if row.width > 0 and row.height > 0
    }
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
        elif row.token in sizes:
            offset = matrix[:2, 2] / sizes[row.token] - 0.5  # in image sizes; that of nuScenes is 0.05
            if np.abs(offset).max() > 0.3:
                findings.add(
                    "warning", "calibrated_sensor: camera_intrinsic is of another image size", row.token
                )


def check_boxes(tables: RowsByName, findings: Findings) -> None:
    for row in tables["sample_annotation"].values():
        if not all(map(math.isfinite, (*row.translation, *row.size))) or min(row.size) <= 0:
            findings.add("error", "sample_annotation: translation or size makes no box", row.token)
        elif max(row.size) > LONGEST_SIDE_M:
            findings.add("warning", f"sample_annotation: a side over {LONGEST_SIDE_M:.0f} m", row.token)
        if not _is_unit(row.rotation):
            findings.add("error", "sample_annotation: rotation is no unit quaternion", row.token)
        if row.num_lidar_pts < -1 or row.num_radar_pts < 0:  # -1: no LiDAR looked
            findings.add("error", "sample_annotation: a negative number of points", row.token)


def _is_unit(rotation: Iterable[float]) -> bool:
    return abs(math.hypot(*rotation) - 1) < 1e-3
