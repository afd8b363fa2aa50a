from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distillbev.data.samples import NOMINAL_LIDAR2EGO
from distillbev.data.schema import CameraFrame, Sample
from distillbev.geometry import invert_rigid, pose_matrix, rotation_about_z, transform_points
from distillbev.report.camera_views import draw_ground_on_image
from distillbev.report.rig_lines import field_of_view, ground_lines

AHEAD = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # axes of a camera that looks ahead, in the ego frame
CAM2IMG = np.array([[100.0, 0, 100, 0], [0, 100, 50, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # 90 degrees wide
SIZE_WH = (200, 100)
HEIGHT_M = 1.5


def cam2ego(yaw_deg: float = 0.0, tilt_deg: float = 0.0) -> np.ndarray:
    """A camera above the ego origin; tilted it looks down."""
    c, s = np.cos(np.radians(tilt_deg)), np.sin(np.radians(tilt_deg))
    tilt = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    return pose_matrix(np.array([0.0, 0, HEIGHT_M]), rotation_about_z(np.radians(yaw_deg)) @ AHEAD @ tilt.T)


def lidar2img(cam2ego: np.ndarray) -> np.ndarray:
    return CAM2IMG @ invert_rigid(cam2ego) @ NOMINAL_LIDAR2EGO


def pixels_of(name: str, cam2ego: np.ndarray) -> np.ndarray:
    """(n, 2) the points of a line that lie before the camera, in pixels."""
    (line,) = (line for line in ground_lines(NOMINAL_LIDAR2EGO) if line.name == name)
    homogeneous = transform_points(lidar2img(cam2ego), line.points_m)
    homogeneous = homogeneous[homogeneous[:, 2] > 0.2]
    return homogeneous[:, :2] / homogeneous[:, 2:]


def test_the_horizon_of_a_level_camera_is_its_middle_row():
    np.testing.assert_allclose(pixels_of("horizon", cam2ego())[:, 1], 50, atol=0.7)


def test_the_horizon_of_a_camera_that_looks_down_rises_by_its_tilt():
    shown = pixels_of("horizon", cam2ego(tilt_deg=10))
    middle = shown[np.argmin(np.abs(shown[:, 0] - 100))]
    np.testing.assert_allclose(middle[1], 50 - 100 * np.tan(np.radians(10)), atol=0.1)


def test_the_ring_ten_metres_ahead_lies_where_the_height_of_the_camera_puts_it():
    ring = pixels_of("10 m", cam2ego())
    lowest = ring[np.argmin(np.abs(ring[:, 0] - 100))]
    np.testing.assert_allclose(lowest, [100, 50 + 100 * HEIGHT_M / 10], atol=1e-6)


@pytest.mark.parametrize(
    ("yaw_deg", "direction"), [(0, "ahead"), (90, "left"), (180, "behind"), (270, "right")]
)
def test_each_camera_sees_the_direction_that_it_looks_in(yaw_deg: float, direction: str):
    np.testing.assert_allclose(pixels_of(direction, cam2ego(yaw_deg))[:, 0], 100, atol=1e-6)


def test_the_field_of_view_is_that_of_the_lens_and_turns_with_the_camera():
    eye = np.eye(4)
    frame = CameraFrame("left", Path("none"), 0, SIZE_WH, CAM2IMG, cam2ego(90), eye)
    place, edges = field_of_view(Sample("", "", 0, NOMINAL_LIDAR2EGO, eye, (frame,), (), None, None), frame)
    np.testing.assert_allclose(
        place, [0, -0.94], atol=1e-9
    )  # LiDAR frame: y forward, its origin 0.94 m ahead
    half = np.sqrt(0.5)  # its left is where the car comes from, 45 degrees to either side of the LiDAR's -x
    np.testing.assert_allclose(edges, [[-half, -half], [-half, half]], atol=1e-9)


def test_the_ground_is_drawn_below_the_horizon_only():
    grey = Image.new("RGB", SIZE_WH, (90, 90, 90))
    drawn = np.asarray(draw_ground_on_image(grey, NOMINAL_LIDAR2EGO, lidar2img(cam2ego())), dtype=int)
    changed = np.abs(drawn - 90).max(axis=(1, 2)) > 20
    assert not changed[:48].any() and changed[49:52].any() and changed[55:].any()
