"""Images: rays through pixels, light, exposure, noise; and which actor each pixel shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .casting import Stage
from .rig import Calibration, pixel_rays, rays_through
from .shading import Backdrop, radiance

EDGE_CONTRAST = 0.06  # of full scale; pixels that differ more from a neighbour are sampled again
EDGE_SHARE = 0.11  # at most this share of an image is
_EDGE_OFFSETS = np.array([[0.33, -0.28], [-0.31, 0.3]], dtype=np.float32)


@dataclass(frozen=True)
class Picture:
    """image (H, W, 3) uint8 and instance (H, W) int32, the number of the actor in the middle of each pixel."""

    image: NDArray[np.uint8]
    instance: NDArray[np.int32]


def take_picture(
    stage: Stage,
    scene: Backdrop,
    camera: Calibration,
    ego2world: NDArray[np.float64],
    size_px: tuple[int, int],
    rng: np.random.Generator,
) -> Picture:
    """What a camera sees of the stage, which must be posed at the time of the exposure.

    Args:
        stage, scene: of the scene.
        camera: with intrinsics for `size_px`.
        ego2world: (4, 4) pose of the vehicle at that time.
        size_px: (W, H).
        rng: of the noise.
    """
    width, height = size_px
    intrinsic = camera.intrinsic
    assert intrinsic is not None, camera.channel
    cam2world = ego2world @ camera.sensor2ego
    turn = cam2world[:3, :3].T.astype(np.float32)
    origin = cam2world[:3, 3]
    pixel_rad = 1 / intrinsic[0, 0]

    def look(rays: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Exposed values 0 to 1, and primitives, along rays of the camera frame."""
        directions = rays @ turn
        origins = np.broadcast_to(origin.astype(np.float32), directions.shape)
        hits = stage.cast(np.ascontiguousarray(origins), directions)
        primitive = hits.primitive
        return expose(
            radiance(stage, scene, origin, directions, hits, pixel_rad, ego2world), scene.air.exposure
        ), primitive

    values, primitive = look(pixel_rays(intrinsic, size_px))
    instance = np.where(primitive >= 0, stage.instance[np.maximum(primitive, 0)], 0)
    _sample_edges_again(values, width, height, lambda u, v: look(rays_through(intrinsic, u, v))[0])
    image = develop(values.reshape(height, width, 3), scene.air.noise, rng)
    return Picture(image, instance.reshape(height, width).astype(np.int32))


def _sample_edges_again(values, width: int, height: int, look) -> None:
    """Replaces the pixels on edges by the mean of three samples, in place."""
    level = values.mean(axis=1).reshape(height, width)
    contrast = np.zeros_like(level)
    across, down = np.abs(np.diff(level, axis=1)), np.abs(np.diff(level, axis=0))
    contrast[:, :-1] = across
    contrast[:, 1:] = np.maximum(contrast[:, 1:], across)
    contrast[:-1] = np.maximum(contrast[:-1], down)
    contrast[1:] = np.maximum(contrast[1:], down)
    contrast = contrast.ravel()
    edges = np.flatnonzero(contrast > EDGE_CONTRAST)
    most = int(EDGE_SHARE * len(contrast))
    if len(edges) > most:
        edges = edges[np.argpartition(-contrast[edges], most)[:most]]
    if not len(edges):
        return
    v, u = np.divmod(edges, width)
    offsets = _EDGE_OFFSETS
    again = look((u + offsets[:, :1]).ravel(), (v + offsets[:, 1:]).ravel())
    values[edges] = (values[edges] + again.reshape(len(offsets), len(edges), 3).sum(axis=0)) / (
        len(offsets) + 1
    )


def expose(light: NDArray[np.float32], exposure: float) -> NDArray[np.float32]:
    """Linear light -> display values in 0 to 1: a soft shoulder, then gamma 2."""
    return np.sqrt(1 - np.exp(np.maximum(light, 0) * np.float32(-1.25 * exposure)))


def develop(values: NDArray[np.floating], noise: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(H, W, 3) display values -> 8 bits, with the lens's fall-off and the sensor's noise."""
    height, width, _ = values.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    falloff = (1 - 0.09 * (x * x + y * y)).astype(np.float32)
    grain = rng.standard_normal(values.shape, dtype=np.float32)
    # Shot noise in linear light grows as the square root; after the gamma it is about level, more in the dark.
    values = values * falloff[..., None] + grain * np.float32(noise) * (1.3 - 0.6 * values)
    return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)
