"""Patterns by position: noise, road surfaces and markings, pavements, facades, sky.

Everything works on flat float32 arrays of hit points; `footprint` is the width (m) that one pixel covers there,
used to fade what is finer than a pixel.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .meshes import Floats
from .roads import LANE_M, PARKING_M, Road, RoadMap, blend
from .surroundings import Facades

_SIDE = 256


def _smooth_noise(side: int, seed: int) -> Floats:
    """(side, side) noise that repeats, a few octaves, mean 0, standard deviation 1."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1.0
    spectrum = np.fft.fft2(rng.standard_normal((side, side))) * frequency**-1.1
    spectrum[0, 0] = 0
    field = np.fft.ifft2(spectrum).real
    return (field / field.std()).astype(np.float32)


_CLOUDS = _smooth_noise(_SIDE, 1)
_GRAIN = np.random.default_rng(2).standard_normal((_SIDE, _SIDE)).astype(np.float32)
_HASH = np.random.default_rng(3).random((_SIDE, _SIDE)).astype(np.float32)


def _look_up(table: Floats, x: Floats, y: Floats) -> Floats:
    return table[y.astype(np.int32) & (_SIDE - 1), x.astype(np.int32) & (_SIDE - 1)]


def noise(x: Floats, y: Floats, cells_per_m: float) -> Floats:
    """(n,) smooth noise, mean 0 and deviation 1; `cells_per_m` sets the finest grain."""
    # A large offset keeps the truncation to integers a floor.
    return _look_up(_CLOUDS, (x + 4000) * np.float32(cells_per_m), (y + 4000) * np.float32(cells_per_m))


def grain(x: Floats, y: Floats, cells_per_m: float) -> Floats:
    """(n,) white noise by cell."""
    return _look_up(_GRAIN, (x + 4000) * np.float32(cells_per_m), (y + 4000) * np.float32(cells_per_m))


def chance(i: Floats, j: Floats) -> Floats:
    """(n,) a number in [0, 1) for each pair of whole numbers."""
    a, b = i.astype(np.int32), j.astype(np.int32)
    return _HASH[(a * 7 + b * 131 + (a >> 4)) & (_SIDE - 1), (a * 37 + b * 17 + (b >> 3)) & (_SIDE - 1)]


def _stripe(distance: Floats, half_width: float, footprint: Floats) -> Floats:
    """Share of a pixel that a stripe covers whose middle is `distance` away."""
    return np.clip((half_width - np.abs(distance)) / footprint + 0.5, 0, 1) * np.minimum(
        1, 2 * half_width / footprint
    )


def _dashes(s: Floats, period: float, length: float, footprint: Floats) -> Floats:
    """Share covered along a broken line; far away, its mean."""
    phase = s - period * np.floor(s / np.float32(period))
    near = np.clip((length / 2 - np.abs(phase - length / 2)) / footprint + 0.5, 0, 1)
    fade = np.clip(2 * footprint / period, 0, 1)
    return near * (1 - fade) + fade * (length / period)


def ground_albedo(
    roads: RoadMap, x: Floats, y: Floats, footprint: Floats, stretched: Floats, look: GroundLook
) -> tuple[Floats, NDArray[np.bool_], Floats]:
    """Colours of carriageway, kerb, pavement and verge.

    Args:
        roads: of the scene.
        x, y: (n,) hit points.
        footprint: (n,) m that a pixel covers across the view, stretched: the same along it.
        look: of this scene.

    Returns:
        albedo (n, 3), whether it is carriageway (n,), and (n,) how much of it is road paint.
    """
    places = [road.locate(x, y) for road in roads.roads]
    distances = [road.kerb_distance(s, d) for road, (s, d) in zip(roads.roads, places, strict=True)]
    kerb = blend(distances)
    on_road = kerb < 0
    albedo = np.empty((len(x), 3), dtype=np.float32)
    paint = np.zeros(len(x), dtype=np.float32)
    rough, fine = noise(x, y, 1.6), grain(x, y, 14.0)
    fade = np.clip(0.06 / stretched, 0, 1)

    i = np.flatnonzero(on_road)
    level = 1 + 0.09 * rough[i] + 0.16 * fine[i] * fade[i] + 0.05 * noise(x[i], y[i], 9.0)
    patch = np.clip(noise(x[i], y[i], 0.55) * 3 - 4.0, 0, 1)  # where the road was mended
    level = level * (1 - 0.25 * patch)
    owner = (
        np.argmin(np.stack([d[i] for d in distances]), axis=0)
        if len(distances) > 1
        else np.zeros(len(i), int)
    )
    marks, yellow = np.zeros(len(i), np.float32), np.zeros(len(i), np.float32)
    wear = np.zeros(len(i), np.float32)
    for number, road in enumerate(roads.roads):
        mine = np.flatnonzero(owner == number)
        s, d = (axis[i[mine]] for axis in places[number])
        wear[mine] = np.cos(d * np.float32(4 * np.pi / LANE_M))
        junctions = roads.junctions_s_m if number == 0 else (0.0,)
        others = [distances[k][i[mine]] for k in range(len(roads.roads)) if k != number]
        clear = np.min(others, axis=0) if others else np.full(len(mine), 99.0, np.float32)
        marks[mine], yellow[mine] = _markings(
            road, s, d, clear, footprint[i[mine]], stretched[i[mine]], look, junctions
        )
    level = level * (1 - 0.07 * wear)
    worn = np.clip(0.92 + 0.16 * rough[i] + 0.2 * fine[i] * fade[i], 0.25, 1)
    marks *= worn
    yellow *= worn
    albedo[i] = level[:, None] * look.asphalt
    albedo[i] += (marks * (0.62 - look.asphalt.mean()))[:, None]
    albedo[i] += yellow[:, None] * (np.array([0.6, 0.4, 0.05], np.float32) - albedo[i])
    paint[i] = np.maximum(marks, yellow)

    i = np.flatnonzero(~on_road)
    f, px, py = kerb[i], x[i], y[i]
    stone = np.clip((0.28 - f) / footprint[i] + 0.5, 0, 1)
    green = (
        np.clip((f - look.pavement_m + 0.25 * rough[i]) / np.maximum(footprint[i], 0.15) + 0.5, 0, 1)
        * look.grass
    )
    # Slabs in the frame of the main road.
    s, d = places[0][0][i], places[0][1][i]
    slab_s, slab_d = np.floor(s / look.slab_m), np.floor(d / look.slab_m)
    tint = 1 + 0.22 * (chance(slab_s, slab_d) - 0.5) * np.clip(0.3 / stretched[i], 0, 1)
    joint = np.maximum(
        _stripe(
            s - look.slab_m * np.floor(s / look.slab_m) - look.slab_m / 2 + look.slab_m / 2,
            0.02,
            footprint[i],
        ),
        _stripe(d - look.slab_m * np.floor(d / look.slab_m), 0.02, footprint[i]),
    )
    level = (1 + 0.07 * rough[i] + 0.10 * fine[i] * fade[i]) * tint * (1 - 0.4 * joint)
    slabs = level[:, None] * look.slab
    blades = 1 + 0.28 * noise(px, py, 3.0) + 0.3 * fine[i] * fade[i] + 0.2 * rough[i]
    grass = np.clip(blades, 0.3, 2)[:, None] * look.grass_colour
    albedo[i] = slabs + green[:, None] * (grass - slabs)
    banded = np.where((np.floor(s / 1.0).astype(np.int32) & 1) == 0, look.kerb_light, look.kerb_dark)
    albedo[i] += stone[:, None] * (banded[:, None] - albedo[i])
    return np.maximum(albedo, 0.01), on_road, paint


class GroundLook:
    """Materials of a scene's ground, drawn once."""

    def __init__(self, rng: np.random.Generator) -> None:
        tone = rng.uniform(0.065, 0.125)
        self.asphalt = (tone * rng.uniform(0.96, 1.04, 3)).astype(np.float32)
        self.slab = (
            rng.uniform(0.22, 0.36) * np.array([1.0, rng.uniform(0.9, 1.0), rng.uniform(0.78, 0.97)])
        ).astype(np.float32)
        self.slab_m = np.float32(rng.choice([0.6, 0.9, 1.5]))
        self.pavement_m = np.float32(rng.uniform(3.6, 5.0))
        self.grass = np.float32(rng.random() < 0.7)
        self.grass_colour = (
            np.array([0.10, 0.14, 0.045]) * rng.uniform(0.8, 1.2) * rng.uniform(0.85, 1.15, 3)
        ).astype(np.float32)
        painted = rng.random() < 0.3
        self.kerb_light = np.float32(0.6 if painted else 0.36)
        self.kerb_dark = np.float32(0.05 if painted else 0.32)
        self.yellow_centre = bool(rng.random() < 0.4)
        self.dash_m = (float(rng.choice([3.0, 4.0])), float(rng.choice([9.0, 12.0])))


def _markings(
    road: Road,
    s: Floats,
    d: Floats,
    clear: Floats,
    across: Floats,
    along: Floats,
    look: GroundLook,
    junctions: tuple[float, ...],
) -> tuple[Floats, Floats]:
    """White and yellow paint of one road; `clear` is the distance (m) to the nearest other carriageway, which it
    meets at one of the places `junctions` along it."""
    white, yellow = np.zeros(len(s), np.float32), np.zeros(len(s), np.float32)
    open_road = clear > 6.0
    blur = np.minimum((across + along) / 2, 3 * across)
    lanes = road.lanes_each_way
    if look.yellow_centre:
        yellow = (_stripe(d - 0.14, 0.06, blur) + _stripe(d + 0.14, 0.06, blur)) * open_road
    elif lanes > 1:
        white += (_stripe(d - 0.14, 0.06, blur) + _stripe(d + 0.14, 0.06, blur)) * open_road
    else:
        white += _stripe(d, 0.07, blur) * _dashes(s, look.dash_m[1], look.dash_m[0], along) * open_road
    for number in range(1, lanes):
        line = _stripe(np.abs(d) - number * LANE_M, 0.07, blur)
        white += line * _dashes(s, look.dash_m[1], look.dash_m[0], along) * open_road
    edge = lanes * LANE_M
    if road.parking:
        white += _stripe(np.abs(d) - edge, 0.06, blur) * open_road
        bay = (np.abs(d) > edge) & (np.abs(d) < edge + PARKING_M) & open_road
        white += _stripe(s - 6.0 * np.floor(s / 6.0) - 3.0, 0.05, blur) * bay
    # A crossing for people 1.2 to 4.2 m before the other road, and the stop line before it.
    zebra = (clear > 1.3) & (clear < 4.3) & (np.abs(d) < road.half_width_m - 0.3)
    phase = d - np.floor(d)
    white += zebra * np.clip((0.25 - np.abs(phase - 0.5)) / np.minimum(blur, 2.0) + 0.5, 0, 1)
    # On the right of those who come; a side road that ends here is reached against its direction.
    places = np.array(junctions or (0.0,), dtype=np.float32)
    before = s < places[np.argmin(np.abs(s[:, None] - places), axis=1)]
    coming = np.where(before, d < 0, d > 0)
    white += _stripe(clear - 5.2, 0.2, along) * (coming & (np.abs(d) < edge))
    return np.minimum(white, 1), np.minimum(yellow, 1)


def facade_albedo(
    facades: Facades,
    style: NDArray[np.uint8],
    wall: Floats,
    point: Floats,
    normal: Floats,
    footprint: Floats,
    lit: bool,
) -> tuple[Floats, Floats, Floats]:
    """Walls with windows.

    Args:
        facades: of the scene.
        style: (n,) rows of it.
        wall: (n, 3) colour between the windows.
        point, normal: (n, 3).
        footprint: (n,) m per pixel.
        lit: whether lights burn behind some windows.

    Returns:
        albedo (n, 3), share of glass (n,), light given off (n,).
    """
    u = normal[:, 0] * point[:, 1] - normal[:, 1] * point[:, 0] + 1000
    z = point[:, 2]
    pitch, storey = facades.pitch_m[style], facades.storey_m[style]
    column, row = np.floor(u / pitch), np.floor(z / storey)
    du, dz = np.abs(u / pitch - column - 0.5), np.abs(z / storey - row - 0.52)
    shop = row == 0
    half_u = np.where(shop, 0.44, facades.window_share[style] / 2)
    half_z = np.where(shop, 0.40, facades.height_share[style] / 2)
    soft = np.maximum(footprint, 0.01)
    inside = np.clip((half_u - du) * pitch / soft + 0.5, 0, 1) * np.clip(
        (half_z - dz) * storey / soft + 0.5, 0, 1
    )
    blurred = np.clip(1.5 - 2 * pitch / soft, 0, 1)
    glass = inside * (1 - blurred) + blurred * 4 * half_u * half_z
    frame = np.clip((half_u + 0.07 / pitch - du) * pitch / soft + 0.5, 0, 1) * np.clip(
        (half_z + 0.07 / storey - dz) * storey / soft + 0.5, 0, 1
    )
    luck = chance(column, row)
    level = 1 + 0.10 * noise(u, z, 2.0) + 0.05 * noise(u, z, 0.4)
    level *= 1 - 0.12 * np.clip(1.2 - z, 0, 1)  # splashed at the foot
    brick = facades.brick[style]
    if brick.any():
        course = np.floor(z / 0.075)
        shift = 0.125 * (course.astype(np.int32) & 1)
        visible = np.clip(0.07 / soft - 0.2, 0, 1) * brick
        mortar = np.maximum(
            np.abs((z / 0.075) % 1 - 0.5) > 0.40, np.abs(((u + shift) / 0.25) % 1 - 0.5) > 0.46
        )
        tone = 1 + 0.35 * (chance(np.floor((u + shift) / 0.25), course) - 0.5)
        level *= 1 + visible * (np.where(mortar, 1.25, tone) - 1)
    albedo = wall * level[:, None]
    albedo *= (1 - 0.35 * np.clip(frame - glass, 0, 1))[:, None]
    band = (np.abs(z / storey - np.round(z / storey)) < 0.035) & (row >= 0)
    albedo *= np.where(band, 0.8, 1.0).astype(np.float32)[:, None]
    curtain = np.where(luck > 0.55, np.float32(0.22), np.float32(0.0)) * (dz * luck < 0.12)
    pane = facades.glass[style] + curtain[:, None] * 0.6
    albedo = albedo + glass[:, None] * (pane - albedo)
    glow = np.zeros(len(u), np.float32)
    if lit:
        burning = chance(column + 17, row + 5) < np.where(shop, 0.45, facades.lit_share[style])
        # Behind the pane: a ceiling brighter than the floor, furniture, curtains.
        inside_room = np.clip(
            0.75 + (z / storey - row - 0.5) + 0.3 * _bilinear(_CLOUDS, u * 2.0, z * 3.0), 0.15, 1.3
        )
        glow = (glass * burning * (0.35 + 0.65 * luck) * inside_room).astype(np.float32)
    return albedo.astype(np.float32), glass.astype(np.float32), glow


def sky_radiance(
    directions: Floats,
    zenith: Floats,
    horizon: Floats,
    sun_direction: Floats,
    sun: Floats,
    cover: float,
    offset: tuple[float, float],
) -> Floats:
    """(n, 3) unit directions -> (n, 3) radiance of sky, clouds and the glow round the sun."""
    up = np.clip(directions[:, 2], 0.0, 1)
    share = np.power(1 - up, 3.0, dtype=np.float32)[:, None]
    colour = zenith + share * (horizon - zenith)
    flat = 1 / np.maximum(up, 0.035)
    u, v = directions[:, 0] * flat * 30 + offset[0], directions[:, 1] * flat * 30 + offset[1]
    thick = 0.75 * _bilinear(_CLOUDS, u, v) + 0.35 * _bilinear(_CLOUDS, u * 3.1, v * 3.1)
    density = np.clip((thick + (cover - 0.5) * 3.2) * 0.9, 0, 1) * np.clip(up * 9, 0, 1)
    white = (
        horizon.max()
        * (1.25 - 0.35 * np.clip(thick, -0.5, 1.5))[:, None]
        * np.array([0.98, 1.0, 1.03], np.float32)
    )
    colour = colour + (0.85 * density)[:, None] * (white - colour)
    towards = np.clip(directions @ sun_direction, 0, 1)
    glow = 0.05 * towards**8 + 0.25 * towards**64 + 6.0 * (towards > 0.9994)
    return colour + glow[:, None] * sun * np.float32(0.6 - 0.5 * max(cover - 0.5, 0))


def _bilinear(table: Floats, x: Floats, y: Floats) -> Floats:
    i, j = np.floor(x), np.floor(y)
    fx, fy = x - i, y - j
    i0, j0 = i.astype(np.int32) & (_SIDE - 1), j.astype(np.int32) & (_SIDE - 1)
    i1, j1 = (i0 + 1) & (_SIDE - 1), (j0 + 1) & (_SIDE - 1)
    top = table[j0, i0] * (1 - fx) + table[j0, i1] * fx
    low = table[j1, i0] * (1 - fx) + table[j1, i1] * fx
    return top * (1 - fy) + low * fy
