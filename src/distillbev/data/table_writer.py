"""Writes the thirteen tables of a nuScenes folder: the rows that never change, links, files.

Simulated worlds (`world/`) and recordings of one's own (`recording_writer.py`) are written with it; `tables.py`
reads.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

Row = dict[str, Any]
TABLES = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
    "sample_annotation", "sample_data", "scene", "sensor", "visibility",
)  # fmt: skip
CATEGORIES = (
    "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.wheelchair", "human.pedestrian.stroller",
    "human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.construction_worker",
    "animal", "vehicle.car", "vehicle.motorcycle", "vehicle.bicycle", "vehicle.bus.bendy", "vehicle.bus.rigid",
    "vehicle.truck", "vehicle.construction", "vehicle.emergency.ambulance", "vehicle.emergency.police",
    "vehicle.trailer", "movable_object.barrier", "movable_object.trafficcone", "movable_object.pushable_pullable",
    "movable_object.debris", "static_object.bicycle_rack",
)  # fmt: skip
ATTRIBUTES = (
    "vehicle.moving", "vehicle.stopped", "vehicle.parked", "cycle.with_rider", "cycle.without_rider",
    "pedestrian.sitting_lying_down", "pedestrian.standing", "pedestrian.moving",
)  # fmt: skip
VISIBILITIES = (("1", "v0-40"), ("2", "v40-60"), ("3", "v60-80"), ("4", "v80-100"))


def token(*parts: object) -> str:
    """32 hexadecimal digits that depend on the parts alone."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def category_token(name: str) -> str:
    return token("category", name)


def attribute_token(name: str) -> str:
    return token("attribute", name)


def sensor_token(channel: str) -> str:
    return token("sensor", channel)


def constant_tables(sensors: Mapping[str, Literal["camera", "lidar"]]) -> dict[str, list[Row]]:
    """Category, attribute, visibility and sensor; the sensors as channel -> modality."""
    return {
        "category": [{"token": category_token(name), "name": name, "description": ""} for name in CATEGORIES],
        "attribute": [
            {"token": attribute_token(name), "name": name, "description": ""} for name in ATTRIBUTES
        ],
        "visibility": [
            {"token": number, "level": level, "description": ""} for number, level in VISIBILITIES
        ],
        "sensor": [
            {"token": sensor_token(channel), "channel": channel, "modality": modality}
            for channel, modality in sensors.items()
        ],
    }


def link(rows: list[Row]) -> None:
    """Sets `prev` and `next` along a list in the order of time."""
    for row, before, after in zip(rows, [None, *rows], [*rows[1:], None], strict=False):
        row["prev"] = before["token"] if before else ""
        row["next"] = after["token"] if after else ""


def write_tables(
    folder: Path, constant: Mapping[str, list[Row]], scenes: Iterable[Mapping[str, list[Row]]]
) -> None:
    """Joins the rows of all scenes; the folder of tables appears whole, by one rename.

    Args:
        folder: `v1.0-*`, not yet there.
        constant: as `constant_tables` gives them.
        scenes: for each scene, its rows of the other tables.
    """
    joined: dict[str, list[Row]] = {name: list(constant.get(name, [])) for name in TABLES}
    for scene in scenes:
        for name, rows in scene.items():
            joined[name] += rows
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, rows in joined.items():
        (partial / f"{name}.json").write_text(json.dumps(rows))
    partial.replace(folder)
