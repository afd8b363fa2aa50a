"""What stands still and is not annotated: buildings, trees, lamps, signals, signs, benches, bins, hedges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .meshes import Colour, Material, Mesh, box, circle, column, ellipsoid, join, loft, panel, surface, tube
from .paths import footprints_touch
from .roads import KERB_M, Road, RoadMap

NUM_FACADES = 8
STEEL: Colour = (0.28, 0.29, 0.3)
WALLS: tuple[Colour, ...] = (
    (0.42, 0.2, 0.13), (0.3, 0.16, 0.11), (0.55, 0.5, 0.42), (0.4, 0.4, 0.4), (0.62, 0.6, 0.55), (0.24, 0.26, 0.29),
    (0.5, 0.38, 0.26), (0.35, 0.4, 0.42), (0.6, 0.52, 0.36), (0.18, 0.2, 0.24),
)  # fmt: skip


@dataclass(frozen=True)
class Facades:
    """Patterns of walls, one row per style: pitch (m) and width of windows, height of storeys, and so on."""

    pitch_m: NDArray[np.float32]
    window_share: NDArray[np.float32]
    storey_m: NDArray[np.float32]
    height_share: NDArray[np.float32]
    brick: NDArray[np.bool_]
    lit_share: NDArray[np.float32]
    glass: NDArray[np.float32]  # (styles, 3)


@dataclass(frozen=True)
class Surroundings:
    """`style` (n,) uint8 chooses the facade of each triangle; `obstacles` (m, 5) x, y, yaw, half length and
    half width of what actors must not run into; `lamps` (k, 3) where street lamps hang."""

    mesh: Mesh
    style: NDArray[np.uint8]
    facades: Facades
    obstacles: NDArray[np.float64]
    lamps: NDArray[np.float64]


def draw_facades(rng: np.random.Generator) -> Facades:
    n = NUM_FACADES
    curtain = np.arange(n) >= n - 3  # glass towers
    glass = rng.uniform(0.02, 0.07, (n, 1)) * np.array([0.8, 1.0, 1.15])
    return Facades(
        pitch_m=np.where(curtain, rng.uniform(1.3, 2.2, n), rng.uniform(2.2, 4.2, n)).astype(np.float32),
        window_share=np.where(curtain, 0.92, rng.uniform(0.35, 0.62, n)).astype(np.float32),
        storey_m=rng.uniform(3.0, 3.9, n).astype(np.float32),
        height_share=np.where(curtain, 0.86, rng.uniform(0.42, 0.62, n)).astype(np.float32),
        brick=(rng.random(n) < 0.5) & ~curtain,
        lit_share=rng.uniform(0.15, 0.5, n).astype(np.float32),
        glass=glass.astype(np.float32),
    )


class _Site:
    """Collects parts and keeps their footprints apart."""

    def __init__(self, roads: RoadMap) -> None:
        self.roads = roads
        self.parts: list[Mesh] = []
        self.styles: list[NDArray[np.uint8]] = []
        self.footprints: list[tuple[float, float, float, float, float]] = []
        self.lamps: list[tuple[float, float, float]] = []

    def add(self, mesh: Mesh, style: int = 0) -> None:
        self.parts.append(mesh)
        self.styles.append(np.full(len(mesh), style, dtype=np.uint8))

    def free(self, x: float, y: float, yaw: float, half: tuple[float, float], kerb_m: float) -> bool:
        """Whether a footprint keeps its distance from the kerb and from all that stands; if so it is taken."""
        grid = np.linspace(-1, 1, 5)
        u, v = (axis.ravel() for axis in np.meshgrid(grid * half[0], grid * half[1]))
        cos, sin = np.cos(yaw), np.sin(yaw)
        if self.roads.kerb_distance(x + u * cos - v * sin, y + u * sin + v * cos).min() < kerb_m:
            return False
        if self.footprints:
            others = np.array(self.footprints)
            if footprints_touch(
                np.array([[x, y, yaw]]), np.array([half]), others[:, :3], others[:, 3:]
            ).any():
                return False
        self.footprints.append((x, y, yaw, *half))
        return True


def _tree(rng: np.random.Generator) -> Mesh:
    """A trunk with a few boughs and a crown of loose leaves round darker cores, 1 unit = 1 m, about 7 m high."""
    height, spread = rng.uniform(5.0, 8.5), rng.uniform(1.6, 2.6)
    bark: Colour = (0.12, 0.09, 0.065)
    stem = height * 0.38
    parts = [tube((0, 0, -0.1), (0, 0, stem + 1.0), (0.17, 0.1), Material.MATTE, bark, 7)]
    hue = rng.uniform(0.8, 1.25)
    green = np.array([0.075 * hue, 0.13, 0.03]) * rng.uniform(0.75, 1.2)
    middle, crown = (
        np.array([0, 0, (stem + height) / 2 + 0.3]),
        np.array([spread, spread, (height - stem) / 2]),
    )
    lumps = [(middle, crown * 0.72)]
    for _ in range(6):
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        lumps.append((middle + direction * crown * 0.55, crown * rng.uniform(0.42, 0.58)))
    for centre, radii in lumps:
        parts.append(tube((0, 0, stem * 0.9), centre, (0.07, 0.03), Material.MATTE, bark, 4))
        dark = (float(green[0] * 0.5), float(green[1] * 0.5), float(green[2] * 0.5))
        parts.append(ellipsoid(centre, radii * 0.8, Material.FOLIAGE, dark, 3, 6))
        leaves = 36
        normal = rng.normal(size=(leaves, 3))
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
        at = centre + normal * radii * rng.uniform(0.78, 1.08, (leaves, 1))
        corners = at[:, None] + rng.normal(scale=0.3, size=(leaves, 3, 3))
        # Higher and outer leaves are brighter: the light comes from above.
        shade = (0.75 + 0.45 * normal[:, 2:3]) * rng.uniform(0.7, 1.3, (leaves, 1))
        parts.append(
            surface(corners, Material.FOLIAGE, (green * np.clip(shade, 0.35, 1.6)).astype(np.float32))
        )
    return join(parts)


def _hedge(length: float, rng: np.random.Generator) -> Mesh:
    height = rng.uniform(0.7, 1.5)
    green = np.array([0.05, 0.1, 0.025]) * rng.uniform(0.8, 1.4)
    dark = (float(green[0] * 0.6), float(green[1] * 0.6), float(green[2] * 0.6))
    body = box((0, 0, height / 2), (length, 0.8, height), Material.FOLIAGE, dark, top=0.97)
    count = int(length * 20)
    at = rng.uniform(-0.5, 0.5, (count, 3)) * (length, 0.86, height)
    side = rng.integers(0, 3, count)
    at[side == 0, 1] = np.sign(at[side == 0, 1]) * 0.42
    at[side == 1, 2] = height / 2
    corners = (at + np.array((0, 0, height / 2)))[:, None] + rng.normal(scale=0.11, size=(count, 3, 3))
    return join(
        [
            body,
            surface(
                corners, Material.FOLIAGE, (green * rng.uniform(0.6, 1.5, (count, 1))).astype(np.float32)
            ),
        ]
    )


def _lamp() -> Mesh:
    return join([
        tube((0, 0, 0), (0, 0, 7.6), (0.1, 0.06), Material.MATTE, STEEL, 6),
        tube((0, 0, 7.5), (1.9, 0, 8.0), 0.045, Material.MATTE, STEEL, 5),
        box((2.1, 0, 8.0), (0.8, 0.26, 0.1), Material.MATTE, STEEL),
        box((2.1, 0, 7.93), (0.6, 0.2, 0.05), Material.LAMP, (0.9, 0.8, 0.6)),
    ])  # fmt: skip


def _signal(rng: np.random.Generator) -> Mesh:
    """A traffic signal whose heads face -x."""
    lit = int(rng.integers(3))
    colours: list[Colour] = [(0.9, 0.05, 0.03), (0.9, 0.5, 0.03), (0.05, 0.8, 0.3)]
    parts = [
        tube((0, 0, 0), (0, 0, 5.4), (0.09, 0.07), Material.MATTE, STEEL),
        tube((0, 0, 5.3), (0, 3.2, 5.5), 0.06, Material.MATTE, STEEL),
    ]
    for y, z in ((0.0, 2.6), (3.2, 5.0)):
        parts.append(box((-0.15, y, z + 0.45), (0.22, 0.36, 1.0), Material.MATTE, (0.02, 0.02, 0.02)))
        for k in range(3):
            colour = colours[k] if k == lit else (0.03, 0.03, 0.03)
            material = Material.LAMP if k == lit else Material.MATTE
            parts.append(box((-0.27, y, z + 0.75 - 0.3 * k), (0.03, 0.2, 0.2), material, colour))
    return join(parts)


def _sign(rng: np.random.Generator) -> Mesh:
    kind = int(rng.integers(3))
    parts = [tube((0, 0, 0), (0, 0, 2.6), 0.035, Material.MATTE, (0.4, 0.4, 0.4), 5)]
    if kind == 0:  # no entry
        disc = circle(12, 0.5) * 0.33
        ring = [np.column_stack([np.full(12, x), disc + np.array((0, 2.35))]) for x in (-0.05, -0.03)]
        parts.append(loft(np.stack(ring), Material.RETROREFLECTOR, (0.6, 0.03, 0.03)))
        parts.append(box((-0.06, 0, 2.35), (0.02, 0.46, 0.12), Material.RETROREFLECTOR, (0.8, 0.8, 0.8)))
    elif kind == 1:  # direction
        parts.append(box((-0.05, 0, 2.3), (0.03, 1.1, 0.5), Material.RETROREFLECTOR, (0.02, 0.12, 0.35)))
        parts.append(box((-0.07, 0, 2.36), (0.01, 0.8, 0.1), Material.RETROREFLECTOR, (0.8, 0.8, 0.8)))
    else:  # priority
        parts.append(box((-0.05, 0, 2.35), (0.02, 0.5, 0.5), Material.RETROREFLECTOR, (0.75, 0.55, 0.03)))
    return join(parts)


def _bench() -> Mesh:
    wood: Colour = (0.26, 0.15, 0.07)
    slats = [box((x, 0, 0.45), (0.12, 1.6, 0.04), Material.MATTE, wood) for x in (-0.17, 0.0, 0.17)]
    legs = [box((0, y, 0.22), (0.45, 0.06, 0.44), Material.MATTE, STEEL) for y in (-0.7, 0.7)]
    backs = [
        box((-0.27 - 0.03 * k, 0, 0.62 + 0.15 * k), (0.04, 1.6, 0.1), Material.MATTE, wood) for k in range(2)
    ]
    return join(slats + legs + backs)


def _bin(rng: np.random.Generator) -> Mesh:
    colour: Colour = ((0.03, 0.12, 0.06), (0.05, 0.05, 0.06), (0.03, 0.08, 0.2))[int(rng.integers(3))]
    if rng.random() < 0.5:
        return column([(0, 0.26, 0.26), (0.85, 0.3, 0.3), (0.95, 0.2, 0.2)], Material.MATTE, colour)
    return join(
        [
            box((0, 0, 0.5), (0.7, 0.58, 0.95), Material.MATTE, colour, top=1.1),
            box((0, 0, 1.02), (0.78, 0.64, 0.08), Material.MATTE, colour),
        ]
    )


def _cabinet(rng: np.random.Generator) -> Mesh:
    colour: Colour = ((0.3, 0.33, 0.32), (0.1, 0.17, 0.12))[int(rng.integers(2))]
    return box((0, 0, 0.62), (0.4, rng.uniform(0.8, 1.5), 1.24), Material.MATTE, colour)


def _shelter() -> Mesh:
    """A bus stop, open towards +x."""
    parts = [
        tube((x, y, 0), (x, y, 2.4), 0.05, Material.MATTE, STEEL, 5) for x in (-0.6, 0.6) for y in (-1.9, 1.9)
    ]
    parts.append(box((0, 0, 2.45), (1.6, 4.2, 0.1), Material.MATTE, (0.2, 0.22, 0.24)))
    parts.append(box((-0.62, 0, 1.25), (0.02, 3.7, 1.9), Material.GLASS, (0.08, 0.1, 0.1)))
    parts.append(box((0, -1.92, 1.2), (1.1, 0.1, 1.9), Material.MATTE, (0.5, 0.35, 0.3)))
    return join(parts)


def _building(
    length: float, depth: float, height: float, colour: Colour, rng: np.random.Generator
) -> list[tuple[Mesh, bool]]:
    """Parts of a building standing at the origin; True marks walls that carry windows."""
    roof: Colour = (0.22, 0.21, 0.2)
    parts = [(box((0, 0, height / 2), (length, depth, height), Material.FACADE, colour), True)]
    parts.append((box((0, 0, height + 0.25), (length + 0.3, depth + 0.3, 0.5), Material.MATTE, roof), False))
    if height > 14 and rng.random() < 0.5:  # a set-back tower above a base
        top = rng.uniform(0.3, 0.8) * height
        parts.append(
            (
                box(
                    (0, 0, height + top / 2 + 0.5), (length * 0.6, depth * 0.7, top), Material.FACADE, colour
                ),
                True,
            )
        )
        parts.append(
            (box((0, 0, height + top + 0.7), (length * 0.62, depth * 0.72, 0.4), Material.MATTE, roof), False)
        )
    elif rng.random() < 0.6:
        where = (rng.uniform(-0.3, 0.3) * length, rng.uniform(-0.2, 0.2) * depth, height + 1.3)
        parts.append((box(where, (3.0, 2.5, 2.0), Material.MATTE, (0.4, 0.4, 0.4)), False))
    if height < 11 and rng.random() < 0.5:  # gable roof
        ridge = height + rng.uniform(2.0, 3.5)
        x, y = length / 2 + 0.3, depth / 2 + 0.3
        tiles: Colour = ((0.28, 0.11, 0.07), (0.13, 0.12, 0.12))[int(rng.integers(2))]
        for side in (-1, 1):
            corners = [
                (-x, side * y, height + 0.5),
                (x, side * y, height + 0.5),
                (x, 0, ridge),
                (-x, 0, ridge),
            ]
            parts.append((panel(corners, Material.MATTE, tiles), False))
        for end in (-x + 0.3, x - 0.3):
            gable = np.array([[(end, -y, height + 0.4), (end, y, height + 0.4), (end, 0, ridge)]])
            parts.append((surface(gable, Material.MATTE, colour), False))
    if rng.random() < 0.35:  # shop awning on the street side (-y)
        awning: Colour = ((0.4, 0.05, 0.05), (0.05, 0.2, 0.12), (0.55, 0.5, 0.4))[int(rng.integers(3))]
        corners = [(-length * 0.4, -depth / 2, 3.0), (length * 0.4, -depth / 2, 3.0),
                   (length * 0.4, -depth / 2 - 1.2, 2.5), (-length * 0.4, -depth / 2 - 1.2, 2.5)]  # fmt: skip
        parts.append((panel(corners, Material.CLOTH, awning), False))
    return parts


def draw_surroundings(roads: RoadMap, rng: np.random.Generator) -> Surroundings:
    site = _Site(roads)
    trees = [_tree(rng) for _ in range(4)]
    for road in roads.roads:
        for side in (-1, 1):
            _line_with_buildings(site, road, side, rng)
    _backdrop(site, rng)
    for number, road in enumerate(roads.roads):
        for side in (-1, 1):
            _furnish(site, road, side, trees, rng, signals=number == 0)
    obstacles = np.array(site.footprints) if site.footprints else np.zeros((0, 5))
    return Surroundings(
        join(site.parts),
        np.concatenate(site.styles),
        draw_facades(rng),
        obstacles,
        np.array(site.lamps).reshape(-1, 3),
    )


def _line_with_buildings(site: _Site, road: Road, side: int, rng: np.random.Generator) -> None:
    setback = float(rng.choice([5.0, 7.0, 12.0]))
    s = -130.0 if road.start_m is None else 5.0
    while s < 130.0:
        length, depth = rng.uniform(11, 30), rng.uniform(10, 18)
        height = float(
            rng.choice([rng.uniform(6, 11), rng.uniform(11, 24), rng.uniform(24, 55)], p=[0.4, 0.42, 0.18])
        )
        distance = setback + rng.uniform(0, 2)
        point, heading = road.place(s + length / 2, side * (road.half_width_m + distance + depth / 2))
        # The street side of a building is its -y side.
        yaw = float(heading) + (0 if side > 0 else np.pi)
        colour = WALLS[int(rng.integers(len(WALLS)))]
        style = int(rng.integers(NUM_FACADES))
        x, y = float(point[0]), float(point[1])
        if rng.random() < 0.14:  # an empty plot
            s += length
            continue
        if site.free(x, y, yaw, (length / 2 + 0.3, depth / 2 + 0.3), 4.5):
            for mesh, windows in _building(length, depth, height, colour, rng):
                site.add(mesh.moved((x, y, 0), yaw), style if windows else 0)
            s += length + float(rng.choice([0.7, 1.0, 5.0]))
        else:
            s += 4.0


def _backdrop(site: _Site, rng: np.random.Generator) -> None:
    """Blocks far away, so that streets end in a town and not in a plain."""
    for angle in np.linspace(0, 2 * np.pi, 44, endpoint=False):
        distance = rng.uniform(165, 230)
        height, width = rng.choice([rng.uniform(8, 18), rng.uniform(18, 50)]), rng.uniform(16, 34)
        x, y = distance * np.cos(angle), distance * np.sin(angle)
        colour = WALLS[int(rng.integers(len(WALLS)))]
        mesh = box((0, 0, height / 2), (14, width, height), Material.FACADE, colour)
        if site.free(float(x), float(y), float(angle), (7, width / 2), 3.0):
            site.add(mesh.moved((x, y, 0), float(angle)), int(rng.integers(NUM_FACADES)))


def _furnish(
    site: _Site, road: Road, side: int, trees: list[Mesh], rng: np.random.Generator, signals: bool
) -> None:
    """Trees, lamps, signs, benches, bins and hedges along one side of a road."""

    def stand(mesh: Mesh, s: float, kerb_m: float, half: tuple[float, float], turn: float = 0.0) -> bool:
        """Puts something beside the road; with no turn its +x looks at the carriageway."""
        point, heading = road.place(s, side * (road.half_width_m + kerb_m))
        x, y, yaw = float(point[0]), float(point[1]), float(heading) - side * np.pi / 2 + turn
        if not site.free(x, y, yaw, half, min(kerb_m - 0.15, 1.0)):
            return False
        site.add(mesh.moved((x, y, KERB_M), yaw))
        return True

    start, end = (-105.0 if road.start_m is None else 8.0), 105.0
    phase = rng.uniform(0, 20)
    for s in np.arange(start + phase, end, 26.0):
        if stand(_lamp(), s, 0.6, (0.12, 0.12)):
            point, _ = road.place(s, side * (road.half_width_m - 1.5))
            site.lamps.append((float(point[0]), float(point[1]), 8.0))
    if rng.random() < 0.65:
        spacing = rng.uniform(8, 15)
        for s in np.arange(start + phase / 2, end, spacing):
            if rng.random() < 0.75:
                tree = trees[int(rng.integers(len(trees)))].scaled([rng.uniform(0.75, 1.2)] * 3)
                stand(tree, s + rng.uniform(-1, 1), 1.1, (0.25, 0.25), rng.uniform(0, 6))
    for s in np.arange(start, end, 7.0):  # greenery in front of buildings and on empty plots
        if rng.random() < 0.2:
            tree = trees[int(rng.integers(len(trees)))].scaled([rng.uniform(0.6, 1.1)] * 3)
            stand(tree, s + rng.uniform(-3, 3), rng.uniform(6, 16), (1.2, 1.2), rng.uniform(0, 6))
        if rng.random() < 0.3:
            length = rng.uniform(3, 7)
            stand(_hedge(length, rng), s, 4.4, (0.45, length / 2), np.pi / 2)
    for s in np.arange(start, end, 5.0):
        draw = rng.random()
        where = s + rng.uniform(-2, 2)
        if draw < 0.05:
            stand(_bench(), where, 3.9, (0.4, 0.9))
        elif draw < 0.12:
            stand(_bin(rng), where, 0.8, (0.4, 0.4))
        elif draw < 0.17:
            stand(_cabinet(rng), where, 4.0, (0.3, 0.8))
        elif draw < 0.26:
            stand(_sign(rng), where, 0.7, (0.1, 0.55), side * np.pi / 2)
        elif draw < 0.29:
            stand(
                tube((0, 0, 0), (0, 0, 1.0), 0.07, Material.MATTE, (0.3, 0.28, 0.1)), where, 0.4, (0.1, 0.1)
            )
        elif draw < 0.31 and signals:
            stand(_shelter(), where, 2.6, (0.9, 2.2))
    if signals:
        for place, crossing in zip(site.roads.junctions_s_m, site.roads.roads[1:], strict=True):
            # Traffic on the right: the signal stands before the junction, on the right of those who come.
            s = place + side * (crossing.half_width_m + 7.0)
            stand(_signal(rng), s, 0.7, (0.2, 0.2), side * np.pi / 2)
