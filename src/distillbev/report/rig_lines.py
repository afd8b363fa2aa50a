"""Lines that show where a rig's cameras are and look, known from the calibration alone: no LiDAR, no labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data.schema import CameraFrame, Sample
from ..geometry import invert_rigid, transform_points

RINGS_M = (5, 10, 20, 40)
HORIZON_M = 20_000.0  # flat ground ends here for every camera, to the pixel
LABELS_AT_M = 10.0
DIRECTIONS = {"ahead": 0, "left": 90, "behind": 180, "right": 270}  # degrees, counter-clockwise from above
RAY_STEP_DEG = 30


@dataclass(frozen=True)
class GroundLine:
    """A line on flat ground: (n, 3) points in the LiDAR frame, and how far from the car it is at its end."""

    name: str
    points_m: NDArray[np.float64]
    distance_m: float


def ground_lines(lidar2ego: NDArray[np.float64]) -> list[GroundLine]:
    """Rings around the car, the horizon, and rays between the rings every 30 degrees, those of the axes named."""
    ego2lidar = invert_rigid(lidar2ego)
    around = np.radians(np.arange(0, 360.5))
    lines = []
    for radius in (*RINGS_M, HORIZON_M):
        name = "horizon" if radius == HORIZON_M else f"{radius} m"
        lines.append(GroundLine(name, transform_points(ego2lidar, radius * _directions(around)), radius))
    names = {degrees: name for name, degrees in DIRECTIONS.items()}
    for degrees in range(0, 360, RAY_STEP_DEG):
        ray = np.linspace(RINGS_M[0], RINGS_M[-1], 8)[:, None] * _directions(np.radians([degrees]))
        lines.append(GroundLine(names.get(degrees, ""), transform_points(ego2lidar, ray), RINGS_M[-1]))
    return lines


def label_place(lidar2ego: NDArray[np.float64], direction: str) -> NDArray[np.float64]:
    """(3,) where a direction's name stands on the ground, in the LiDAR frame."""
    towards = LABELS_AT_M * _directions(np.radians([DIRECTIONS[direction]]))
    return transform_points(invert_rigid(lidar2ego), towards)[0]


def field_of_view(sample: Sample, camera: CameraFrame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What a camera sees, from above in the LiDAR frame.

    Returns:
        place_m: (2,) of the camera.
        edges: (2, 2) unit vectors through the middles of the image's left and right edge.
    """
    width, height = camera.size_wh_px
    pixels = np.array([[0, height / 2, 1], [width, height / 2, 1]])
    rays = pixels @ np.linalg.inv(camera.cam2img[:3, :3]).T
    cam2lidar = invert_rigid(sample.lidar2global) @ camera.ego2global @ camera.cam2ego
    edges = (rays @ cam2lidar[:3, :3].T)[:, :2]
    return cam2lidar[:2, 3], edges / np.maximum(np.linalg.norm(edges, axis=1, keepdims=True), 1e-9)


def _directions(azimuth_rad: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) angles from ahead, counter-clockwise -> (n, 3) unit vectors on the ground, ego frame."""
    return np.stack([np.cos(azimuth_rad), np.sin(azimuth_rad), np.zeros_like(azimuth_rad)], axis=-1)
