"""The thirteen tables of a nuScenes folder: the rows that never change, and how scenes' rows are joined."""

from __future__ import annotations

import hashlib
from typing import Any

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


def constant_tables(channels: tuple[str, ...]) -> dict[str, list[Row]]:
    """Category, attribute, visibility and sensor."""
    return {
        "category": [{"token": category_token(name), "name": name, "description": ""} for name in CATEGORIES],
        "attribute": [
            {"token": attribute_token(name), "name": name, "description": ""} for name in ATTRIBUTES
        ],
        "visibility": [
            {"token": number, "level": level, "description": ""} for number, level in VISIBILITIES
        ],
        "sensor": [
            {
                "token": sensor_token(name),
                "channel": name,
                "modality": "lidar" if "LIDAR" in name else "camera",
            }
            for name in channels
        ],
    }


def link(rows: list[Row]) -> None:
    """Sets `prev` and `next` along a list in the order of time."""
    for row, before, after in zip(rows, [None, *rows[:-1]], [*rows[1:], None], strict=True):
        row["prev"] = before["token"] if before else ""
        row["next"] = after["token"] if after else ""
