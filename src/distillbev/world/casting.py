"""Rays against the triangles of a scene.

Two structures: what stands still is built once per scene, what moves once per exposure. A ray goes through
both; the second search ends where the first one hit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from numpy.typing import NDArray

from .actors import Actor
from .meshes import Floats, Mesh, join
from .surroundings import Surroundings

FAR_M = 420.0


@dataclass(frozen=True)
class Hits:
    """First hits of n rays: range (n,) m (FAR_M if none), primitive (n,) int64 into `Stage`'s tables (-1 if
    none), normal (n, 3) unit, turned against the ray."""

    range_m: Floats
    primitive: NDArray[np.int64]
    normal: Floats


class Stage:
    """All triangles of a scene, their materials, and whose they are; posed at any time.

    Attributes:
        material, colour, style: (n,), (n, 3), (n,) per triangle, still ones first, then moving ones.
        instance: (n,) number of the actor (from 1), 0 for what is not annotated.
    """

    def __init__(self, ground: Mesh, surroundings: Surroundings, actors: Sequence[Actor]) -> None:
        self.moving = [(number, actor) for number, actor in enumerate(actors, start=1) if actor.moves]
        still = [(number, actor) for number, actor in enumerate(actors, start=1) if not actor.moves]
        fixed = join([ground, surroundings.mesh, *(actor.mesh_at(0.0) for _, actor in still)])
        meshes = [fixed, *(actor.shape.mesh for _, actor in self.moving)]
        self.material = np.concatenate([mesh.material for mesh in meshes])
        self.colour = np.concatenate([mesh.colour for mesh in meshes])
        self.style = np.zeros(len(self.material), dtype=np.uint8)
        self.style[len(ground) : len(ground) + len(surroundings.mesh)] = surroundings.style
        owners = [np.zeros(len(ground) + len(surroundings.mesh), dtype=np.int32)]
        owners += [
            np.full(len(actor.shape.mesh), number, dtype=np.int32) for number, actor in still + self.moving
        ]
        self.instance = np.concatenate(owners)
        self._num_still = len(fixed)
        self._still = build(fixed.triangles)
        self._moving: EmbreeScene | None = None
        self._moving_primitive = np.zeros(0, dtype=np.int64)  # row in the tables of each moving triangle
        ends = len(fixed) + np.cumsum([len(actor.shape.mesh) for _, actor in self.moving], dtype=np.int64)
        self._rows = [
            np.arange(end - len(actor.shape.mesh), end)
            for end, (_, actor) in zip(ends, self.moving, strict=True)
        ]
        self._rest = np.array([actor.pose(0.0) for actor in actors]).reshape(-1, 4)

    def poses(self, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """(T,) seconds of the scene -> (T, actors, 4) x, y, z of the foot and yaw of every actor."""
        poses = np.repeat(self._rest[None], len(times_s), axis=0)
        for number, actor in self.moving:
            poses[:, number - 1, [0, 1, 3]] = actor.motion.at(times_s)
        return poses

    def set(self, poses: NDArray[np.float64], shown: NDArray[np.bool_]) -> None:
        """Puts the moving actors where `poses` (actors, 4) says, those alone that `shown` (actors,) keeps."""
        kept = [k for k, (number, _) in enumerate(self.moving) if shown[number - 1]]
        if not kept:
            self._moving = None
            return
        meshes = []
        for k in kept:
            number, actor = self.moving[k]
            meshes.append(actor.shape.mesh.moved(poses[number - 1, :3], poses[number - 1, 3]).triangles)
        self._moving = build(np.concatenate(meshes))
        self._moving_primitive = np.concatenate([self._rows[k] for k in kept])

    def cast(self, origins: Floats, directions: Floats) -> Hits:
        """(n, 3) origins and unit directions -> first hits."""
        first = self._still.run(
            origins, directions, dists=np.full(len(origins), FAR_M, np.float32), output=True
        )
        range_m, normal = first["tfar"], first["Ng"]
        primitive = first["primID"].astype(np.int64)
        if self._moving is not None:
            second = self._moving.run(origins, directions, dists=range_m, output=True)
            nearer = np.flatnonzero(second["primID"] >= 0)
            range_m[nearer] = second["tfar"][nearer]
            primitive[nearer] = self._moving_primitive[second["primID"][nearer]]
            normal[nearer] = second["Ng"][nearer]
        length = np.sqrt(np.einsum("ij,ij->i", normal, normal))
        facing = np.einsum("ij,ij->i", normal, directions)
        normal *= (-np.sign(facing) / np.maximum(length, 1e-12))[:, None]
        return Hits(range_m, primitive, normal)

    def blocked(self, origins: Floats, directions: Floats, reach_m: float) -> NDArray[np.bool_]:
        """(n,) whether anything stands within `reach_m` along the ray."""
        reach = np.full(len(origins), reach_m, np.float32)
        # embreex answers 0 for a blocked ray and -1 for a clear one.
        hit = self._still.run(origins, directions, dists=reach, query="OCCLUDED") == 0
        if self._moving is not None:
            clear = np.flatnonzero(~hit)
            hit[clear] = (
                self._moving.run(origins[clear], directions[clear], dists=reach[clear], query="OCCLUDED") == 0
            )
        return hit


def build(triangles: Floats) -> EmbreeScene:
    """A search structure over (n, 3, 3) triangles."""
    _keep_to_one_thread()
    scene = EmbreeScene()
    TriangleMesh(scene, np.ascontiguousarray(triangles, dtype=np.float32))
    return scene


@cache
def _keep_to_one_thread() -> None:
    """Lets embree's thread pool have one thread: worker processes already use all cores.

    The pool takes its size from the cores that the process may use when it first builds something.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        scene = EmbreeScene()
        TriangleMesh(scene, np.zeros((1, 3, 3), np.float32))
        scene.run(np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32))
        os.sched_setaffinity(0, cores)
