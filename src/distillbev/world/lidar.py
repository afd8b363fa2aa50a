"""One turn of the LiDAR: ranges with noise, intensities by material, lost returns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .casting import Stage
from .meshes import Material
from .shading import Backdrop
from .textures import ground_albedo

RANGE_NOISE_M = 0.02
MAX_RANGE_M = 100.0
MIN_RANGE_M = 1.0
# Reflectivity (share of full scale) = base + gain * brightness of the colour.
_BASE = {
    Material.GROUND: (0.03, 0.35), Material.MATTE: (0.05, 0.35), Material.FACADE: (0.05, 0.35),
    Material.FOLIAGE: (0.08, 0.6), Material.PAINT: (0.06, 0.3), Material.GLASS: (0.02, 0.0),
    Material.RETROREFLECTOR: (0.8, 0.2), Material.HEADLIGHT: (0.25, 0.2), Material.TAILLIGHT: (0.6, 0.2),
    Material.LAMP: (0.2, 0.2), Material.CLOTH: (0.08, 0.4),
}  # fmt: skip
_REFLECTIVITY = np.array([_BASE[Material(k)] for k in range(len(Material))], dtype=np.float32)


def take_sweep(
    stage: Stage,
    scene: Backdrop,
    lidar2world: NDArray[np.float64],
    directions: NDArray[np.float32],
    rings: NDArray[np.float32],
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """(n, 5) x, y, z (m, LiDAR frame), intensity (0-255), ring; the whole turn at the instant of its end.

    The stage must be posed at that instant. Rays without a return give no row.
    """
    turn = lidar2world[:3, :3].T.astype(np.float32)
    origin = lidar2world[:3, 3].astype(np.float32)
    world = directions @ turn
    hits = stage.cast(np.ascontiguousarray(np.broadcast_to(origin, world.shape)), world)
    primitive = np.maximum(hits.primitive, 0)
    material = stage.material[primitive]
    brightness = stage.colour[primitive].mean(axis=1)
    ground = np.flatnonzero((material == Material.GROUND) & (hits.primitive >= 0))
    point = origin + world[ground] * hits.range_m[ground, None]
    blur = np.full(len(ground), 0.08, np.float32)
    albedo, _, paint = ground_albedo(scene.roads, point[:, 0], point[:, 1], blur, blur, scene.look)
    brightness[ground] = albedo.mean(axis=1) + 0.5 * paint
    reflectivity = _REFLECTIVITY[material, 0] + _REFLECTIVITY[material, 1] * brightness
    if scene.air.wetness:
        reflectivity = np.where(material == Material.GROUND, reflectivity * 0.4, reflectivity)
    cosine = np.abs(np.einsum("ij,ij->i", hits.normal, world))
    strength = reflectivity * (0.25 + 0.75 * cosine)
    range_m = hits.range_m
    # A return is lost when little light comes back; the reach grows with the root of the reflectivity.
    reach = 190.0 * np.sqrt(strength)
    chance = 0.985 / (1 + (range_m / np.maximum(reach, 1e-3)) ** 4) * (1 - scene.air.lidar_dropout)
    draw = rng.random(len(range_m), dtype=np.float32)
    kept = (hits.primitive >= 0) & (draw < chance) & (range_m > MIN_RANGE_M) & (range_m < MAX_RANGE_M)
    noisy = range_m[kept] + rng.standard_normal(int(kept.sum()), dtype=np.float32) * np.float32(RANGE_NOISE_M)
    sweep = np.empty((int(kept.sum()), 5), dtype=np.float32)
    sweep[:, :3] = directions[kept] * noisy[:, None]
    sweep[:, 3] = np.clip(strength[kept] * 160 * rng.uniform(0.85, 1.15, len(sweep)), 0, 255).astype(np.uint8)
    sweep[:, 4] = rings[kept]
    if scene.air.wetness and scene.air.lidar_dropout:
        # Drops close by return a little light of their own.
        drops = rng.random(len(sweep)) < 0.004
        sweep[drops, :3] *= (rng.uniform(0.05, 0.6, (int(drops.sum()), 1))).astype(np.float32)
        sweep[drops, 3] = rng.integers(0, 5, int(drops.sum()))
        sweep = sweep[np.linalg.norm(sweep[:, :3], axis=1) > MIN_RANGE_M]
    return sweep


def points_in_boxes(points: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many of (n, 3) points lie in each of (m, 7) boxes of the same frame, faces included: (m,)."""
    order = np.argsort(points[:, 0])
    points = points[order]
    counts = np.zeros(len(boxes), dtype=np.int64)
    for k, (x, y, z, length, width, height, yaw) in enumerate(boxes):
        # Sorted by x, only a strip of the points can lie in a box.
        reach = np.hypot(length, width) / 2 + 0.01
        first, last = np.searchsorted(points[:, 0], (x - reach, x + reach))
        offset = points[first:last] - (x, y, z)
        along = offset[:, 0] * np.cos(yaw) + offset[:, 1] * np.sin(yaw)
        across = offset[:, 1] * np.cos(yaw) - offset[:, 0] * np.sin(yaw)
        inside = (
            (np.abs(along) <= length / 2)
            & (np.abs(across) <= width / 2)
            & (np.abs(offset[:, 2]) <= height / 2)
        )
        counts[k] = inside.sum()
    return counts
