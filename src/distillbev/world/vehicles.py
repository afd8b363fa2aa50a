"""Shapes of cars, trucks, buses, trailers and construction vehicles, each drawn with its own sizes and colours."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .meshes import Colour, Material, Mesh, box, frustum, hull, join, loft, panel, tube, wheel

# Paints as they are met on roads, with how often: white, silver, grey, black, blue, red, green, beige, orange.
PAINTS: tuple[tuple[Colour, float], ...] = (
    ((0.78, 0.79, 0.78), 0.24),
    ((0.45, 0.47, 0.49), 0.17),
    ((0.16, 0.17, 0.18), 0.15),
    ((0.025, 0.026, 0.03), 0.16),
    ((0.03, 0.08, 0.28), 0.10),
    ((0.38, 0.025, 0.025), 0.09),
    ((0.04, 0.14, 0.08), 0.03),
    ((0.42, 0.35, 0.24), 0.04),
    ((0.70, 0.26, 0.03), 0.02),
)
TRIM: Colour = (0.025, 0.025, 0.028)
WINDOW: Colour = (0.03, 0.04, 0.045)
WHITE_LIGHT: Colour = (0.9, 0.9, 0.85)
RED_LIGHT: Colour = (0.55, 0.02, 0.02)
PLATE: Colour = (0.75, 0.75, 0.65)


def draw_paint(rng: np.random.Generator) -> Colour:
    weights = np.array([weight for _, weight in PAINTS])
    colour = np.array(PAINTS[int(rng.choice(len(PAINTS), p=weights / weights.sum()))][0])
    red, green, blue = np.clip(colour * rng.uniform(0.8, 1.15) * rng.uniform(0.94, 1.06, 3), 0.01, 0.9)
    return float(red), float(green), float(blue)


def _end_panel(
    x: float, y: float, z: float, width: float, height: float, material: Material, colour: Colour
) -> Mesh:
    """A small upright rectangle facing along x."""
    w, h = width / 2, height / 2
    return panel(
        [(x, y - w, z - h), (x, y + w, z - h), (x, y + w, z + h), (x, y - w, z + h)], material, colour
    )


def _side_panel(
    x0: float, x1: float, y: float, z0: float, z1: float, material: Material, colour: Colour
) -> Mesh:
    """An upright rectangle facing along y."""
    return panel([(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)], material, colour)


def _lights(
    front: float, rear: float, half_width: float, height: float, size: tuple[float, float]
) -> list[Mesh]:
    """Head and tail lights in pairs, and both number plates."""
    parts = []
    for side in (-1, 1):
        y = side * (half_width - size[0] / 2 - 0.06)
        parts.append(_end_panel(front, y, height, *size, Material.HEADLIGHT, WHITE_LIGHT))
        parts.append(
            _end_panel(rear, y, height + 0.1, size[0] * 0.8, size[1] * 1.2, Material.TAILLIGHT, RED_LIGHT)
        )
    for x in (front, rear):
        parts.append(_end_panel(x, 0.0, height - 0.22, 0.48, 0.12, Material.RETROREFLECTOR, PLATE))
    return parts


def _wheels(xs: tuple[float, ...], half_width: float, radius: float, width: float) -> list[Mesh]:
    return [
        wheel((x, side * (half_width - width / 2 + 0.01), radius), radius, width)
        for x in xs
        for side in (-1, 1)
    ]


def _greenhouse(
    base: tuple[float, float, float, float],
    lid: tuple[float, float, float, float],
    paint: Colour,
    posts: tuple[float, ...],
) -> list[Mesh]:
    """Glass all round between belt and roof, framed by painted pillars; `posts` are shares of the length."""
    parts = [frustum(base, lid, Material.GLASS, WINDOW)]
    (rear0, front0, half0, z0), (rear1, front1, half1, z1) = base, lid
    for side in (-1, 1):
        for share in (0.0, *posts, 1.0):
            low = (rear0 + share * (front0 - rear0), side * half0, z0)
            high = (rear1 + share * (front1 - rear1), side * half1, z1)
            parts.append(tube(low, high, 0.045, Material.PAINT, paint, sides=4))
        parts.append(
            tube((rear1, side * half1, z1), (front1, side * half1, z1), 0.045, Material.PAINT, paint, sides=4)
        )
    roof = (rear1 - 0.02, front1 + 0.02, half1 + 0.01, z1 - 0.01)
    parts.append(frustum(roof, (rear1 + 0.12, front1 - 0.12, half1 - 0.1, z1 + 0.05), Material.PAINT, paint))
    return parts


def car(rng: np.random.Generator) -> Mesh:
    """Hatchback, saloon, estate, sport utility vehicle or van."""
    kind = rng.choice(["hatch", "saloon", "estate", "suv", "van"], p=[0.24, 0.30, 0.12, 0.24, 0.10])
    length = {"hatch": 4.0, "saloon": 4.65, "estate": 4.7, "suv": 4.6, "van": 5.0}[kind] * rng.uniform(
        0.93, 1.07
    )
    width = {"hatch": 1.74, "saloon": 1.83, "estate": 1.84, "suv": 1.92, "van": 1.98}[kind] * rng.uniform(
        0.96, 1.04
    )
    height = {"hatch": 1.49, "saloon": 1.45, "estate": 1.5, "suv": 1.74, "van": 1.98}[kind] * rng.uniform(
        0.97, 1.04
    )
    paint = draw_paint(rng)
    tail, nose, half = -length / 2, length / 2, width / 2
    clearance = 0.30 if kind == "suv" else 0.2
    belt = height * rng.uniform(0.57, 0.61)
    bonnet = belt * rng.uniform(0.9, 0.97)
    bonnet_length = {"hatch": 0.95, "saloon": 1.2, "estate": 1.15, "suv": 1.15, "van": 0.75}[kind]
    boot = {"hatch": 0.12, "saloon": 0.95, "estate": 0.12, "suv": 0.12, "van": 0.06}[kind]
    stations = [
        (tail, half * 0.86, clearance + 0.1, belt * 0.86),
        (tail + 0.12, half * 0.96, clearance + 0.02, belt * 0.98),
        (tail + 0.7, half, clearance, belt),
        (nose - bonnet_length, half, clearance, belt),
        (nose - 0.45, half * 0.97, clearance, bonnet),
        (nose - 0.1, half * 0.9, clearance + 0.05, bonnet * 0.84),
        (nose, half * 0.78, clearance + 0.12, bonnet * 0.72),
    ]
    parts = [hull(stations, Material.PAINT, paint, chamfer=0.08)]
    parts.append(
        hull(
            [
                (tail + 0.05, half * 0.9, clearance - 0.06, clearance + 0.14),
                (nose - 0.05, half * 0.86, clearance - 0.06, clearance + 0.14),
            ],
            Material.MATTE,
            TRIM,
        )
    )
    slope = {"hatch": 0.35, "saloon": 0.75, "estate": 0.3, "suv": 0.3, "van": 0.12}[kind]
    base = (tail + boot, nose - bonnet_length + 0.1, half * 0.95, belt - 0.02)
    windscreen = 0.55 if kind == "van" else 0.8
    lid = (tail + boot + slope, base[1] - windscreen, half * 0.8, height - 0.05)
    posts = (0.5,) if kind in ("hatch", "saloon") else (0.33, 0.66)
    parts += _greenhouse(base, lid, paint, posts)
    if kind == "van" and rng.random() < 0.6:  # a panel van has no rear side windows
        for side in (-1, 1):
            y0, y1 = side * (half * 0.95 + 0.012), side * (half * 0.8 + 0.012)
            x0, x1 = base[0] + 0.05, base[0] + (base[1] - base[0]) * 0.6
            corners = [(x0, y0, base[3]), (x1, y0, base[3]), (x1, y1, lid[3]), (lid[0], y1, lid[3])]
            parts.append(panel(corners, Material.PAINT, paint))
    for side in (-1, 1):
        parts.append(
            box((base[1] - 0.35, side * (half + 0.02), belt + 0.06), (0.1, 0.14, 0.13), Material.PAINT, paint)
        )
        parts.append(
            _side_panel(
                tail + 0.5,
                nose - 0.6,
                side * (half + 0.002),
                clearance,
                clearance + 0.1,
                Material.MATTE,
                TRIM,
            )
        )
    parts.append(_end_panel(nose + 0.004, 0.0, bonnet * 0.56, half * 1.1, 0.16, Material.MATTE, TRIM))
    parts += _lights(nose - 0.005, tail - 0.004, half * 0.92, belt * 0.78, (0.34, 0.14))
    radius = 0.30 + 0.02 * (kind == "saloon") + 0.06 * (kind == "suv")
    parts += _wheels((tail + 0.18 * length, nose - 0.19 * length), half, radius, 0.21)
    return join(parts)


def _cab(front: float, length: float, half: float, height: float, paint: Colour) -> list[Mesh]:
    """A forward-control lorry cab with its front at x = front."""
    rear, belt = front - length, height * 0.55
    parts = [
        hull(
            [
                (rear, half * 0.97, 0.5, height),
                (front - 0.35, half, 0.45, height),
                (front - 0.08, half * 0.97, 0.4, height * 0.93),
                (front, half * 0.9, 0.45, height * 0.5),
            ],
            Material.PAINT,
            paint,
            chamfer=0.1,
        ),
        panel(
            [
                (front + 0.01, -half * 0.86, belt),
                (front + 0.01, half * 0.86, belt),
                (front - 0.07, half * 0.84, height * 0.86),
                (front - 0.07, -half * 0.84, height * 0.86),
            ],
            Material.GLASS,
            WINDOW,
        ),
        _end_panel(front + 0.006, 0.0, height * 0.34, half * 1.3, height * 0.16, Material.MATTE, TRIM),
        box((front - 0.1, 0, 0.5), (0.24, half * 1.9, 0.26), Material.MATTE, (0.06, 0.06, 0.065)),
    ]
    for side in (-1, 1):
        x0 = max(rear + 0.15, front - 1.3)
        parts.append(
            _side_panel(x0, front - 0.3, side * (half + 0.008), belt, height * 0.83, Material.GLASS, WINDOW)
        )
        parts.append(
            box((front - 0.12, side * (half + 0.08), belt + 0.35), (0.1, 0.12, 0.4), Material.MATTE, TRIM)
        )
    return parts


def _livery(x0: float, x1: float, half: float, z0: float, z1: float, rng: np.random.Generator) -> list[Mesh]:
    """A band and a block of another colour on both sides of a cargo box."""
    if rng.random() < 0.35:
        return []
    colour, other = draw_paint(rng), draw_paint(rng)
    low = z0 + (z1 - z0) * rng.uniform(0.15, 0.5)
    parts = []
    for side in (-1, 1):
        y = side * (half + 0.006)
        parts.append(_side_panel(x0, x1, y, low, low + (z1 - z0) * 0.18, Material.PAINT, colour))
        middle, wide = (x0 + x1) / 2, (x1 - x0) * 0.2
        parts.append(
            _side_panel(middle - wide, middle + wide, y * 1.002, low + 0.4, z1 - 0.25, Material.PAINT, other)
        )
    return parts


def truck(rng: np.random.Generator) -> Mesh:
    """Pickup, box van, flatbed or tipper."""
    kind = rng.choice(["pickup", "box", "flatbed", "tipper"], p=[0.28, 0.42, 0.15, 0.15])
    if kind == "pickup":
        return _pickup(rng)
    length, width = rng.uniform(5.8, 9.2), rng.uniform(2.15, 2.5)
    half, nose, tail = width / 2, length / 2, -length / 2
    cab_length, cab_height = rng.uniform(1.5, 2.0), rng.uniform(2.3, 2.8)
    paint = draw_paint(rng)
    parts = _cab(nose, cab_length, half * 0.96, cab_height, paint)
    parts.append(box((-0.2, 0, 0.75), (length - 0.6, 0.9, 0.22), Material.MATTE, TRIM))
    x0, x1 = tail + 0.02, nose - cab_length - 0.12
    middle, bed = (x0 + x1) / 2, 0.98
    if kind == "box":
        roof = rng.uniform(2.8, 3.5)
        colour = (0.75, 0.75, 0.72) if rng.random() < 0.6 else draw_paint(rng)
        parts.append(
            hull([(x0, half, bed, roof), (x1, half, bed, roof)], Material.PAINT, colour, chamfer=0.04)
        )
        parts += _livery(x0 + 0.2, x1 - 0.2, half, bed, roof, rng)
        parts.append(
            _end_panel(x0 - 0.006, 0, (bed + roof) / 2, 0.04, roof - bed - 0.2, Material.MATTE, TRIM)
        )
        parts.append(
            _end_panel(x0 - 0.008, 0, bed + 0.08, width * 0.9, 0.08, Material.RETROREFLECTOR, RED_LIGHT)
        )
    else:
        colour = draw_paint(rng) if kind == "tipper" else (0.22, 0.16, 0.1)
        wall = 1.2 if kind == "tipper" else 0.4
        parts.append(box((middle, 0, bed + 0.08), (x1 - x0, width, 0.16), Material.MATTE, colour))
        for side in (-1, 1):
            centre = (middle, side * (half - 0.04), bed + wall / 2)
            parts.append(box(centre, (x1 - x0, 0.08, wall), Material.PAINT, colour))
        for x in (x0 + 0.04, x1 - 0.04):
            parts.append(box((x, 0, bed + wall / 2), (0.08, width, wall), Material.PAINT, colour))
        if kind == "tipper":
            heap = ((x1 - x0) * 0.9, width * 0.85, wall * 0.9)
            parts.append(
                box((middle, 0, bed + 0.12 + heap[2] / 2), heap, Material.MATTE, (0.25, 0.2, 0.14), top=0.7)
            )
        else:  # crates and rolls
            for x in np.arange(x0 + 0.7, x1 - 0.5, 1.15):
                size = (1.0, width * rng.uniform(0.5, 0.85), rng.uniform(0.5, 1.4))
                wood = rng.uniform(0.6, 1.3)
                crate: Colour = (
                    (0.3 * wood, 0.22 * wood, 0.13 * wood) if rng.random() < 0.7 else draw_paint(rng)
                )
                parts.append(box((x, 0, bed + 0.16 + size[2] / 2), size, Material.MATTE, crate))
    parts.append(box((tail + 0.08, 0, 0.78), (0.14, width * 0.96, 0.34), Material.MATTE, TRIM))
    parts += _lights(nose + 0.03, tail - 0.004, half, 0.7, (0.3, 0.16))
    axles = (
        (tail + 0.2 * length, nose - 0.9)
        if length < 7.5
        else (tail + 0.15 * length, tail + 0.15 * length + 1.15, nose - 0.9)
    )
    parts += _wheels(axles, half - 0.02, 0.46, 0.3)
    return join(parts)


def _pickup(rng: np.random.Generator) -> Mesh:
    length, width, height = rng.uniform(5.1, 5.9), rng.uniform(1.85, 2.05), rng.uniform(1.78, 1.95)
    half, nose, tail, paint = width / 2, length / 2, -length / 2, draw_paint(rng)
    belt = height * 0.6
    bed_end = tail + length * 0.33
    parts = [
        hull(
            [
                (tail, half * 0.96, 0.5, belt),
                (bed_end, half, 0.4, belt),
                (nose - 1.2, half, 0.38, belt),
                (nose - 0.15, half * 0.93, 0.42, belt * 0.93),
                (nose, half * 0.85, 0.5, belt * 0.8),
            ],
            Material.PAINT,
            paint,
            chamfer=0.08,
        ),
        box(
            ((tail + bed_end) / 2, 0, belt + 0.005),
            (bed_end - tail - 0.25, width * 0.8, 0.02),
            Material.MATTE,
            TRIM,
        ),
        _end_panel(nose + 0.004, 0, belt * 0.66, half * 1.2, 0.25, Material.MATTE, TRIM),
    ]
    parts += _greenhouse(
        (bed_end + 0.05, nose - 1.25, half * 0.94, belt - 0.02),
        (bed_end + 0.2, nose - 2.1, half * 0.8, height - 0.05),
        paint,
        (0.5,),
    )
    parts += _lights(nose - 0.003, tail - 0.004, half * 0.92, belt * 0.78, (0.3, 0.18))
    parts += _wheels((tail + 0.2 * length, nose - 0.19 * length), half + 0.02, 0.4, 0.26)
    return join(parts)


def bus(rng: np.random.Generator) -> Mesh:
    """A city bus, now and then a double-decker."""
    double = rng.random() < 0.25
    length, width = rng.uniform(9.5, 12.2), rng.uniform(2.5, 2.6)
    height = rng.uniform(4.0, 4.3) if double else rng.uniform(2.95, 3.4)
    half, nose, tail = width / 2, length / 2, -length / 2
    palette: list[Colour] = [
        (0.5, 0.03, 0.03),
        (0.65, 0.62, 0.55),
        (0.05, 0.2, 0.35),
        (0.6, 0.35, 0.03),
        (0.1, 0.3, 0.12),
    ]
    paint = palette[int(rng.integers(len(palette)))]
    roof: Colour = (0.6, 0.6, 0.58)
    parts = [
        hull(
            [
                (tail, half * 0.97, 0.4, height - 0.1),
                (tail + 0.2, half, 0.3, height),
                (nose - 0.25, half, 0.3, height),
                (nose, half * 0.95, 0.35, height - 0.18),
            ],
            Material.PAINT,
            paint,
            chamfer=0.12,
        ),
        box((-0.2, 0, height + 0.02), (length * 0.5, width * 0.6, 0.2), Material.PAINT, roof, top=0.9),
    ]
    decks = [(1.15, 2.25)] if not double else [(1.05, 1.95), (2.6, 3.6)]
    for low, high in decks:
        count = 7
        edges = np.linspace(tail + 0.5, nose - 0.4, count + 1)
        for side in (-1, 1):
            y = side * (half + 0.008)
            for x0, x1 in pairwise(edges):
                parts.append(_side_panel(x0 + 0.06, x1 - 0.06, y, low, high, Material.GLASS, WINDOW))
        parts.append(
            _end_panel(nose + 0.008, 0, (low + high) / 2, width * 0.86, high - low, Material.GLASS, WINDOW)
        )
        parts.append(
            _end_panel(
                tail - 0.008,
                0,
                (low + high) / 2 + 0.1,
                width * 0.7,
                (high - low) * 0.7,
                Material.GLASS,
                WINDOW,
            )
        )
    for x in (nose - 1.3, 0.2):  # doors, on the kerb side
        parts.append(
            _side_panel(x - 0.55, x + 0.55, -half - 0.012, 0.42, 2.25, Material.GLASS, (0.05, 0.06, 0.07))
        )
    parts.append(
        _end_panel(nose + 0.01, 0, height - 0.35, width * 0.6, 0.22, Material.LAMP, (0.8, 0.4, 0.05))
    )
    parts += _lights(nose + 0.006, tail - 0.006, half, 0.75, (0.3, 0.2))
    parts += _wheels((tail + 0.27 * length, nose - 0.22 * length), half - 0.01, 0.48, 0.3)
    return join(parts)


def trailer(rng: np.random.Generator) -> Mesh:
    """A drawn box, curtain-sider, tank or container chassis, without its tractor."""
    kind = rng.choice(["box", "tank", "container"], p=[0.5, 0.2, 0.3])
    length, width, height = rng.uniform(7.0, 12.5), rng.uniform(2.4, 2.55), rng.uniform(3.4, 4.0)
    half, nose, tail, bed = width / 2, length / 2, -length / 2, 1.15
    parts = [box((0, 0, bed - 0.12), (length, 1.1, 0.24), Material.MATTE, TRIM)]
    if kind == "tank":
        radius = (height - bed) / 2
        ring = np.array(
            [
                (np.cos(a) * half, np.sin(a) * radius + bed + radius)
                for a in np.linspace(0, 2 * np.pi, 12, False)
            ]
        )
        stations = [(tail, 0.85), (tail + 0.4, 1.0), (nose - 0.4, 1.0), (nose, 0.85)]
        middle = np.array([0, bed + radius])
        rings = [np.column_stack([np.full(12, x), (ring - middle) * share + middle]) for x, share in stations]
        parts.append(loft(np.stack(rings), Material.PAINT, (0.6, 0.61, 0.62)))
    else:
        colour = draw_paint(rng) if kind == "container" or rng.random() < 0.4 else (0.72, 0.72, 0.7)
        parts.append(
            hull([(tail, half, bed, height), (nose, half, bed, height)], Material.PAINT, colour, chamfer=0.03)
        )
        if kind == "container":
            darker = (colour[0] * 0.7, colour[1] * 0.7, colour[2] * 0.7)
            for x in np.arange(tail + 0.3, nose - 0.2, 0.55):
                for side in (-1, 1):
                    y = side * (half + 0.005)
                    parts.append(_side_panel(x, x + 0.22, y, bed + 0.1, height - 0.1, Material.PAINT, darker))
        else:
            parts += _livery(tail + 0.5, nose - 0.5, half, bed, height, rng)
        parts.append(
            _end_panel(tail - 0.006, 0, (bed + height) / 2, 0.05, height - bed - 0.2, Material.MATTE, TRIM)
        )
    for side in (-1, 1):
        y = side * (half + 0.008)
        parts.append(
            _side_panel(
                tail + 0.3, nose - 0.3, y, bed + 0.02, bed + 0.08, Material.RETROREFLECTOR, (0.7, 0.6, 0.05)
            )
        )
    parts.append(
        _end_panel(tail - 0.008, 0, bed + 0.06, width * 0.95, 0.1, Material.RETROREFLECTOR, RED_LIGHT)
    )
    parts.append(box((tail + 0.08, 0, 0.85), (0.14, width * 0.96, 0.26), Material.MATTE, TRIM))
    for side in (-1, 1):
        parts.append(
            _end_panel(tail - 0.01, side * (half - 0.3), 0.85, 0.35, 0.14, Material.TAILLIGHT, RED_LIGHT)
        )
    parts += _wheels((tail + 1.0, tail + 2.2, tail + 3.4), half - 0.02, 0.48, 0.32)
    parts += [
        tube((nose - 1.5, side * 0.7, 0.05), (nose - 1.5, side * 0.7, bed), 0.07, Material.MATTE, TRIM)
        for side in (-1, 1)
    ]
    return join(parts)


def construction_vehicle(rng: np.random.Generator) -> Mesh:
    """Excavator, wheel loader or road roller in a maker's yellow or orange."""
    palette: list[Colour] = [(0.75, 0.42, 0.03), (0.72, 0.5, 0.05), (0.7, 0.22, 0.03), (0.25, 0.4, 0.3)]
    paint = palette[int(rng.integers(len(palette)))]
    size = rng.uniform(0.85, 1.2)
    kind = rng.choice(["excavator", "loader", "roller"], p=[0.45, 0.35, 0.2])
    dark: Colour = (0.05, 0.05, 0.05)
    if kind == "excavator":
        parts = [
            hull(
                [
                    (-1.7, 0.28, 0.1, 0.75),
                    (-1.4, 0.3, 0.0, 0.9),
                    (1.4, 0.3, 0.0, 0.9),
                    (1.7, 0.28, 0.1, 0.75),
                ],
                Material.MATTE,
                dark,
            ).moved((0, side * 1.05, 0))
            for side in (-1, 1)
        ]
        parts += [
            box((0, 0, 0.85), (1.6, 1.5, 0.35), Material.MATTE, dark),
            hull(
                [
                    (-2.0, 1.0, 1.1, 2.0),
                    (-1.7, 1.25, 1.05, 2.2),
                    (0.3, 1.25, 1.05, 2.1),
                    (1.3, 1.2, 1.05, 1.6),
                ],
                Material.PAINT,
                paint,
            ),
        ]
        parts += _cabin((-0.1, 1.3), 0.75, 1.5, 2.95, 0.45, paint)
        elbow, wrist, tip = (2.9, -0.4, 3.4), (4.2, -0.4, 1.9), (3.7, -0.4, 0.5)
        parts += [
            tube((0.9, -0.4, 1.6), elbow, (0.28, 0.22), Material.PAINT, paint),
            tube(elbow, wrist, (0.2, 0.16), Material.PAINT, paint),
            tube((1.6, -0.4, 1.5), (2.3, -0.4, 2.6), 0.08, Material.PAINT, (0.5, 0.5, 0.5)),
            box((tip[0] + 0.2, tip[1], 1.2), (0.8, 0.9, 0.9), Material.MATTE, dark, top=0.6),
        ]
    elif kind == "loader":
        parts = [
            hull(
                [(-2.6, 0.9, 0.9, 1.7), (-2.3, 1.0, 0.7, 1.95), (-0.6, 1.0, 0.7, 2.0), (0.9, 0.8, 0.7, 1.5)],
                Material.PAINT,
                paint,
            ),
            *_cabin((-0.9, 0.6), 0.75, 1.9, 3.2, 0.0, paint),
            *[
                tube((0.6, side * 0.6, 1.5), (2.5, side * 0.6, 0.6), 0.13, Material.PAINT, paint)
                for side in (-1, 1)
            ],
            frustum((2.3, 3.0, 1.3, 0.15), (2.5, 3.4, 1.3, 1.05), Material.MATTE, (0.2, 0.19, 0.17)),
        ]
        parts += _wheels((-1.7, 1.2), 1.3, 0.72, 0.5)
    else:
        parts = [
            wheel((1.6, 0, 0.65), 0.65, 1.9, (0.3, 0.3, 0.3)),
            hull(
                [(-2.3, 0.8, 0.7, 1.5), (-2.0, 0.95, 0.6, 1.7), (-0.4, 0.95, 0.6, 1.6)], Material.PAINT, paint
            ),
            *[
                tube((-0.4, side * 1.0, 1.0), (1.7, side * 1.0, 0.75), 0.1, Material.PAINT, paint)
                for side in (-1, 1)
            ],
            *_cabin((-0.9, 0.5), 0.8, 1.4, 2.9, 0.0, paint),
            *_wheels((-1.5,), 1.05, 0.65, 0.5),
        ]
    return join(parts).scaled((size, size, size))


def _cabin(
    xs: tuple[float, float], half: float, low: float, high: float, y: float, paint: Colour
) -> list[Mesh]:
    """A glazed driver's cabin, its middle at the given y."""
    base, lid = (*xs, half, low), (xs[0] + 0.1, xs[1] - 0.15, half * 0.92, high - 0.05)
    return [part.moved((0, y, 0)) for part in _greenhouse(base, lid, paint, (0.5,))]
