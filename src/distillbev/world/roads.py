"""Roads as fields: at every point of the plane, how far the kerb is and which road one is on.

A scene has a main road (straight or curved) and up to two side roads that cross it or end at it. Everything
else follows from one number, the signed distance to the kerb: negative on the carriageway, positive on the
raised pavement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .meshes import Material, Mesh, join, surface

KERB_M = 0.14  # height of the pavement above the carriageway
LANE_M = 3.4
PARKING_M = 2.4
CORNER_M = 7.0  # width over which two kerbs blend where roads meet


@dataclass(frozen=True)
class Road:
    """A straight or circular road; s runs along it from `origin`, d is the offset to its left.

    `start_m` is None for a road that goes on behind its origin, else it begins there (a T junction).
    """

    origin: tuple[float, float]
    heading_rad: float
    curvature: float  # 1/m, positive bends left, 0 is straight
    lanes_each_way: int
    parking: bool
    start_m: float | None = None

    @property
    def half_width_m(self) -> float:
        return self.lanes_each_way * LANE_M + (PARKING_M if self.parking else 0.3)

    def locate(self, x: NDArray[np.floating], y: NDArray[np.floating]) -> tuple[NDArray, NDArray]:
        """(...) coordinates -> (...) s and d."""
        cos, sin = np.cos(self.heading_rad), np.sin(self.heading_rad)
        dx, dy = x - x.dtype.type(self.origin[0]), y - y.dtype.type(self.origin[1])
        along, left = (
            dx * x.dtype.type(cos) + dy * x.dtype.type(sin),
            dy * x.dtype.type(cos) - dx * x.dtype.type(sin),
        )
        if self.curvature == 0:
            return along, left
        radius = x.dtype.type(1 / self.curvature)
        toward = np.sign(radius) * (radius - left)
        s = np.abs(radius) * np.arctan2(along, toward)
        d = radius - np.sign(radius) * np.hypot(along, radius - left)
        return s, d

    def place(
        self, s: NDArray[np.float64] | float, d: NDArray[np.float64] | float
    ) -> tuple[NDArray, NDArray]:
        """s and d (broadcast) -> (..., 2) points and (...) headings of the road there."""
        s, d = np.broadcast_arrays(np.asarray(s, dtype=np.float64), np.asarray(d, dtype=np.float64))
        if self.curvature == 0:
            along, left, turn = s, d, np.zeros_like(s)
        else:
            radius = 1 / self.curvature
            turn = s * self.curvature
            along, left = (radius - d) * np.sin(turn), radius - (radius - d) * np.cos(turn)
        cos, sin = np.cos(self.heading_rad), np.sin(self.heading_rad)
        points = np.stack(
            [self.origin[0] + along * cos - left * sin, self.origin[1] + along * sin + left * cos], axis=-1
        )
        return points, turn + self.heading_rad

    def kerb_distance(self, s: NDArray, d: NDArray) -> NDArray:
        """(...) metres beyond this road's own kerb, negative on it."""
        distance = np.abs(d) - d.dtype.type(self.half_width_m)
        return distance if self.start_m is None else np.maximum(distance, s.dtype.type(self.start_m) - s)


@dataclass(frozen=True)
class RoadMap:
    """All roads of a scene, the main one first; `junctions_s_m` are the side roads' places along it."""

    roads: tuple[Road, ...]
    junctions_s_m: tuple[float, ...]

    def kerb_distance(self, x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray:
        """(...) metres beyond the nearest kerb, negative on a carriageway; corners rounded."""
        distances = [road.kerb_distance(*road.locate(x, y)) for road in self.roads]
        return blend(distances)

    def distance_at(self, x: float, y: float) -> float:
        return float(self.kerb_distance(np.array([x]), np.array([y]))[0])


def blend(distances: list[NDArray]) -> NDArray:
    """The smooth minimum of fields: equal to the minimum where they differ by more than CORNER_M."""
    result = distances[0]
    for other in distances[1:]:
        near = np.maximum(CORNER_M - np.abs(result - other), 0)
        result = np.minimum(result, other) - near * near / (4 * CORNER_M)
    return result


def draw_roads(rng: np.random.Generator) -> RoadMap:
    """Draws a main road and its side roads; the main road passes the origin."""
    shape = rng.choice(["straight", "curve"], p=[0.6, 0.4])
    curvature = 0.0 if shape == "straight" else float(rng.choice([-1, 1])) / rng.uniform(70, 220)
    main = Road(
        (0.0, 0.0),
        rng.uniform(-np.pi, np.pi),
        curvature,
        int(rng.choice([1, 2], p=[0.5, 0.5])),
        bool(rng.random() < 0.75),
    )
    count = int(rng.choice([0, 1, 2], p=[0.2, 0.55, 0.25]))
    places = [float(rng.uniform(8, 38))] if count else []
    if count == 2:
        places.append(places[0] - float(rng.uniform(60, 85)))
    roads = [main]
    for s in places:
        point, heading = main.place(s, 0.0)
        side = float(rng.choice([-1, 1]))
        through = rng.random() < 0.5
        angle = float(heading) + side * np.pi / 2 + rng.uniform(-0.12, 0.12)
        start = None if through else 0.0
        roads.append(Road((float(point[0]), float(point[1])), angle, 0.0, int(rng.choice([1, 2], p=[0.75, 0.25])),
                          bool(rng.random() < 0.4), start))  # fmt: skip
    return RoadMap(tuple(roads), tuple(places))


def ground_mesh(roads: RoadMap, half_extent_m: float) -> Mesh:
    """The carriageway as one plane, the pavements raised above it, and the faces of the kerbs.

    The raised area {kerb distance > 0} is cut out of a triangle grid (marching triangles), with coarse squares
    where no kerb is near.
    """
    coarse, fine = 8.0, 1.0
    count = int(np.ceil(2 * half_extent_m / coarse))
    per = int(coarse / fine)
    axis = -count * coarse / 2 + fine * np.arange(count * per + 1)
    field = roads.kerb_distance(*np.meshgrid(axis, axis))  # rows are y
    tiles = np.lib.stride_tricks.sliding_window_view(field, (per + 1, per + 1))[::per, ::per]
    low, high = tiles.min(axis=(2, 3)), tiles.max(axis=(2, 3))
    corner = axis[:-1:per]

    row, column = np.nonzero(low > 0)
    flat = _squares(corner[column], corner[row], coarse)

    row, column = np.nonzero((low <= 0) & (high > 0))
    inner = np.arange(per)
    rows = (row[:, None, None] * per + inner[None, :, None]).repeat(per, axis=2).ravel()
    columns = (column[:, None, None] * per + inner[None, None, :]).repeat(per, axis=1).ravel()
    ids = (
        np.stack([rows, rows, rows + 1, rows + 1], axis=1),
        np.stack([columns, columns + 1, columns + 1, columns], axis=1),
    )
    xy = np.stack([axis[ids[1]], axis[ids[0]]], axis=-1)  # (n, 4, 2)
    value = field[ids]
    triangles = np.concatenate([xy[:, [0, 1, 2]], xy[:, [0, 2, 3]]])
    values = np.concatenate([value[:, [0, 1, 2]], value[:, [0, 2, 3]]])
    tops, edges = _cut(triangles, values)

    def raised(points: NDArray[np.floating], z: float) -> NDArray[np.floating]:
        return np.concatenate([points, np.full((*points.shape[:-1], 1), z)], axis=-1)

    a, b = edges[:, 0], edges[:, 1]
    faces = np.concatenate([
        np.stack([raised(a, -0.02), raised(b, -0.02), raised(b, KERB_M)], axis=1),
        np.stack([raised(a, -0.02), raised(b, KERB_M), raised(a, KERB_M)], axis=1),
    ])  # fmt: skip
    far = half_extent_m * 4
    plane = np.array([[[-far, -far], [far, -far], [far, far]], [[-far, -far], [far, far], [-far, far]]])
    return join([
        surface(raised(plane, 0.0), Material.GROUND, (0, 0, 0)),
        surface(raised(np.concatenate([flat, tops]), KERB_M), Material.GROUND, (0, 0, 0)),
        surface(faces, Material.MATTE, (0.3, 0.3, 0.29)),
    ])  # fmt: skip


def _squares(x: NDArray[np.floating], y: NDArray[np.floating], side: float) -> NDArray[np.floating]:
    """(n,) lower left corners -> (2n, 3, 2) triangles."""
    a, b = np.stack([x, y], axis=-1), np.stack([x + side, y], axis=-1)
    c, d = np.stack([x + side, y + side], axis=-1), np.stack([x, y + side], axis=-1)
    return np.concatenate([np.stack([a, b, c], axis=1), np.stack([a, c, d], axis=1)])


def _cut(triangles: NDArray[np.floating], values: NDArray[np.floating]) -> tuple[NDArray, NDArray]:
    """The part of each triangle (n, 3, 2) where the linear field (n, 3) is positive, and the cut edges (m, 2, 2)."""
    positive = values > 0
    count = positive.sum(axis=1)
    parts, edges = [triangles[count == 3]], []
    for number in (1, 2):
        chosen = count == number
        tri, val = triangles[chosen], values[chosen]
        # Rotate the corner that stands alone to the front.
        alone = np.argmax(positive[chosen] if number == 1 else ~positive[chosen], axis=1)
        order = (alone[:, None] + np.arange(3)) % 3
        tri, val = np.take_along_axis(tri, order[..., None], axis=1), np.take_along_axis(val, order, axis=1)
        p = [
            tri[:, 0] + (val[:, 0] / (val[:, 0] - val[:, k]))[:, None] * (tri[:, k] - tri[:, 0])
            for k in (1, 2)
        ]
        edges.append(np.stack(p, axis=1))
        if number == 1:
            parts.append(np.stack([tri[:, 0], p[0], p[1]], axis=1))
        else:
            parts.append(np.stack([p[0], tri[:, 1], tri[:, 2]], axis=1))
            parts.append(np.stack([p[0], tri[:, 2], p[1]], axis=1))
    return np.concatenate(parts), np.concatenate(edges)
