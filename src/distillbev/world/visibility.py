"""How much of an actor the six cameras show, by rays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from embreex.rtcore_scene import EmbreeScene
from numpy.typing import NDArray

from ..geometry import invert_rigid
from .actors import Shape
from .casting import Stage, build
from .rig import Calibration, rays_through
from .traffic import Catalogue

RAYS_PER_SIDE = 8  # rays per actor and camera: this squared
LEVELS = (0.4, 0.6, 0.8)  # nuScenes: v0-40, v40-60, v60-80, v80-100
_NEAR_M = 0.3


@dataclass(frozen=True)
class Windows:
    """Where the boxes of n actors appear in an image: low, high (n, 2) corners in pixels, cut to the image;
    `inside` (n,) whether anything of the box is in the picture."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    inside: NDArray[np.bool_]


def windows(
    boxes: NDArray[np.float64], camera: Calibration, cam2world: NDArray[np.float64], size_px: tuple[int, int]
) -> Windows:
    """(n, 7) boxes -> the rectangles that hold their projections."""
    intrinsic = camera.intrinsic
    assert intrinsic is not None, camera.channel
    signs = np.array([[a, b, c] for a in (-0.5, 0.5) for b in (-0.5, 0.5) for c in (-0.5, 0.5)])
    x, y, z = np.moveaxis(signs * boxes[:, None, 3:6], -1, 0)
    cos, sin = np.cos(boxes[:, 6:]), np.sin(boxes[:, 6:])
    corners = np.stack([x * cos - y * sin, x * sin + y * cos, z], axis=-1) + boxes[:, None, :3]
    world2cam = invert_rigid(cam2world)
    in_camera = corners @ world2cam[:3, :3].T + world2cam[:3, 3]
    ahead = in_camera[..., 2].max(axis=1) > _NEAR_M
    pixels = in_camera @ intrinsic.T
    pixels = pixels[..., :2] / np.maximum(in_camera[..., 2:], _NEAR_M)
    low = np.maximum(pixels.min(axis=1), -0.5)
    high = np.minimum(pixels.max(axis=1), np.array(size_px) - 0.5)
    return Windows(low, high, ahead & (high > low).all(axis=1))


class Silhouettes:
    """Shapes alone, to learn which rays would meet an actor if nothing else were there."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._alone: dict[tuple[str, str, int], EmbreeScene] = {}

    def meets(
        self,
        shape: Shape,
        pose: NDArray[np.float64],
        origin: NDArray[np.float64],
        directions: NDArray[np.float32],
    ) -> NDArray[np.bool_]:
        """(n,) which rays from an origin (3,) meet a shape posed at (4,) x, y, z, yaw."""
        cos, sin = np.cos(pose[3]), np.sin(pose[3])
        world2shape = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) / np.array(shape.scale)[:, None]
        if shape.key not in self._alone:
            self._alone[shape.key] = build(self.catalogue.original(shape).mesh.triangles)
        local = np.ascontiguousarray(directions @ world2shape.T.astype(np.float32))
        start = (world2shape @ (origin - pose[:3])).astype(np.float32)
        return (
            self._alone[shape.key].run(np.ascontiguousarray(np.broadcast_to(start, local.shape)), local) >= 0
        )


def visible_pixels(
    stage: Stage,
    silhouettes: Silhouettes,
    shapes: dict[int, Shape],
    poses: NDArray[np.float64],
    where: Windows,
    camera: Calibration,
    cam2world: NDArray[np.float64],
) -> NDArray[np.float64]:
    """(actors + 1, 2) pixels of a camera that show an actor, and pixels that it would cover if it stood alone.

    Both are counted by the same rays, spread evenly over the actor's window: those that meet it alone, and of
    these the ones that still meet it in the full stage. Rows are numbers of actors; those not in `shapes` get 0.
    """
    result = np.zeros((len(poses) + 1, 2))
    origin = cam2world[:3, 3]
    turn = cam2world[:3, :3].T.astype(np.float32)
    assert camera.intrinsic is not None, camera.channel
    numbers = [number for number in shapes if where.inside[number - 1]]
    if not numbers:
        return result
    index = np.array(numbers) - 1
    steps = (np.arange(RAYS_PER_SIDE) + 0.5) / RAYS_PER_SIDE
    u, v = (axis.ravel() for axis in np.meshgrid(steps, steps))
    extent = where.high[index] - where.low[index]
    columns = where.low[index, :1] + extent[:, :1] * u
    rows = where.low[index, 1:] + extent[:, 1:] * v
    rays = (rays_through(camera.intrinsic, columns.ravel(), rows.ravel()) @ turn).reshape(len(numbers), -1, 3)
    own = [
        rays[k][silhouettes.meets(shapes[number], poses[number - 1], origin, rays[k])]
        for k, number in enumerate(numbers)
    ]
    directions = np.concatenate(own)
    owner_of_ray = np.repeat(numbers, [len(part) for part in own])
    hits = stage.cast(
        np.ascontiguousarray(np.broadcast_to(origin.astype(np.float32), directions.shape)), directions
    )
    owner = np.where(hits.primitive >= 0, stage.instance[np.maximum(hits.primitive, 0)], 0)
    weight = np.zeros(len(result))
    weight[numbers] = extent.prod(axis=1) / RAYS_PER_SIDE**2
    result[:, 0] = np.bincount(owner_of_ray[owner == owner_of_ray], minlength=len(result)) * weight
    result[:, 1] = np.bincount(owner_of_ray, minlength=len(result)) * weight
    return result


def level(share: float) -> int:
    """1 to 4, the tokens of nuScenes' visibility table."""
    return 1 + sum(share > limit for limit in LEVELS)
