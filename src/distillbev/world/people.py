"""Shapes of pedestrians, and of bicycles and motorcycles with or without their riders."""

from __future__ import annotations

import numpy as np

from .meshes import Colour, Material, Mesh, box, circle, column, ellipsoid, join, loft, tube
from .vehicles import draw_paint

SKINS: tuple[Colour, ...] = ((0.55, 0.36, 0.26), (0.42, 0.26, 0.18), (0.22, 0.12, 0.08), (0.62, 0.44, 0.34))
HAIRS: tuple[Colour, ...] = ((0.02, 0.015, 0.01), (0.08, 0.05, 0.03), (0.3, 0.22, 0.1), (0.35, 0.33, 0.32))
CLOTHES: tuple[Colour, ...] = (
    (0.04, 0.05, 0.12), (0.5, 0.5, 0.5), (0.03, 0.03, 0.035), (0.45, 0.06, 0.06), (0.06, 0.18, 0.4), (0.7, 0.68, 0.62),
    (0.1, 0.25, 0.12), (0.55, 0.4, 0.1), (0.3, 0.1, 0.3), (0.2, 0.15, 0.1), (0.75, 0.75, 0.78), (0.6, 0.25, 0.3),
)  # fmt: skip
TROUSERS: tuple[Colour, ...] = (
    (0.03, 0.04, 0.09),
    (0.03, 0.03, 0.03),
    (0.2, 0.18, 0.14),
    (0.12, 0.13, 0.15),
    (0.4, 0.36, 0.3),
)
HI_VIS: Colour = (0.75, 0.75, 0.05)
HELMET_YELLOW: Colour = (0.8, 0.6, 0.05)


def _pick(rng: np.random.Generator, colours: tuple[Colour, ...]) -> Colour:
    return colours[int(rng.integers(len(colours)))]


def pedestrian(rng: np.random.Generator, pose: str = "walking", kind: str = "adult") -> Mesh:
    """A person facing +x.

    Args:
        rng: draws height, build, clothes and stride.
        pose: walking, standing or sitting.
        kind: adult, child or worker (helmet and safety vest).
    """
    height = rng.uniform(1.05, 1.35) if kind == "child" else rng.normal(1.72, 0.08)
    build = rng.uniform(0.88, 1.2)
    shirt, legs_colour = _pick(rng, CLOTHES), _pick(rng, TROUSERS)
    skin, hair = _pick(rng, SKINS), _pick(rng, HAIRS)
    if kind == "worker":
        shirt = HI_VIS if rng.random() < 0.7 else (0.8, 0.25, 0.02)
    hip, shoulder = 0.49 * height, 0.81 * height
    stride = rng.uniform(0.14, 0.26) * height if pose == "walking" else 0.04
    parts: list[Mesh] = []
    lead = 1 if rng.random() < 0.5 else -1
    drop = 0.0
    if pose == "sitting":
        drop = hip - 0.46
        for side in (-1, 1):
            knee, foot = (0.45, side * 0.1, 0.46), (0.42, side * 0.1, 0.05)
            parts.append(tube((0, side * 0.1, 0.5), knee, (0.085, 0.07), Material.CLOTH, legs_colour, 5))
            parts.append(tube(knee, foot, (0.07, 0.05), Material.CLOTH, legs_colour, 5))
            parts.append(
                box((0.48, side * 0.1, 0.04), (0.25, 0.09, 0.08), Material.MATTE, (0.03, 0.03, 0.03))
            )
    else:
        skirt = kind == "adult" and rng.random() < 0.18
        for side in (-1, 1):
            swing = side * lead * stride
            knee = (swing * 0.55 + 0.03, side * 0.09 * build, 0.27 * height)
            foot = (swing, side * 0.09 * build, 0.06)
            parts.append(tube((0, side * 0.08 * build, hip), knee, (0.085 * build, 0.065 * build), Material.CLOTH,
                              legs_colour, 5))  # fmt: skip
            parts.append(
                tube(knee, foot, (0.062 * build, 0.045), Material.CLOTH, skin if skirt else legs_colour, 5)
            )
            parts.append(
                box((foot[0] + 0.05, foot[1], 0.04), (0.26, 0.09, 0.08), Material.MATTE, (0.03, 0.03, 0.03))
            )
        if skirt:
            parts.append(
                column([(0.27 * height, 0.2, 0.22), (hip + 0.03, 0.13, 0.17)], Material.CLOTH, legs_colour)
            )
    hip, shoulder, top = hip - drop, shoulder - drop, height - drop
    depth, breadth = 0.115 * build, 0.185 * build * (height / 1.72)
    torso = [(hip - 0.05, depth, breadth * 0.86), (hip + 0.18, depth * 0.95, breadth * 0.82),
             (shoulder - 0.06, depth * 1.08, breadth), (shoulder + 0.02, depth * 0.7, breadth * 0.72)]  # fmt: skip
    parts.append(column(torso, Material.CLOTH, shirt))
    if kind == "worker":
        band = [(hip + 0.2, depth * 1.04, breadth * 0.93), (hip + 0.27, depth * 1.05, breadth * 0.95)]
        parts.append(column(band, Material.RETROREFLECTOR, (0.8, 0.8, 0.78)))
    for side in (-1, 1):
        swing = -side * lead * stride * 0.7
        joint = (0, side * (breadth + 0.03), shoulder - 0.03)
        elbow = (swing * 0.3 - 0.02, side * (breadth + 0.06), shoulder - 0.3 * (height / 1.72))
        hand = (swing * 0.8 + 0.12, side * (breadth + 0.05), hip + 0.02)
        parts.append(tube(joint, elbow, (0.058, 0.047), Material.CLOTH, shirt, 5))
        parts.append(
            tube(elbow, hand, (0.045, 0.035), Material.CLOTH, shirt if rng.random() < 0.6 else skin, 5)
        )
        parts.append(ellipsoid(hand, (0.05, 0.04, 0.06), Material.MATTE, skin, rows=2, sides=4))
    head = top - 0.115
    parts.append(tube((0, 0, shoulder - 0.02), (0.01, 0, head - 0.05), 0.055, Material.MATTE, skin))
    parts.append(ellipsoid((0.015, 0, head), (0.095, 0.078, 0.115), Material.MATTE, skin, rows=4, sides=7))
    if kind == "worker":
        parts.append(ellipsoid((0, 0, head + 0.05), (0.13, 0.11, 0.1), Material.PAINT, HELMET_YELLOW, rows=4))
    else:
        parts.append(
            ellipsoid((-0.02, 0, head + 0.025), (0.1, 0.088, 0.108), Material.MATTE, hair, rows=4, sides=7)
        )
    if pose != "sitting" and kind == "adult" and rng.random() < 0.3:
        bag = _pick(rng, CLOTHES)
        parts.append(
            box((-depth - 0.09, 0, shoulder - 0.22), (0.18, 0.3, 0.42), Material.CLOTH, bag, top=0.85)
        )
    return join(parts)


def _bike_wheel(x: float, radius: float, thick: float) -> list[Mesh]:
    """A thin tyre with a few spokes."""
    points, height = circle(12), radius + thick
    rings = [
        np.column_stack([x + r * points[:, 0], np.full(12, y), height + r * points[:, 1]])
        for r, y in (
            (radius + thick, 0.0),
            (radius - thick, thick),
            (radius - thick, -thick),
            (radius + thick, 0.0),
        )
    ]
    tyre = loft(np.stack(rings), Material.MATTE, (0.02, 0.02, 0.02), caps=False)
    hub, rim = (
        (x, 0.0, height),
        np.column_stack([x + radius * points[:, 0], np.zeros(12), height + radius * points[:, 1]]),
    )
    return [tyre, *(tube(hub, rim[k], 0.012, Material.PAINT, (0.4, 0.4, 0.4), 3) for k in (0, 3, 6, 9))]


def bicycle(rng: np.random.Generator, rider: bool) -> Mesh:
    radius, paint = rng.uniform(0.29, 0.33), draw_paint(rng)
    reach = rng.uniform(0.5, 0.56)
    crank, seat, head = (-0.08, 0, radius), (-0.22, 0, 0.9), (reach - 0.17, 0, 0.88)
    parts = [*_bike_wheel(-reach, radius, 0.024), *_bike_wheel(reach, radius, 0.024)]
    for a, b in ((crank, seat), (crank, head), (seat, head), ((-reach, 0, radius), crank), ((-reach, 0, radius), seat),
                 ((reach, 0, radius), head), (head, (reach - 0.2, 0, 1.03))):  # fmt: skip
        parts.append(tube(a, b, 0.024, Material.PAINT, paint, 5))
    parts.append(
        tube(
            (reach - 0.2, -0.28, 1.04), (reach - 0.2, 0.28, 1.04), 0.02, Material.MATTE, (0.03, 0.03, 0.03), 5
        )
    )
    parts.append(box((-0.24, 0, 0.95), (0.26, 0.15, 0.07), Material.MATTE, (0.03, 0.03, 0.03)))
    parts.append(box((-reach - 0.1, 0, 0.72), (0.03, 0.08, 0.08), Material.RETROREFLECTOR, (0.5, 0.03, 0.03)))
    if rng.random() < 0.3:
        parts.append(box((reach + 0.02, 0, 0.95), (0.3, 0.36, 0.25), Material.MATTE, (0.12, 0.1, 0.08)))
    if rider:
        parts += _rider(
            rng,
            seat=(-0.2, 0.98),
            grip=(reach - 0.2, 1.06, 0.25),
            foot=(0.0, 0.32),
            helmet=rng.random() < 0.6,
        )
    return join(parts)


def motorcycle(rng: np.random.Generator, rider: bool) -> Mesh:
    """A motorcycle or a scooter."""
    paint, dark = draw_paint(rng), (0.03, 0.03, 0.03)
    scooter = rng.random() < 0.4
    reach, radius = (0.62, 0.2) if scooter else (0.72, 0.27)
    parts = []
    for x in (-reach, reach):
        points = circle(10)
        rings = [
            np.column_stack([x + r * points[:, 0], np.full(10, y), radius + 0.05 + r * points[:, 1]])
            for r, y in (
                (radius * 0.6, -0.07),
                (radius + 0.05, -0.05),
                (radius + 0.05, 0.05),
                (radius * 0.6, 0.07),
            )
        ]
        parts.append(loft(np.stack(rings), Material.MATTE, dark))
    if scooter:
        parts += [
            box((0.1, 0, 0.32), (0.55, 0.36, 0.1), Material.PAINT, paint),
            tube((0.42, 0, 0.35), (0.5, 0, 0.95), (0.19, 0.14), Material.PAINT, paint),
            ellipsoid((-0.42, 0, 0.58), (0.42, 0.19, 0.24), Material.PAINT, paint, 4, 7),
        ]
    else:
        parts += [
            box((0.05, 0, 0.45), (0.6, 0.34, 0.42), Material.MATTE, (0.1, 0.1, 0.11)),
            ellipsoid((0.18, 0, 0.82), (0.34, 0.2, 0.18), Material.PAINT, paint),
            ellipsoid((-0.62, 0, 0.78), (0.34, 0.14, 0.1), Material.PAINT, paint),
            tube((-0.1, -0.2, 0.35), (-0.85, -0.2, 0.4), 0.06, Material.PAINT, (0.4, 0.4, 0.4)),
            ellipsoid((0.62, 0, 0.95), (0.18, 0.2, 0.22), Material.PAINT, paint),
        ]
    parts += [
        tube((reach, 0, radius), (0.46, 0, 1.02), 0.05, Material.PAINT, (0.35, 0.35, 0.36)),
        tube((0.42, -0.36, 1.04), (0.42, 0.36, 1.04), 0.025, Material.MATTE, dark),
        box((-0.3, 0, 0.84), (0.62, 0.28, 0.1), Material.MATTE, dark),
        box(
            (0.78 if not scooter else 0.62, 0, 0.92), (0.04, 0.18, 0.16), Material.HEADLIGHT, (0.9, 0.9, 0.85)
        ),
        box(
            (-0.97 if not scooter else -0.84, 0, 0.72),
            (0.03, 0.14, 0.08),
            Material.TAILLIGHT,
            (0.55, 0.02, 0.02),
        ),
    ]
    parts += [
        tube((0.44, s * 0.3, 1.04), (0.4, s * 0.4, 1.22), 0.02, Material.MATTE, dark, 4) for s in (-1, 1)
    ]
    parts += [
        ellipsoid((0.4, s * 0.4, 1.24), (0.02, 0.07, 0.05), Material.GLASS, dark, 3, 5) for s in (-1, 1)
    ]
    if rider:
        parts += _rider(rng, seat=(-0.25, 0.9), grip=(0.38, 1.06, 0.32), foot=(0.08, 0.36), helmet=True)
    return join(parts)


def _rider(
    rng: np.random.Generator,
    seat: tuple[float, float],
    grip: tuple[float, float, float],
    foot: tuple[float, float],
    helmet: bool,
) -> list[Mesh]:
    """A seated rider: seat and foot are (x, z), grip is (x, z, half span)."""
    shirt, legs, skin = _pick(rng, CLOTHES), _pick(rng, TROUSERS), _pick(rng, SKINS)
    hip = np.array([seat[0], 0, seat[1] + 0.06])
    lean = rng.uniform(0.16, 0.28)
    neck = hip + np.array((lean, 0, 0.5))
    parts = [tube(hip, neck, (0.16, 0.19), Material.CLOTH, shirt, 8)]
    for side in (-1, 1):
        knee = np.array([(hip[0] + foot[0]) / 2 + 0.28, side * 0.14, (hip[2] + foot[1]) / 2 + 0.12])
        sole = np.array([foot[0] + side * 0.1, side * 0.14, foot[1] - 0.02 + side * 0.05])
        parts.append(tube(hip + np.array((0, side * 0.1, 0)), knee, (0.09, 0.07), Material.CLOTH, legs, 5))
        parts.append(tube(knee, sole, (0.065, 0.05), Material.CLOTH, legs, 5))
        parts.append(
            box(sole + np.array((0.05, 0, -0.03)), (0.25, 0.09, 0.08), Material.MATTE, (0.03, 0.03, 0.03))
        )
        elbow = (neck + np.array((grip[0], side * grip[2], grip[1]))) / 2 + (0, side * 0.1, -0.1)
        parts.append(
            tube(neck + np.array((0, side * 0.18, -0.05)), elbow, (0.055, 0.045), Material.CLOTH, shirt, 5)
        )
        parts.append(
            tube(elbow, (grip[0], side * grip[2], grip[1]), (0.045, 0.035), Material.CLOTH, shirt, 5)
        )
    head = neck + np.array((0.06, 0, 0.2))
    parts.append(tube(neck, head, 0.055, Material.MATTE, skin))
    parts.append(ellipsoid(head, (0.1, 0.08, 0.115), Material.MATTE, skin, 4, 7))
    cap, material = (draw_paint(rng), Material.PAINT) if helmet else (_pick(rng, HAIRS), Material.MATTE)
    size = (0.135, 0.115, 0.13) if helmet else (0.105, 0.09, 0.11)
    parts.append(ellipsoid(head + np.array((-0.02, 0, 0.035)), size, material, cap, 4, 7))
    return parts
