"""One frame as a detector sees it: read, augmented and labelled, the same for the same seed and draw."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..boxes import Boxes3D
from ..errors import DataError
from ..geometry import invert_rigid
from .augment import ImageAugmentation, augment_boxes, augment_points, plain_image_augmentation
from .object_pasting import (
    LabelledCloud,
    ObjectDatabase,
    build_database,
    database_key,
    paste_objects,
    read_database,
)
from .reader import FrameReader
from .samples import NuScenes
from .schema import Annotations, Batch, CameraFrame, PastFrames, Sample
from .settings import DataConfig
from .virtual_points import tables_fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frame:
    """A sample to load, with or without its labels."""

    token: str
    labelled: bool = True


def frames_of_tokens(tokens: Iterable[str], labelled: bool = False) -> list[Frame]:
    """Frames to detect in; their labels are not read unless asked for."""
    return [Frame(token, labelled) for token in tokens]


def frames_of_splits(
    nuscenes: NuScenes, labelled_splits: Sequence[str], unlabelled_splits: Sequence[str] = ()
) -> tuple[list[Frame], tuple[list[int], list[int]]]:
    """The frames of several splits, and the indices of the labelled and of the unlabelled ones among them."""
    labelled = [Frame(token) for split in labelled_splits for token in nuscenes.sample_tokens(split)]
    unlabelled = [
        Frame(token, labelled=False) for split in unlabelled_splits for token in nuscenes.sample_tokens(split)
    ]
    indices = list(range(len(labelled) + len(unlabelled)))
    return labelled + unlabelled, (indices[: len(labelled)], indices[len(labelled) :])


class FrameDataset(Dataset[Batch]):
    """Frames by (index, draw): the piece is a `Batch` of one sample, the same for the same seed and draw.

    Args:
        nuscenes: where the frames lie.
        frames: which ones; labels of unlabelled frames are never read, their boxes are None.
        config: what to load.
        seed: of the augmentation.
        train: False switches all augmentation off, and the drawing of steps back.
        cache: keep images and points in memory once read (decoded images where they are augmented, network
            images where not); the results are the same to the bit.
    """

    def __init__(
        self,
        nuscenes: NuScenes,
        frames: Sequence[Frame],
        config: DataConfig,
        seed: int = 0,
        train: bool = False,
        cache: bool = False,
    ) -> None:
        self.nuscenes = nuscenes
        self.frames = list(frames)
        self.config = config if train else _without_augmentation(config)
        self.seed = seed
        self.cache = cache
        self.reader = FrameReader(nuscenes, self.config, cache)
        self._objects = self._object_database()

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, frame_and_draw: tuple[int, int]) -> Batch:
        index, draw = frame_and_draw
        rng = np.random.default_rng([self.seed, draw])
        config = self.config
        sample = self.reader.sample(self.frames[index].token, self.frames[index].labelled)
        cameras = self._cameras(sample)
        bev_aug = np.eye(4) if config.bev_aug is None else config.bev_aug.draw(rng).matrix
        image_augs = [self._draw_image_aug(rng, camera) for camera in cameras]
        points = None
        boxes = self._target_boxes(sample.annotations, bev_aug)
        if config.load_points:
            raw_points = self.reader.points(sample)
            if boxes is not None and self._pastes(draw):
                raw_points, boxes = self._paste(sample, raw_points, boxes, bev_aug, draw)
            points = [torch.from_numpy(augment_points(bev_aug, raw_points))]
        # A random state of its own, so that the other augmentation is the same with and without colours.
        colours_rng = np.random.default_rng([self.seed, draw, 3])
        present = self._seen(sample, cameras, image_augs, bev_aug, colours_rng)
        past = self._past(present, sample, cameras, image_augs, bev_aug, draw, colours_rng)
        return replace(
            present, images=self._masked(present.images, draw), points=points, boxes=[boxes], past=past
        )

    def _seen(
        self,
        sample: Sample,
        cameras: Sequence[CameraFrame],
        image_augs: Sequence[ImageAugmentation],
        bev_aug: NDArray[np.float64],
        colours_rng: np.random.Generator,
    ) -> Batch:
        """What the cameras saw in a key frame, in the LiDAR frame of that time."""
        global2lidar = invert_rigid(sample.lidar2global)
        images = None
        if self.config.load_images:
            width, height = self.config.image_size_px
            pixels = np.empty((1, len(cameras), 3, height, width), dtype=np.uint8)
            for number, (camera, image_aug) in enumerate(zip(cameras, image_augs, strict=True)):
                network_image = self.reader.network_image(sample.token, camera, image_aug)  # (H, W, 3)
                pixels[0, number] = network_image.transpose(2, 0, 1)
                if self.config.colour_aug is not None:
                    pixels[0, number] = self.config.colour_aug.draw(colours_rng).apply(pixels[0, number])
            images = torch.from_numpy(pixels)
        cam2lidar = [bev_aug @ global2lidar @ camera.ego2global @ camera.cam2ego for camera in cameras]
        cam2img = [
            image_aug.matrix @ camera.cam2img for camera, image_aug in zip(cameras, image_augs, strict=True)
        ]
        return Batch(
            tokens=[sample.token],
            images=images,
            cam2img=_matrices(cam2img)[None],
            cam2lidar=_matrices(cam2lidar)[None],
            image_aug=_matrices([image_aug.matrix for image_aug in image_augs])[None],
            bev_aug=_matrices([bev_aug]),
            lidar2global=torch.from_numpy(sample.lidar2global)[None],
            points=None,
            boxes=[None],
            scenes=[sample.scene],
            timestamps_us=[sample.timestamp_us],
            lidar2ego=torch.from_numpy(sample.lidar2ego)[None],
        )

    def _past(
        self,
        present: Batch,
        sample: Sample,
        cameras: Sequence[CameraFrame],
        image_augs: Sequence[ImageAugmentation],
        bev_aug: NDArray[np.float64],
        draw: int,
        colours_rng: np.random.Generator,
    ) -> PastFrames | None:
        config = self.config.past
        if config is None:
            return None
        step = config.step
        if config.training_steps is not None:
            # A random state of its own, so that the augmentation is the same with and without a past.
            low, high = config.training_steps
            step = int(np.random.default_rng([self.seed, draw, 1]).integers(low, high + 1))
        channels = [camera.channel for camera in cameras]
        frames: list[Batch] = []
        gaps_s: list[float] = []
        earlier, seen = sample, present
        for _ in range(config.num_frames):
            before = self._key_frame_before(earlier, step)
            if before is not earlier:
                earlier = before
                earlier_cameras = self._cameras(earlier)
                if [camera.channel for camera in earlier_cameras] != channels:
                    raise DataError(
                        f"sample {earlier.token} has other cameras than its successor {sample.token}; "
                        "name the cameras that all samples have"
                    )
                seen = self._seen(earlier, earlier_cameras, image_augs, bev_aug, colours_rng)
            frames.append(seen)
            gaps_s.append(1e-6 * (sample.timestamp_us - earlier.timestamp_us))
        return PastFrames(frames, torch.tensor([gaps_s]))

    def _masked(self, images: Tensor | None, draw: int) -> Tensor | None:
        """(1, N, 3, H, W) with what the grid mask hides."""
        if self.config.grid_mask is None or images is None:
            return images
        rng = np.random.default_rng([self.seed, draw, 4])
        mask = self.config.grid_mask.draw(rng, self.config.image_size_px[1])
        return images if mask is None else torch.from_numpy(mask.apply(images[0].numpy()))[None]

    def _key_frame_before(self, sample: Sample, steps: int) -> Sample:
        """The key frame so many steps earlier, or the first of the scene.

        Raises:
            DataError: the table leads into another scene, or forward in time.
        """
        for _ in range(steps):
            if sample.previous_token is None:
                break
            before = self.reader.earlier_sample(sample.previous_token)
            if before.scene != sample.scene or before.timestamp_us >= sample.timestamp_us:
                raise DataError(
                    f"sample.json, token {sample.token!r}: prev is {before.token!r} of scene {before.scene!r}, "
                    f"{1e-6 * (sample.timestamp_us - before.timestamp_us):.2f} s earlier; expected an earlier "
                    f"sample of scene {sample.scene!r}, or nothing at its start"
                )
            sample = before
        return sample

    def fill_cache(self) -> None:
        """Reads every frame now, so that workers started later share the memory."""
        if self.cache:
            for index in range(len(self)):
                self[index, 0]

    def _cameras(self, sample: Sample) -> list[CameraFrame]:
        if self.config.cameras is None:
            return list(sample.cameras)
        by_channel = {camera.channel: camera for camera in sample.cameras}
        missing = [channel for channel in self.config.cameras if channel not in by_channel]
        if missing:
            raise DataError(
                f"sample {sample.token}: no camera {', '.join(missing)}; "
                f"the rig has {', '.join(by_channel) or 'none'}"
            )
        return [by_channel[channel] for channel in self.config.cameras]

    def _draw_image_aug(self, rng: np.random.Generator, camera: CameraFrame) -> ImageAugmentation:
        config = self.config
        width, height = camera.size_wh_px
        if width < 1 or height < 1:
            raise DataError(
                f"{camera.path}: sample_data.json gives the size {width}x{height}; "
                "write the image's width and height into the table"
            )
        if config.image_aug is None:
            offset = config.image_resize_offset
            return plain_image_augmentation(camera.size_wh_px, config.image_size_px, offset, config.image_fit)
        return config.image_aug.draw(rng, camera.size_wh_px, config.image_size_px, config.image_fit)

    def _object_database(self) -> ObjectDatabase | None:
        """What may be pasted: cut out of the labelled frames, once for each set of frames and settings."""
        config = self.config
        pasting = config.object_pasting
        labelled = [index for index, frame in enumerate(self.frames) if frame.labelled]
        if pasting is None or not labelled:
            return None
        key = database_key(
            tables_fingerprint(self.nuscenes),
            [self.frames[index].token for index in labelled],
            (config.num_sweeps, config.remove_ego_radius_m, config.virtual_points, pasting.min_points),
        )
        path = self.nuscenes.root / pasting.folder / key
        if not path.exists():
            log.info("cutting the objects of %d frames out for pasting, once: %s", len(labelled), path)
            build_database(self._labelled_clouds(labelled), path, pasting.min_points)
        return read_database(path)

    def _labelled_clouds(self, labelled: Sequence[int]) -> Iterator[LabelledCloud]:
        for number, index in enumerate(labelled):
            if number and number % 1000 == 0:
                log.info("objects of %d of %d frames cut out", number, len(labelled))
            sample = self.reader.sample(self.frames[index].token)
            assert sample.annotations is not None, sample.token
            annotations = sample.annotations
            yield LabelledCloud(self.reader.points(sample), annotations.boxes, annotations.labels)

    def _pastes(self, draw: int) -> bool:
        pasting = self.config.object_pasting
        if pasting is None or self._objects is None:
            return False
        return pasting.stop_after_samples is None or draw < pasting.stop_after_samples

    def _paste(
        self,
        sample: Sample,
        points: NDArray[np.float32],
        boxes: Boxes3D,
        bev_aug: NDArray[np.float64],
        draw: int,
    ) -> tuple[NDArray[np.float32], Boxes3D]:
        """Points before and boxes after augmentation, with pasted objects."""
        pasting, objects, annotations = self.config.object_pasting, self._objects, sample.annotations
        assert pasting is not None and objects is not None and annotations is not None
        cloud = LabelledCloud(points, annotations.boxes, annotations.labels)
        # A random state of its own, so that the augmentation is the same with and without pasting.
        rng = np.random.default_rng([self.seed, draw, 2])
        cloud, pasted = paste_objects(cloud, objects, pasting.counts, rng, self.config.max_box_distance_m)
        added, labels = objects.boxes[pasted], objects.labels[pasted]
        moved = torch.from_numpy(augment_boxes(bev_aug, added)).float()
        both = Boxes3D(torch.cat([boxes.boxes, moved]), torch.cat([boxes.labels, torch.from_numpy(labels)]))
        return cloud.points, both

    def _target_boxes(self, annotations: Annotations | None, bev_aug: NDArray[np.float64]) -> Boxes3D | None:
        if annotations is None:
            return None
        config = self.config
        num_points = annotations.num_lidar_points + annotations.num_radar_points
        enough = (num_points >= config.min_points_in_box) | (num_points < 0)  # below 0: nobody counted
        keep = (annotations.labels >= 0) & enough
        if config.max_box_distance_m is not None:
            keep &= (np.abs(annotations.boxes[:, :2]) <= config.max_box_distance_m).all(axis=1)
        boxes = augment_boxes(bev_aug, annotations.boxes[keep])
        return Boxes3D(torch.from_numpy(boxes).float(), torch.from_numpy(annotations.labels[keep]))


def _matrices(matrices: Sequence[NDArray[np.float64]]) -> Tensor:
    return torch.from_numpy(np.array(matrices, dtype=np.float64).reshape(-1, 4, 4)).float()


def _without_augmentation(config: DataConfig) -> DataConfig:
    past = config.past and msgspec.structs.replace(config.past, training_steps=None)
    none = dict.fromkeys(("image_aug", "colour_aug", "grid_mask", "bev_aug", "object_pasting"))
    return msgspec.structs.replace(config, past=past, **none)
