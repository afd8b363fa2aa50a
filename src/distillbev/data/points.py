"""LiDAR points: read, moved into the frame of the key sweep, counted in boxes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..geometry import invert_rigid
from .files import read_whole
from .schema import LidarSweep, Sample

POINT_BYTES = 20  # five float32: x, y, z, intensity, ring
MOST_SWEEP_BYTES = 2**28
# No LiDAR sees 10 km; what is beyond comes of a damaged file, and would overflow on its way.
LARGEST_VALUES = np.array([1e4, 1e4, 1e4, 1e6, 1e6], dtype=np.float32)


def load_points(sample: Sample, remove_ego_radius_m: float = 1.0) -> NDArray[np.float32]:
    """All sweeps of a sample as one cloud in the LiDAR frame of the key frame.

    Args:
        sample: its sweeps are read, newest first; each moves with its own ego pose and the key frame's.
        remove_ego_radius_m: points with |x| and |y| below it, in their own sweep's frame, hit the car itself.

    Returns:
        (P, 5) float32: x, y, z (m), intensity (0-255), time (s; 0 in the key sweep, negative earlier).

    Raises:
        DataError: a file is absent, is no whole number of points, or holds a value that no LiDAR gives.
    """
    if not sample.sweeps:
        return np.zeros((0, 5), dtype=np.float32)
    # One array, made first: large ones that come and go cost more than all the arithmetic (page faults).
    joined = np.empty((sum(map(_rows_on_disk, sample.sweeps)), 5), dtype=np.float32)
    start = 0
    for sweep in sample.sweeps:
        points = read_sweep(sweep)
        points = points.take(np.flatnonzero(~_on_ego(points, remove_ego_radius_m)), axis=0)
        # One product moves the points, keeps the intensity and sets the time: the ring gives way to a column of 1.
        move = np.diag(np.array([1, 1, 1, 1, 0], dtype=np.float32))
        if sweep is not sample.sweeps[0]:
            move[[0, 1, 2, 4], :3] = sweep2key(sample, sweep)[:3].T
        move[4, 4] = (sweep.timestamp_us - sample.sweeps[0].timestamp_us) * 1e-6
        points[:, 4] = 1
        stop = start + len(points)
        np.matmul(points, move, out=joined[start:stop])
        start = stop
    return joined[:start]


def load_points_one_by_one(sample: Sample, remove_ego_radius_m: float = 1.0) -> NDArray[np.float32]:
    """The slow twin of `load_points`: the same, a step at a time."""
    clouds = [np.zeros((0, 5), dtype=np.float32)]
    for sweep in sample.sweeps:
        points = read_sweep(sweep)
        points = points[~_on_ego(points, remove_ego_radius_m)]
        if sweep is not sample.sweeps[0]:
            moved = sweep2key(sample, sweep)
            points[:, :3] = points[:, :3] @ moved[:3, :3].T + moved[:3, 3]
        points[:, 4] = (sweep.timestamp_us - sample.sweeps[0].timestamp_us) * 1e-6
        clouds.append(points)
    return np.concatenate(clouds)


def sweep2key(sample: Sample, sweep: LidarSweep) -> NDArray[np.float32]:
    """(4, 4): a sweep's own LiDAR frame -> that of the key frame.

    Composed in float64 (global coordinates run to kilometres), to be applied in float32 (a short way).
    """
    composed = invert_rigid(sample.lidar2global) @ sweep.ego2global @ sweep.lidar2ego
    return composed.astype(np.float32)


def _rows_on_disk(sweep: LidarSweep) -> int:
    """By the file's size; 0 where there is no such file, which reading will tell."""
    try:
        return sweep.path.stat().st_size // POINT_BYTES
    except (OSError, ValueError):
        return 0


def _on_ego(points: NDArray[np.float32], radius_m: float) -> NDArray[np.bool_]:
    return (np.abs(points[:, 0]) < radius_m) & (np.abs(points[:, 1]) < radius_m)


def read_sweep(sweep: LidarSweep) -> NDArray[np.float32]:
    """(P, 5) float32 as on disk: x, y, z (m, the sweep's own LiDAR frame), intensity, ring."""
    absent = ", though the tables name it; copy it again"
    content = read_whole(sweep.path, "LiDAR file", MOST_SWEEP_BYTES, absent)
    if not content or len(content) % POINT_BYTES:
        raise DataError(
            f"{sweep.path}: {len(content)} bytes, expected a multiple of {POINT_BYTES} above 0 "
            "(float32 x, y, z, intensity, ring); the file is truncated, copy it again"
        )
    points = (
        np.frombuffer(content, dtype="<f4").reshape(-1, 5).astype(np.float32)
    )  # a copy that may be written
    # Maximum and minimum are NaN where a value is, and ten times as fast as a look at each column.
    if not (points.max() <= LARGEST_VALUES.min() and points.min() >= -LARGEST_VALUES.min()):
        _require_right_values(points, sweep, len(content))
    return points


def _require_right_values(points: NDArray[np.float32], sweep: LidarSweep, num_bytes: int) -> None:
    right = np.abs(points) <= LARGEST_VALUES  # NaN is not
    if not right.all():
        row = int(np.flatnonzero(~right.all(axis=1))[0])
        raise DataError(
            f"{sweep.path} ({num_bytes} bytes): point {row} of {len(points)} is {points[row].tolist()}; "
            f"expected finite numbers of at most {LARGEST_VALUES.tolist()}, copy the file again"
        )


def count_points_in_boxes(
    points: NDArray[np.floating], box2frame: NDArray[np.float64], size_lwh_m: NDArray[np.float64]
) -> NDArray[np.int64]:
    """How many points each box holds, faces included, boxes tilted as they are.

    Args:
        points: (P, >=3) metres.
        box2frame: (n, 4, 4), box (origin at its centre, x along its length) -> the frame of the points.
        size_lwh_m: (n, 3).

    Returns:
        (n,) counts, the same as the nuScenes devkit's `points_in_box` gives.
    """
    xyz = np.asarray(points[:, :3], dtype=np.float64)
    counts = np.zeros(len(box2frame), dtype=np.int64)
    half_diagonal = np.linalg.norm(size_lwh_m, axis=1) / 2
    for i, (pose, size) in enumerate(zip(box2frame, size_lwh_m, strict=True)):
        offset = xyz - pose[:3, 3]
        near = offset[(np.abs(offset) <= half_diagonal[i]).all(axis=1)]
        counts[i] = (np.abs(near @ pose[:3, :3]) <= size / 2).all(axis=1).sum()
    return counts
