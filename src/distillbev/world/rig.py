"""The sensors of the simulated vehicle: places, lenses and timing as nuScenes has them (numbers rounded).

Sensor frames: cameras x right, y down, z forward; LiDAR x right, y forward, z up. Ego frame: x forward, y
left, z up, origin on the ground below the rear axle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..geometry import pose_matrix, quaternion_to_rotation
from .settings import WorldConfig

KEY_PERIOD_US = 500_000
SWEEP_PERIOD_US = 50_000
NUSCENES_WIDTH_PX, NUSCENES_HEIGHT_PX = 1600, 900
LIDAR = "LIDAR_TOP"
LIDAR_ELEVATION_DEG = (-30.67, 10.67)


@dataclass(frozen=True)
class _CameraPlace:
    """Focal length and principal point in nuScenes' pixels; `delay_us` before the end of the LiDAR's turn."""

    channel: str
    translation_m: tuple[float, float, float]
    quat_wxyz: tuple[float, float, float, float]
    focal_px: float
    centre_px: tuple[float, float]
    delay_us: int


_CAMERAS = (
    _CameraPlace(
        "CAM_FRONT", (1.701, 0.016, 1.511), (0.4998, -0.5030, 0.4998, -0.4974), 1266.4, (816.3, 491.5), 35_500
    ),
    _CameraPlace(
        "CAM_FRONT_RIGHT",
        (1.551, -0.493, 1.496),
        (0.2060, -0.2027, 0.6825, -0.6714),
        1260.8,
        (808.0, 495.3),
        27_600,
    ),
    _CameraPlace(
        "CAM_BACK_RIGHT",
        (1.015, -0.481, 1.562),
        (0.1228, -0.1324, -0.7004, 0.6905),
        1259.5,
        (807.3, 501.2),
        20_100,
    ),
    _CameraPlace(
        "CAM_BACK", (0.028, 0.003, 1.579), (0.5038, -0.4974, -0.4942, 0.5045), 809.2, (829.2, 481.8), 10_400
    ),
    _CameraPlace(
        "CAM_BACK_LEFT",
        (1.036, 0.485, 1.591),
        (0.6924, -0.7032, -0.1165, 0.1120),
        1256.7,
        (792.1, 492.8),
        500,
    ),
    _CameraPlace(
        "CAM_FRONT_LEFT",
        (1.524, 0.495, 1.509),
        (0.6757, -0.6736, 0.2121, -0.2112),
        1272.6,
        (826.6, 479.8),
        43_100,
    ),
)
LIDAR_TRANSLATION_M = (0.944, 0.0, 1.840)
LIDAR_QUAT_WXYZ = (0.7078, -0.0065, 0.0106, -0.7063)


@dataclass(frozen=True)
class Calibration:
    """Where a sensor sits; `intrinsic` (3, 3) is None for the LiDAR."""

    channel: str
    translation_m: tuple[float, float, float]
    quat_wxyz: tuple[float, float, float, float]
    intrinsic: NDArray[np.float64] | None
    delay_us: int

    @property
    def sensor2ego(self) -> NDArray[np.float64]:
        return pose_matrix(np.array(self.translation_m), quaternion_to_rotation(np.array(self.quat_wxyz)))


def _unit(quat: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    w, x, y, z = (float(part) for part in np.array(quat) / np.linalg.norm(quat))
    return w, x, y, z


def rig(config: WorldConfig) -> tuple[Calibration, ...]:
    """The LiDAR first, then the six cameras in clockwise order from the front."""
    width, height = config.image_size_px
    scale = width / NUSCENES_WIDTH_PX
    sensors = [Calibration(LIDAR, LIDAR_TRANSLATION_M, _unit(LIDAR_QUAT_WXYZ), None, 0)]
    for place in _CAMERAS:
        focal = place.focal_px * scale
        centre = (place.centre_px[0] * scale, place.centre_px[1] * height / NUSCENES_HEIGHT_PX)
        intrinsic = np.array([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]])
        sensors.append(
            Calibration(place.channel, place.translation_m, _unit(place.quat_wxyz), intrinsic, place.delay_us)
        )
    return tuple(sensors)


def pixel_rays(intrinsic: NDArray[np.float64], size_px: tuple[int, int]) -> NDArray[np.float32]:
    """(H * W, 3) unit directions in the camera frame through the middles of the pixels.

    Pixel (column j, row i) is centred on the image point (j, i), as projecting with the intrinsics and
    rounding implies.
    """
    u, v = np.meshgrid(np.arange(size_px[0]), np.arange(size_px[1]))
    return rays_through(intrinsic, u.ravel(), v.ravel())


def rays_through(intrinsic: NDArray[np.float64], u: NDArray, v: NDArray) -> NDArray[np.float32]:
    """(n,) image points -> (n, 3) unit directions in the camera frame."""
    x = (u - intrinsic[0, 2]) / intrinsic[0, 0]
    y = (v - intrinsic[1, 2]) / intrinsic[1, 1]
    directions = np.stack([x, y, np.ones_like(x)], axis=-1)
    return (directions / np.linalg.norm(directions, axis=-1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=4)
def lidar_rays(config: WorldConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(n, 3) unit directions in the LiDAR frame and (n,) rings, one firing of all beams after the other.

    The turn begins behind the vehicle and runs clockwise, as nuScenes' does; ring 0 looks lowest.
    """
    elevation = np.radians(np.linspace(*LIDAR_ELEVATION_DEG, config.lidar_beams))
    steps = config.lidar_azimuth_steps
    azimuth = -np.pi / 2 - 2 * np.pi * np.arange(steps) / steps
    azimuth, elevation_of_ray = (axis.ravel() for axis in np.meshgrid(azimuth, elevation, indexing="ij"))
    flat = np.cos(elevation_of_ray)
    directions = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation_of_ray)], axis=-1)
    rings = np.tile(np.arange(config.lidar_beams, dtype=np.float32), steps)
    return directions.astype(np.float32), rings
