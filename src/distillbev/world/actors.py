"""One actor: its shape, its tight box, what nuScenes calls it, and where it is at any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .meshes import Colour, Material, Mesh, box, column, hull, join
from .paths import Motion
from .people import bicycle, motorcycle, pedestrian
from .vehicles import bus, car, construction_vehicle, trailer, truck

# Annotators leave a little air round a shape; without it, range noise would put half of a flat side's points
# outside. Sides and top only: the box stands on the ground.
BOX_MARGIN_M = 0.03


@dataclass(frozen=True)
class Shape:
    """A mesh that stands on z = 0 over the origin, facing +x, with its tight box.

    `scale` (3,) is how much larger this is than the catalogue's shape `key`, of which it is a variant.
    """

    mesh: Mesh
    size_lwh_m: tuple[float, float, float]
    label: str  # detection class
    category: str  # name in the category table
    key: tuple[str, str, int] = ("", "", 0)
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Actor:
    """A shape that follows a motion; `ground_m` is the height of what it stands on."""

    shape: Shape
    motion: Motion
    ground_m: float
    attribute: str  # name in the attribute table, "" for cones and barriers

    @property
    def moves(self) -> bool:
        return self.motion.moves

    def pose(self, time_s: float) -> tuple[float, float, float, float]:
        """x, y, z of the point on the ground below its middle, and yaw, at a time of the scene."""
        x, y, yaw = self.motion.at(np.array([time_s]))[0]
        return float(x), float(y), self.ground_m, float(yaw)

    def mesh_at(self, time_s: float) -> Mesh:
        x, y, z, yaw = self.pose(time_s)
        return self.shape.mesh.moved((x, y, z), yaw)

    def box_at(self, time_s: float) -> NDArray[np.float64]:
        """(7,) annotated box: gravity centre, length, width, height, yaw."""
        return annotated_box(self.pose(time_s), self.shape)


def annotated_box(pose: Sequence[float], shape: Shape) -> NDArray[np.float64]:
    """(7,) gravity centre, length, width, height, yaw of a shape posed at x, y, z (of its foot), yaw."""
    x, y, z, yaw = pose
    length, width, height = shape.size_lwh_m
    height += BOX_MARGIN_M
    return np.array([x, y, z + height / 2, length + 2 * BOX_MARGIN_M, width + 2 * BOX_MARGIN_M, height, yaw])


def make_shape(label: str, rng: np.random.Generator, variant: str = "") -> Shape:
    """Draws a shape of a detection class.

    `variant`: "rider" puts a rider on a bicycle or motorcycle; for pedestrians "walking", "standing" or
    "sitting", with "child" or "worker" after a space.
    """
    category = CATEGORY[label]
    if label == "pedestrian":
        pose, _, kind = (variant or "standing").partition(" ")
        mesh = pedestrian(rng, pose, kind or "adult")
        category = {"": "adult", "child": "child", "worker": "construction_worker"}[kind]
        category = f"human.pedestrian.{category}"
    elif label in ("bicycle", "motorcycle"):
        mesh = (bicycle if label == "bicycle" else motorcycle)(rng, rider=variant == "rider")
    else:
        mesh = _BUILDERS[label](rng)
    mesh, size = mesh.box_centred()
    return Shape(mesh, size, label, category)


def traffic_cone(rng: np.random.Generator) -> Mesh:
    """A cone with two reflecting bands, or a taller channelising post."""
    orange: Colour = (0.75, 0.16, 0.02)
    height, foot = rng.uniform(0.7, 1.05), rng.uniform(0.34, 0.42)
    slope = [(0.04, foot * 0.4), (0.35 * height, foot * 0.3), (0.5 * height, foot * 0.25), (0.62 * height, foot * 0.21),
             (0.75 * height, foot * 0.17), (height, foot * 0.07)]  # fmt: skip
    parts = [box((0, 0, 0.02), (foot, foot, 0.04), Material.MATTE, (0.04, 0.04, 0.04))]
    for k, (low, high) in enumerate(pairwise(slope)):
        white = k in (1, 3)
        material, colour = (Material.RETROREFLECTOR, (0.8, 0.8, 0.8)) if white else (Material.MATTE, orange)
        parts.append(column([(low[0], low[1], low[1]), (high[0], high[1], high[1])], material, colour))
    return join(parts)


def barrier(rng: np.random.Generator) -> Mesh:
    """A water-filled plastic barrier, a concrete one or a plank fence; its long side lies across its heading."""
    kind = rng.choice(["plastic", "concrete", "planks"], p=[0.5, 0.25, 0.25])
    width, height = rng.uniform(1.7, 2.5), rng.uniform(0.85, 1.1)
    half = width / 2
    if kind == "planks":
        parts = [
            box((0, side * half * 0.8, height / 2), (0.08, 0.08, height), Material.MATTE, (0.4, 0.4, 0.4))
            for side in (-1, 1)
        ]
        parts += [
            box((0, side * half * 0.8, 0.05), (0.55, 0.1, 0.1), Material.MATTE, (0.1, 0.1, 0.1))
            for side in (-1, 1)
        ]
        for z in (height - 0.12, height * 0.5):
            edges = np.linspace(-half, half, 8)
            for k, (low, high) in enumerate(pairwise(edges)):
                colour = (0.7, 0.05, 0.04) if k % 2 else (0.8, 0.8, 0.78)
                centre = (0, (low + high) / 2, z)
                parts.append(box(centre, (0.04, high - low, 0.22), Material.RETROREFLECTOR, colour))
        return join(parts)
    palette: list[Colour] = [(0.68, 0.17, 0.05), (0.75, 0.74, 0.7), (0.72, 0.5, 0.06)]
    colour = (0.42, 0.41, 0.38) if kind == "concrete" else palette[int(rng.integers(len(palette)))]
    profile = [(-half, 0.2, 0, height), (half, 0.2, 0, height)]
    body = hull(profile, Material.MATTE, colour, chamfer=0.1)
    foot = hull([(-half, 0.28, 0, 0.28), (half, 0.28, 0, 0.28)], Material.MATTE, colour, chamfer=0.1)
    parts = [body, foot]
    if kind == "plastic":
        parts.append(
            box((0, 0, height * 0.62), (width * 0.5, 0.42, 0.16), Material.RETROREFLECTOR, (0.8, 0.8, 0.8))
        )
    return join(parts).moved(yaw_rad=np.pi / 2)


_BUILDERS = {
    "car": car, "truck": truck, "bus": bus, "trailer": trailer, "construction_vehicle": construction_vehicle,
    "traffic_cone": traffic_cone, "barrier": barrier,
}  # fmt: skip
CATEGORY = {
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "bus": "vehicle.bus.rigid",
    "trailer": "vehicle.trailer",
    "construction_vehicle": "vehicle.construction",
    "pedestrian": "human.pedestrian.adult",
    "motorcycle": "vehicle.motorcycle",
    "bicycle": "vehicle.bicycle",
    "traffic_cone": "movable_object.trafficcone",
    "barrier": "movable_object.barrier",
}
