"""Triangles with materials, and the few solids that everything in the world is built from.

Shapes are built in their own frame: x forward, y left, z up, metres. The order of a triangle's corners carries
no meaning: the shading turns each normal towards the viewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]  # float32 where there are many
Vector = Sequence[float] | Floats  # three coordinates
Colour = tuple[float, float, float]  # linear albedo, red green blue in 0 to 1


class Material(IntEnum):
    """How a triangle shades and how well it answers the LiDAR."""

    GROUND = 0  # road, kerb and verge; told apart by position
    MATTE = 1
    FACADE = 2
    FOLIAGE = 3
    PAINT = 4
    GLASS = 5
    RETROREFLECTOR = 6
    HEADLIGHT = 7
    TAILLIGHT = 8
    LAMP = 9
    CLOTH = 10


@dataclass(frozen=True)
class Mesh:
    """n triangles: corners (n, 3, 3) float32, material (n,) uint8, colour (n, 3) float32."""

    triangles: Floats
    material: NDArray[np.uint8]
    colour: Floats

    def __len__(self) -> int:
        return len(self.triangles)

    def moved(self, translation_m: Vector = (0, 0, 0), yaw_rad: float = 0.0) -> Mesh:
        """Turned about z by the yaw, then shifted."""
        cos, sin = np.cos(yaw_rad), np.sin(yaw_rad)
        turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], dtype=np.float32)
        triangles = self.triangles @ turn + np.asarray(translation_m, dtype=np.float32)
        return replace(self, triangles=triangles.astype(np.float32))

    def scaled(self, factors_xyz: Vector) -> Mesh:
        return replace(self, triangles=self.triangles * np.asarray(factors_xyz, dtype=np.float32))

    def bounds(self) -> tuple[Floats, Floats]:
        """(3,) lowest and (3,) highest coordinates."""
        corners = self.triangles.reshape(-1, 3)
        return corners.min(axis=0), corners.max(axis=0)

    def box_centred(self) -> tuple[Mesh, tuple[float, float, float]]:
        """Shifted so that its upright box stands on z = 0 over the origin; and the box's length, width, height."""
        low, high = self.bounds()
        middle = (low + high) / 2
        length, width, height = (float(extent) for extent in high - low)
        return self.moved((-middle[0], -middle[1], -low[2])), (length, width, height)


def join(meshes: Sequence[Mesh]) -> Mesh:
    if not meshes:
        return surface(np.zeros((0, 3, 3)), Material.MATTE, (0, 0, 0))
    return Mesh(
        np.concatenate([mesh.triangles for mesh in meshes]),
        np.concatenate([mesh.material for mesh in meshes]),
        np.concatenate([mesh.colour for mesh in meshes]),
    )


def surface(triangles: NDArray[np.floating], material: Material, colour: Sequence[float] | Floats) -> Mesh:
    """(n, 3, 3) corners of one material; one colour for all, or (n, 3)."""
    count = len(triangles)
    return Mesh(
        np.ascontiguousarray(triangles, dtype=np.float32),
        np.full(count, material, dtype=np.uint8),
        np.broadcast_to(np.asarray(colour, dtype=np.float32), (count, 3)).copy(),
    )


def loft(rings: NDArray[np.floating], material: Material, colour: Colour, caps: bool = True) -> Mesh:
    """The skin stretched over S rings of K points each, (S, K, 3), closed by fans at both ends."""
    rings = np.asarray(rings, dtype=np.float64)
    ahead = np.concatenate([rings[:, 1:], rings[:, :1]], axis=1)
    here, after, above, above_after = rings[:-1], ahead[:-1], rings[1:], ahead[1:]
    parts = [
        np.stack([here, after, above], axis=2).reshape(-1, 3, 3),
        np.stack([after, above_after, above], axis=2).reshape(-1, 3, 3),
    ]
    if caps:
        for ring in (rings[0], rings[-1]):
            hub = np.broadcast_to(ring[:1], ring[1:-1].shape)
            parts.append(np.stack([hub, ring[1:-1], ring[2:]], axis=1))
    return surface(np.concatenate(parts), material, colour)


def section(
    x: float, half_width: float, low: float, high: float, chamfer: float = 0.0
) -> NDArray[np.float64]:
    """(8, 3) a rectangle across the x axis with its corners cut off."""
    w, c = half_width, min(chamfer, half_width * 0.9, (high - low) * 0.45)
    yz = [
        (w, low + c), (w, high - c), (w - c, high), (c - w, high),
        (-w, high - c), (-w, low + c), (c - w, low), (w - c, low),
    ]  # fmt: skip
    return np.array([(x, y, z) for y, z in yz])


def hull(
    stations: Sequence[tuple[float, float, float, float]],
    material: Material,
    colour: Colour,
    chamfer: float = 0.06,
) -> Mesh:
    """A body along x, given as stations (x, half width, bottom, top)."""
    return loft(np.stack([section(*station, chamfer) for station in stations]), material, colour)


def box(centre: Vector, size: Vector, material: Material, colour: Colour, top: float = 1.0) -> Mesh:
    """A box of the given centre and (length, width, height); `top` shrinks its upper face."""
    corners = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)]) * (np.asarray(size[:2]) / 2)
    low, high = centre[2] - size[2] / 2, centre[2] + size[2] / 2
    base = np.column_stack([corners + centre[:2], np.full(4, low)])
    lid = np.column_stack([corners * top + centre[:2], np.full(4, high)])
    return loft(np.stack([base, lid]), material, colour)


def frustum(
    base: tuple[float, float, float, float],
    lid: tuple[float, float, float, float],
    material: Material,
    colour: Colour,
) -> Mesh:
    """A body between two level rectangles, each (rear x, front x, half width, z)."""
    rings = [
        [(front, w, z), (rear, w, z), (rear, -w, z), (front, -w, z)] for rear, front, w, z in (base, lid)
    ]
    return loft(np.array(rings), material, colour)


def panel(corners: Sequence[Sequence[float]], material: Material, colour: Colour) -> Mesh:
    """A flat quadrilateral, corners in order."""
    a, b, c, d = np.asarray(corners, dtype=np.float64)
    return surface(np.array([[a, b, c], [a, c, d]]), material, colour)


def circle(sides: int, phase: float = 0.0) -> NDArray[np.float64]:
    """(sides, 2) points on the unit circle."""
    angle = 2 * np.pi * (np.arange(sides) + phase) / sides
    return np.column_stack([np.cos(angle), np.sin(angle)])


def tube(
    start: Vector,
    end: Vector,
    radius: float | tuple[float, float],
    material: Material,
    colour: Colour,
    sides: int = 6,
) -> Mesh:
    """A straight limb, pole or bar, open at its ends; two radii taper it."""
    first, last = np.asarray(start, dtype=np.float64), np.asarray(end, dtype=np.float64)
    radii = (radius, radius) if isinstance(radius, (int, float)) else radius
    axis = (last - first) / max(float(np.linalg.norm(last - first)), 1e-9)
    across = np.cross(axis, (0, 0, 1) if abs(axis[2]) < 0.9 else (1, 0, 0))
    across = across / np.linalg.norm(across)
    over = np.cross(axis, across)
    ring = circle(sides) @ np.stack([across, over]).astype(np.float64)
    return loft(np.stack([first + radii[0] * ring, last + radii[1] * ring]), material, colour, caps=False)


def column(
    rings: Sequence[tuple[float, float, float]], material: Material, colour: Colour, sides: int = 8
) -> Mesh:
    """A body along z, given as rings (z, radius along x, radius along y)."""
    unit = circle(sides, 0.5)
    return loft(
        np.stack([np.column_stack([unit * (rx, ry), np.full(sides, z)]) for z, rx, ry in rings]),
        material,
        colour,
    )


def ellipsoid(
    centre: Vector,
    radii: Vector,
    material: Material,
    colour: Colour,
    rows: int = 4,
    sides: int = 8,
) -> Mesh:
    angles = np.linspace(-np.pi / 2, np.pi / 2, rows + 1)
    angles[[0, -1]] *= 0.98
    unit = circle(sides)
    rings = [np.column_stack([unit * np.cos(a), np.full(sides, np.sin(a))]) for a in angles]
    return loft(np.stack(rings) * np.asarray(radii) + np.asarray(centre), material, colour)


def wheel(centre: Vector, radius: float, width: float, rim: Colour = (0.35, 0.36, 0.38)) -> Mesh:
    """A tyre that turns about the y axis, with a lighter rim on both faces."""
    x, y, z = centre
    half = width / 2

    def ring(sides: int, r: float, at: float) -> NDArray[np.float64]:
        unit = circle(sides, 0.5)
        return np.column_stack([x + r * unit[:, 0], np.full(sides, at), z + r * unit[:, 1]])

    tread = np.stack([ring(11, radius, y - half), ring(11, radius, y + half)])
    parts = [loft(tread, Material.MATTE, (0.02, 0.02, 0.022))]
    for side in (-1, 1):
        disc = ring(8, radius * 0.62, y + side * (half + 0.008))
        hub = np.broadcast_to(disc[:1], disc[1:-1].shape)
        parts.append(surface(np.stack([hub, disc[1:-1], disc[2:]], axis=1), Material.PAINT, rim))
    return join(parts)
