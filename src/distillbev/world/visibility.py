"""How much of an actor the six cameras show, by rays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from embreex.rtcore_scene import EmbreeScene
from numpy.typing import NDArray

from ..geometry import invert_rigid, project_to_image, transform_points
from .actors import Actor
from .casting import Stage, build
from .rig import Calibration, rays_through

RAYS_PER_SIDE = 10  # rays per actor and camera: this squared
LEVELS = (0.4, 0.6, 0.8)  # nuScenes: v0-40, v40-60, v60-80, v80-100


class Silhouettes:
    """Each actor alone, to learn which rays would meet it if nothing else were there."""

    def __init__(self, actors: Sequence[Actor]) -> None:
        self.actors = actors
        self._alone: dict[int, EmbreeScene] = {}

    def rays_at(
        self, number: int, time_s: float, camera: Calibration, cam2world: NDArray[np.float64], size_px: tuple[int, int]
    ) -> tuple[NDArray[np.float32], float]:
        """Rays of a camera that meet an actor which stands alone.

        Args:
            number: of the actor, from 1.
            time_s: of the exposure.
            camera: with intrinsics for `size_px`.
            cam2world: (4, 4).
            size_px: (W, H).

        Returns:
            (n, 3) directions in the world frame, and how many pixels each of them stands for.
        """
        actor, nothing = self.actors[number - 1], (np.zeros((0, 3), np.float32), 0.0)
        intrinsic = camera.intrinsic
        assert intrinsic is not None, camera.channel
        box = actor.box_at(time_s)
        corners = _corners(box)
        in_camera = transform_points(invert_rigid(cam2world), corners)
        if in_camera[:, 2].max() < 0.3:
            return nothing
        in_camera[:, 2] = np.maximum(in_camera[:, 2], 0.3)
        pixels, _ = project_to_image(_four(intrinsic), in_camera)
        low = np.maximum(pixels.min(axis=0), -0.5)
        high = np.minimum(pixels.max(axis=0), np.array(size_px) - 0.5)
        if (high <= low).any():
            return nothing
        side = RAYS_PER_SIDE
        steps = (np.arange(side) + 0.5) / side
        u, v = np.meshgrid(low[0] + steps * (high[0] - low[0]), low[1] + steps * (high[1] - low[1]))
        directions = rays_through(intrinsic, u.ravel(), v.ravel()) @ cam2world[:3, :3].T.astype(np.float32)
        x, y, z, yaw = actor.pose(time_s)
        cos, sin = np.cos(yaw), np.sin(yaw)
        world2actor = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        start = world2actor @ (cam2world[:3, 3] - (x, y, z))
        if number not in self._alone:
            self._alone[number] = build(actor.shape.mesh.triangles)
        local = np.ascontiguousarray(directions @ world2actor.T.astype(np.float32))
        origins = np.broadcast_to(start.astype(np.float32), local.shape)
        met = self._alone[number].run(np.ascontiguousarray(origins), local) >= 0
        return directions[met], float(np.prod(high - low)) / side**2


def visible_shares(rays: Sequence[tuple[NDArray[np.float32], float, int]], stage: Stage, origin: NDArray[np.float64]) -> NDArray[np.float64]:
    """Casts the rays of several actors at once into the full stage, posed at their time.

    Args:
        rays: per actor: directions (n, 3), pixels per ray, number of the actor.
        stage: of the scene.
        origin: (3,) of all rays.

    Returns:
        (actors, 2) pixels that show the actor, and pixels that it would cover alone.
    """
    directions = np.concatenate([directions for directions, _, _ in rays])
    hits = stage.cast(np.ascontiguousarray(np.broadcast_to(origin.astype(np.float32), directions.shape)), directions)
    owner = np.where(hits.primitive >= 0, stage.instance[np.maximum(hits.primitive, 0)], 0)
    result, at = np.zeros((len(rays), 2)), 0
    for k, (own, weight, number) in enumerate(rays):
        result[k] = (owner[at : at + len(own)] == number).sum() * weight, len(own) * weight
        at += len(own)
    return result


def level(share: float) -> int:
    """1 to 4, the tokens of nuScenes' visibility table."""
    return 1 + sum(share > limit for limit in LEVELS)


def _corners(box: NDArray[np.float64]) -> NDArray[np.float64]:
    signs = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]) / 2
    x, y, z = (signs * box[3:6]).T
    cos, sin = np.cos(box[6]), np.sin(box[6])
    return np.stack([x * cos - y * sin, x * sin + y * cos, z], axis=-1) + box[:3]


def _four(intrinsic: NDArray[np.float64]) -> NDArray[np.float64]:
    matrix = np.eye(4)
    matrix[:3, :3] = intrinsic
    return matrix
