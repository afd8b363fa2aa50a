"""Rigid motions, quaternions, projection. Frames and names: docs/frames.md.

A matrix `a2b` is 4x4 and takes points of frame a to frame b; chains read right to left. Everything here is
numpy in float64; models get float32 tensors.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def quaternion_to_rotation(quat_wxyz: Array) -> Array:
    """(..., 4) unit quaternions (w, x, y, z) -> (..., 3, 3) rotation matrices."""
    w, x, y, z = np.moveaxis(np.asarray(quat_wxyz, dtype=np.float64), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def rotation_to_quaternion(rotation: Array) -> Array:
    """(3, 3) rotation matrix -> (4,) unit quaternion (w, x, y, z) with w >= 0 (Shepperd's method)."""
    m = np.asarray(rotation, dtype=np.float64)
    choices = np.array([np.trace(m), m[0, 0], m[1, 1], m[2, 2]])
    largest = int(np.argmax(choices))
    if largest == 0:
        quat = np.array([1 + choices[0], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]])
    else:
        i = largest - 1
        j, k = (i + 1) % 3, (i + 2) % 3
        quat = np.empty(4)
        quat[0] = m[k, j] - m[j, k]
        quat[1 + i] = 1 + m[i, i] - m[j, j] - m[k, k]
        quat[1 + j] = m[j, i] + m[i, j]
        quat[1 + k] = m[k, i] + m[i, k]
    quat /= np.linalg.norm(quat)
    return quat if quat[0] >= 0 else -quat


def pose_matrix(translation_m: Array, rotation: Array) -> Array:
    """(3,) translation and (3, 3) rotation -> (4, 4) rigid motion."""
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = translation_m
    return matrix


def invert_rigid(a2b: Array) -> Array:
    """(..., 4, 4) rigid motion -> its inverse, exact to rounding (no general solver)."""
    rotation = np.swapaxes(a2b[..., :3, :3], -1, -2)
    inverse = np.zeros_like(a2b)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3] = -np.einsum("...ij,...j->...i", rotation, a2b[..., :3, 3])
    inverse[..., 3, 3] = 1
    return inverse


def transform_points(a2b: Array, points: Array) -> Array:
    """(4, 4) and (..., 3) points of frame a -> (..., 3) points in frame b."""
    return points @ a2b[:3, :3].T + a2b[:3, 3]


def yaw_of_rotation(rotation: Array) -> Array:
    """(..., 3, 3) -> (...) heading of the rotated x axis in the xy plane, radians in (-pi, pi]."""
    return np.arctan2(rotation[..., 1, 0], rotation[..., 0, 0])


def rotation_about_z(yaw_rad: float | Array) -> Array:
    """(...) angles, counter-clockwise seen from above -> (..., 3, 3)."""
    yaw_rad = np.asarray(yaw_rad, dtype=np.float64)
    cos, sin, zero, one = np.cos(yaw_rad), np.sin(yaw_rad), np.zeros_like(yaw_rad), np.ones_like(yaw_rad)
    rows = [[cos, -sin, zero], [sin, cos, zero], [zero, zero, one]]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def wrap_angle(angle_rad: Array) -> Array:
    """Any angles -> the same directions in (-pi, pi]."""
    return -(np.mod(-np.asarray(angle_rad) + np.pi, 2 * np.pi) - np.pi)


def project_to_image(cam2img: Array, points_cam: Array) -> tuple[Array, Array]:
    """Pinhole projection of points in the camera frame (x right, y down, z forward).

    Args:
        cam2img: (4, 4) intrinsics, image augmentation included if any.
        points_cam: (..., 3) metres.

    Returns:
        pixels: (..., 2) u (column) and v (row); meaningless where depth <= 0.
        depth_m: (...) distance along the optical axis.
    """
    homogeneous = points_cam @ cam2img[:3, :3].T
    depth = homogeneous[..., 2]
    safe = np.where(np.abs(depth) < 1e-6, 1e-6, depth)
    return homogeneous[..., :2] / safe[..., None], depth
