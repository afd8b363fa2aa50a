"""Ways over the ground, and motions along them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Path:
    """A smooth line: points (n, 2) m, arc length (n,) m from its start, heading (n,) rad, unwrapped."""

    points: Array
    length: Array
    heading: Array

    @staticmethod
    def through(points: Array) -> Path:
        """From densely sampled points."""
        points = np.asarray(points, dtype=np.float64)
        steps = np.diff(points, axis=0)
        length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(steps, axis=1))])
        between = np.unwrap(np.arctan2(steps[:, 1], steps[:, 0]))
        middles = (length[1:] + length[:-1]) / 2
        return Path(points, length, np.interp(length, middles, between))

    @staticmethod
    def with_round_corner(before: Array, after: Array, corner: Array, radius_m: float) -> Path:
        """Two lines that meet at a corner, joined by a curve that leaves and rejoins them `radius_m` from it."""
        start = before[np.linalg.norm(before - corner, axis=1) > radius_m]
        end = after[np.linalg.norm(after - corner, axis=1) > radius_m]
        t = np.linspace(0, 1, 24)[1:-1, None]
        bend = (1 - t) ** 2 * start[-1] + 2 * t * (1 - t) * corner + t**2 * end[0]
        return Path.through(np.concatenate([start, bend, end]))

    def at(self, length_m: ArrayLike) -> Array:
        """(n,) arc lengths -> (n, 3) x, y, heading; held at the ends."""
        s = np.asarray(length_m, dtype=np.float64)
        x = np.interp(s, self.length, self.points[:, 0])
        y = np.interp(s, self.length, self.points[:, 1])
        return np.stack([x, y, np.interp(s, self.length, self.heading)], axis=-1)

    def nearest(self, point: ArrayLike) -> float:
        """The arc length of the sample closest to a point."""
        return float(self.length[np.argmin(np.linalg.norm(self.points - np.asarray(point), axis=1))])


@dataclass(frozen=True)
class Motion:
    """s(t) = start + speed t + acceleration t^2 / 2 along a path (never backwards), or a fixed pose."""

    path: Path | None
    start_m: float = 0.0
    speed_mps: float = 0.0
    acceleration_mps2: float = 0.0
    rest: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def moves(self) -> bool:
        return self.path is not None and (self.speed_mps > 0 or self.acceleration_mps2 > 0)

    def at(self, times_s: ArrayLike) -> Array:
        """(n,) seconds of the scene -> (n, 3) x, y, yaw."""
        t = np.asarray(times_s, dtype=np.float64)
        if self.path is None:
            return np.broadcast_to(np.array(self.rest), (*t.shape, 3)).copy()
        if self.acceleration_mps2 < 0:
            t = np.minimum(t, -self.speed_mps / self.acceleration_mps2)
        return self.path.at(self.start_m + self.speed_mps * t + self.acceleration_mps2 * t * t / 2)


def footprints_touch(poses: Array, half: Array, other_poses: Array, other_half: Array) -> NDArray[np.bool_]:
    """Whether two rectangles overlap, by the separating axis test.

    Args:
        poses: (..., 3) x, y, yaw of the one; half: (..., 2) its half length and half width.
        other_poses, other_half: the same of the other; all broadcast.

    Returns:
        (...) True where they overlap.
    """
    offset = other_poses[..., :2] - poses[..., :2]
    turn = other_poses[..., 2] - poses[..., 2]
    cos, sin = np.abs(np.cos(turn)), np.abs(np.sin(turn))
    apart = np.zeros(np.broadcast_shapes(turn.shape, half.shape[:-1], other_half.shape[:-1]), dtype=bool)
    for yaw, a, b in ((poses[..., 2], half, other_half), (other_poses[..., 2], other_half, half)):
        along = np.abs(offset[..., 0] * np.cos(yaw) + offset[..., 1] * np.sin(yaw))
        across = np.abs(offset[..., 1] * np.cos(yaw) - offset[..., 0] * np.sin(yaw))
        apart |= along > a[..., 0] + b[..., 0] * cos + b[..., 1] * sin
        apart |= across > a[..., 1] + b[..., 0] * sin + b[..., 1] * cos
    return ~apart
