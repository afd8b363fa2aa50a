"""What frames are made of, read from disk: samples, images, points, each kept where a cache is asked for."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError
from .augment import ImageAugmentation, fitting_scale
from .frame_cache import FrameCache, cached
from .images import DecodedImage, load_image, reduction_for
from .points import load_points
from .samples import NuScenes
from .schema import CameraFrame, Sample
from .settings import DataConfig
from .virtual_points import VirtualPointsInput, load_mvp_points, require_same_tables

log = logging.getLogger(__name__)

# How much of the resolution at the largest scale is decoded. Enlarging by a tenth there cannot be seen, and
# lets the published scales (0.38 to 0.55) decode at half size, in half the time.
SHARPNESS = 0.9


class FrameReader:
    """Reads as a config says; nothing here depends on a draw.

    Args:
        nuscenes: where the frames lie.
        config: without augmentation where none is drawn; its `frame_cache` is kept on disk.
        cache: keep all that was read in memory (decoded images where they are augmented, network images where not).
    """

    def __init__(self, nuscenes: NuScenes, config: DataConfig, cache: bool) -> None:
        self.nuscenes = nuscenes
        self.config = config
        self.cache = cache
        self._samples: dict[tuple[str, bool], Sample] = {}  # by token, with and without labels
        self._earlier: dict[str, Sample] = {}
        self._images: dict[tuple[str, str], DecodedImage | NDArray[np.uint8]] = {}  # by token and channel
        self._points: dict[str, NDArray[np.float32]] = {}
        on_disk = config.frame_cache
        disk = None if on_disk is None else FrameCache(nuscenes.root, on_disk)
        self._image_cache = disk if on_disk and on_disk.images else None
        self._sweep_cache = disk if on_disk and on_disk.sweeps else None
        self.sweeps_without_virtual_points = 0
        if config.load_points and config.virtual_points is not None:
            require_same_tables(nuscenes, nuscenes.root / config.virtual_points.folder)

    def sample(self, token: str, labelled: bool = True) -> Sample:
        """A frame with the sweeps that the config asks for; labels are read only if it is labelled."""
        sample = self._samples.get((token, labelled))
        if sample is None:
            sample = self.nuscenes.sample(token, self.config.num_sweeps, labelled)
            if self.cache:
                self._samples[token, labelled] = sample
        return sample

    def earlier_sample(self, token: str) -> Sample:
        """A frame of which only the images count: the key sweep alone, no labels."""
        sample = self._earlier.get(token)
        if sample is None:
            sample = self.nuscenes.sample(token, num_sweeps=0, read_annotations=False)
            if self.cache:
                self._earlier[token] = sample
        return sample

    def network_image(
        self, token: str, camera: CameraFrame, image_aug: ImageAugmentation
    ) -> NDArray[np.uint8]:
        """(H, W, 3): what the network sees of a camera."""
        key = (token, camera.channel)
        kept = self._images.get(key)
        if isinstance(kept, np.ndarray):
            return kept
        if self.config.image_aug is None:
            settings = (
                "network image",
                camera.size_wh_px,
                self._scale(camera),
                self.config.exact_jpeg,
                image_aug,
            )
            image = kept = cached(
                self._image_cache, [camera.path], settings, lambda: image_aug.apply(self._load_image(camera))
            )
        else:
            kept = kept or self._decoded_image(camera)
            image = image_aug.apply(kept)
        if self.cache:
            self._images[key] = kept
        return image

    def _decoded_image(self, camera: CameraFrame) -> DecodedImage:
        if self._image_cache is None:
            return self._load_image(camera)
        size_wh_px, exact = camera.size_wh_px, self.config.exact_jpeg
        settings = (
            "decoded image",
            size_wh_px,
            None if exact else reduction_for(size_wh_px, self._scale(camera)),
        )
        pixels = self._image_cache.array(
            [camera.path], settings, lambda: np.asarray(self._load_image(camera).image)
        )
        return DecodedImage(
            Image.fromarray(pixels), size_wh_px, round(size_wh_px[0] / pixels.shape[1]), exact
        )

    def _load_image(self, camera: CameraFrame) -> DecodedImage:
        return load_image(camera, self._scale(camera), self.config.exact_jpeg)

    def _scale(self, camera: CameraFrame) -> float:
        """The scale to decode for: the largest that may be drawn, so that it does not depend on the draw."""
        config = self.config
        offset = config.image_aug.resize_range[1] if config.image_aug else config.image_resize_offset
        return SHARPNESS * (fitting_scale(camera.size_wh_px, config.image_size_px, config.image_fit) + offset)

    def points(self, sample: Sample) -> NDArray[np.float32]:
        """(P, 5) or, with virtual points, (P, 17): all sweeps of the sample, before augmentation.

        Raises:
            DataError: the sample has no LiDAR recording, or one that cannot be read.
        """
        if sample.token in self._points:
            return self._points[sample.token]
        if not sample.sweeps:
            raise DataError(
                f"sample {sample.token} (scene {sample.scene}) has no LiDAR recording, and points are asked for; "
                "without LiDAR a student learns alone (student.depth_loss=null, or data.load_points=false)"
            )
        if self.config.virtual_points is None:
            points = self._joined_sweeps(sample)
        else:
            points = self._with_virtual_points(sample, self.config.virtual_points)
        if self.cache:
            self._points[sample.token] = points
        return points

    def _joined_sweeps(self, sample: Sample) -> NDArray[np.float32]:
        radius_m = self.config.remove_ego_radius_m
        poses = [sample.lidar2global, *(sweep.ego2global @ sweep.lidar2ego for sweep in sample.sweeps)]
        times_us = [sweep.timestamp_us for sweep in sample.sweeps]
        settings = ("sweeps", radius_m, times_us, np.stack(poses).tobytes())
        return cached(
            self._sweep_cache,
            [sweep.path for sweep in sample.sweeps],
            settings,
            lambda: load_points(sample, radius_m),
        )

    def _with_virtual_points(self, sample: Sample, source: VirtualPointsInput) -> NDArray[np.float32]:
        points, num_absent = load_mvp_points(
            sample,
            self.nuscenes.root / source.folder,
            self.config.remove_ego_radius_m,
            source.absent,
            source.as_released,
        )
        if num_absent and not self.sweeps_without_virtual_points:
            log.warning(
                "sample %s: %d earlier sweeps without virtual points (%s); further ones are only counted",
                sample.token,
                num_absent,
                source.absent,
            )
        self.sweeps_without_virtual_points += num_absent
        return points
