"""Light that comes back along rays: sun with shadows, sky, lamps, mirrors of the sky, haze."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .casting import Hits, Stage
from .meshes import Floats, Material
from .roads import RoadMap
from .surroundings import Facades
from .textures import GroundLook, facade_albedo, grain, ground_albedo, noise, sky_radiance
from .weather import Air

HEADLIGHTS_EGO_M = np.array([[3.0, 0.6, 0.65], [3.0, -0.6, 0.65]])
_LIGHT_COLOUR = {
    Material.HEADLIGHT: np.array([1.0, 0.93, 0.78], np.float32),
    Material.TAILLIGHT: np.array([1.0, 0.06, 0.03], np.float32),
}


class LampLight:
    """Light of the street lamps on the ground (n, 3), baked into a grid of 1 m."""

    def __init__(self, lamps: NDArray[np.float64], half_extent_m: float = 130.0) -> None:
        self.half_extent_m = half_extent_m
        axis = np.arange(-half_extent_m, half_extent_m, 1.0, dtype=np.float32) + 0.5
        x, y = np.meshgrid(axis, axis)
        self.grid = np.zeros_like(x)
        for lamp_x, lamp_y, height in lamps.astype(np.float32):
            square = (x - lamp_x) ** 2 + (y - lamp_y) ** 2 + height * height
            self.grid += 26.0 * height / square**1.5

    def at(self, x: Floats, y: Floats) -> Floats:
        last = len(self.grid) - 1
        i = np.clip((y + self.half_extent_m).astype(np.int32), 0, last)
        j = np.clip((x + self.half_extent_m).astype(np.int32), 0, last)
        return self.grid[i, j]


@dataclass(frozen=True)
class Backdrop:
    """All that shading needs to know of a scene besides its triangles."""

    roads: RoadMap
    look: GroundLook
    facades: Facades
    lamps: LampLight | None  # None by day
    air: Air


def radiance(
    stage: Stage,
    scene: Backdrop,
    origin: NDArray[np.float64],
    directions: Floats,
    hits: Hits,
    pixel_rad: float,
    ego2world: NDArray[np.float64],
) -> Floats:
    """Light along rays from one point.

    Args:
        stage: posed at the time of the exposure.
        scene: roads, light and air.
        origin: (3,) world frame.
        directions: (n, 3) unit, world frame.
        hits: of these rays.
        pixel_rad: angle that one pixel covers.
        ego2world: (4, 4), for the own headlights.

    Returns:
        (n, 3) linear RGB.
    """
    air = scene.air
    out = np.empty((len(directions), 3), dtype=np.float32)
    seen = hits.primitive >= 0
    sky = np.flatnonzero(~seen)
    drift = (float(air.sun_direction[0]) * 100 + 200, float(air.sun_direction[1]) * 100 + 200)
    out[sky] = sky_radiance(
        directions[sky], air.zenith, air.horizon, air.sun_direction, air.sun, air.cloud_cover, drift
    )
    hit = np.flatnonzero(seen)
    if len(hit):
        out[hit] = _surface_radiance(
            stage, scene, origin, directions[hit], _take(hits, hit), pixel_rad, ego2world
        )
    return out


def _take(hits: Hits, index: NDArray[np.int64]) -> Hits:
    return Hits(hits.range_m[index], hits.primitive[index], hits.normal[index])


def _surface_radiance(
    stage: Stage,
    scene: Backdrop,
    origin: NDArray[np.float64],
    view: Floats,
    hits: Hits,
    pixel_rad: float,
    ego2world: NDArray[np.float64],
) -> Floats:
    air = scene.air
    range_m, normal = hits.range_m, hits.normal
    point = origin.astype(np.float32) + view * range_m[:, None]
    material = stage.material[hits.primitive]
    albedo = stage.colour[hits.primitive]
    footprint = range_m * np.float32(pixel_rad)
    count = len(range_m)
    # Mirror share straight on and at grazing angles (Schlick); light given off.
    mirror = np.zeros(count, np.float32)
    mirror_most = np.zeros(count, np.float32)
    glow = np.zeros((count, 3), np.float32)
    openness = np.ones(count, np.float32)

    is_ground = material == Material.GROUND
    i = np.flatnonzero(is_ground)
    if len(i):
        slant = np.maximum(np.abs(view[i, 2]), 0.02)
        colour, on_road, paint = ground_albedo(
            scene.roads, point[i, 0], point[i, 1], footprint[i], footprint[i] / slant, scene.look
        )
        if air.wetness:
            puddle = np.clip(noise(point[i, 0], point[i, 1], 0.35) * 1.2 + 0.5, 0, 1) * on_road
            colour *= (0.62 - 0.15 * puddle)[:, None]
            mirror[i] = 0.02 + 0.05 * puddle * (1 - paint)
            mirror_most[i] = 0.35 + 0.45 * puddle
        albedo[i] = colour
        # Daylight does not reach below vehicles.
        up = np.zeros((len(i), 3), np.float32)
        up[:, 2] = 1
        openness[i] = 1 - 0.72 * stage.blocked(point[i] + up * 0.02, up, 1.6)
    i = np.flatnonzero(material == Material.FACADE)
    if len(i):
        slant = np.maximum(np.abs(np.einsum("ij,ij->i", view[i], normal[i])), 0.15)
        colour, glass, lit = facade_albedo(
            scene.facades,
            stage.style[hits.primitive[i]],
            albedo[i],
            point[i],
            normal[i],
            footprint[i] / slant,
            air.dark,
        )
        albedo[i] = np.where(normal[i, 2:3] > 0.7, 0.2, colour)
        mirror[i], mirror_most[i] = 0.16 * glass, 0.7 * glass
        glow[i] += (
            lit[:, None] * np.array([0.55, 0.40, 0.2], np.float32) * (0.35 if air.sun.max() > 0.5 else 0.8)
        )
    i = np.flatnonzero(material == Material.FOLIAGE)
    if len(i):
        albedo[i] *= (1 + 0.25 * grain(point[i, 0] + point[i, 2], point[i, 1] - point[i, 2], 9.0))[
            :, None
        ].clip(0.3, 2)
        leaf = normal[i] * 0.5
        leaf[:, 2] += 0.6
        normal[i] = leaf / np.linalg.norm(leaf, axis=1, keepdims=True)
    i = np.flatnonzero(material == Material.PAINT)
    mirror[i], mirror_most[i] = 0.055, 0.55
    i = np.flatnonzero(material == Material.GLASS)
    mirror[i], mirror_most[i] = 0.09, 0.8
    for kind, colour in _LIGHT_COLOUR.items():
        i = np.flatnonzero(material == kind)
        glow[i] += colour * (2.6 if air.dark else 0.12 if kind is Material.HEADLIGHT else 0.05)
    i = np.flatnonzero(material == Material.LAMP)
    glow[i] += albedo[i] * (3.0 if air.dark else 0.9)

    rise = normal[:, 2]
    # Sky from above; sunlit ground throws light back up onto walls and bellies.
    bounce = 0.10 * air.sun * max(float(air.sun_direction[2]), 0.0) + 0.05 * air.sky
    light = np.outer((0.62 + 0.38 * rise) * openness, air.sky)
    light += np.outer(0.5 - 0.5 * rise, bounce)
    facing = normal @ air.sun_direction
    if air.sun.max() > 0:
        sunny = np.flatnonzero(facing > 0)
        towards = np.broadcast_to(air.sun_direction, (len(sunny), 3)).astype(np.float32)
        start = point[sunny] + hits.normal[sunny] * 0.02 + towards * 0.01
        clear = ~stage.blocked(start, np.ascontiguousarray(towards), 250.0)
        share = np.zeros(count, np.float32)
        share[sunny] = facing[sunny] * clear
        light += share[:, None] * air.sun
        shiny = np.flatnonzero((mirror > 0) & (share > 0))
        half = air.sun_direction - view[shiny]
        half /= np.linalg.norm(half, axis=1, keepdims=True)
        glint = np.clip(np.einsum("ij,ij->i", half, normal[shiny]), 0, 1)
        for _ in range(6):  # to the power of 64
            glint *= glint
        glow[shiny] += (mirror[shiny] * 14 * glint)[:, None] * air.sun
    if scene.lamps is not None:
        lamp = scene.lamps.at(point[:, 0], point[:, 1]) * (0.45 + 0.55 * np.maximum(normal[:, 2], 0))
        light += lamp[:, None] * np.array([1.0, 0.78, 0.5], np.float32)
        light += _headlights(point, normal, material, ego2world)[:, None] * np.array(
            [1.0, 0.95, 0.85], np.float32
        )

    result = albedo
    result *= light
    result *= np.float32(0.55)
    i = np.flatnonzero(mirror_most)
    cosine = np.einsum("ij,ij->i", view[i], normal[i])
    grazing = 1 - np.minimum(np.abs(cosine), 1)
    square = grazing * grazing
    share = mirror[i] + (mirror_most[i] - mirror[i]) * square * square * grazing
    up = view[i, 2] - 2 * cosine * normal[i, 2]
    above = np.clip(up * 6 + 0.5, 0, 1)[:, None]
    mirrored = air.horizon + np.sqrt(np.clip(up, 0, 1))[:, None] * (air.zenith - air.horizon)
    ground = air.sky * 0.08
    # In a street most of the horizon is walls, not sky.
    mirrored = ground + above * (mirrored * np.float32(0.75) - ground)
    result[i] += share[:, None] * (mirrored - result[i]) * openness[i, None]
    result += glow
    veil = air.horizon * np.float32(0.85)
    result -= veil
    result *= np.exp(-air.haze_per_m * range_m)[:, None]
    result += veil
    return result


def _headlights(
    point: Floats, normal: Floats, material: NDArray[np.uint8], ego2world: NDArray[np.float64]
) -> Floats:
    """(n,) light of the own dipped beams; reflectors send it straight back."""
    forward, left, up = (ego2world[:3, k].astype(np.float32) for k in range(3))
    total = np.zeros(len(point), np.float32)
    for lamp in HEADLIGHTS_EGO_M:
        start = (ego2world[:3, :3] @ lamp + ego2world[:3, 3]).astype(np.float32)
        ray = point - start
        ahead = ray @ forward
        near = np.flatnonzero((ahead > 0.5) & (ahead < 90))
        ray, ahead = ray[near], ahead[near]
        sideways, rise = (ray @ left) / ahead, (ray @ up) / ahead
        beam = np.exp(-((sideways / 0.42) ** 2)) * np.exp(-(((rise + 0.035) / 0.09) ** 2))
        beam *= 0.25 + 0.75 * (rise < 0.01)
        square = np.einsum("ij,ij->i", ray, ray)
        cosine = np.abs(np.einsum("ij,ij->i", ray, normal[near])) / np.sqrt(square)
        reflector = material[near] == Material.RETROREFLECTOR
        gain = np.where(reflector, 4.0, 0.12 + 0.88 * cosine).astype(np.float32)
        total[near] += 110 * beam * gain / (square + 25)
    return total
