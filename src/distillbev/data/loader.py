"""From frames to batches: deterministic loading and augmentation, and which frames each training step sees.

A step's batch is a pure function of the seed and the step's number, whatever the workers, the ranks or the
step from which a run was resumed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..boxes import Boxes3D
from ..config import Config
from ..errors import ConfigError, DataError, DistillBevError
from ..geometry import invert_rigid
from .augment import (
    BevAugConfig,
    ImageAugConfig,
    ImageAugmentation,
    augment_boxes,
    augment_points,
    plain_image_augmentation,
)
from .images import DecodedImage, load_image
from .object_pasting import (
    LabelledCloud,
    ObjectDatabase,
    ObjectPastingConfig,
    build_database,
    database_key,
    paste_objects,
    read_database,
)
from .points import load_points
from .samples import NuScenes
from .schema import Annotations, Batch, CameraFrame, PastFrames, Sample
from .virtual_points import (
    VirtualPointsInput,
    load_mvp_points,
    require_same_tables,
    tables_fingerprint,
)

T = TypeVar("T")

log = logging.getLogger(__name__)

# How much of the resolution at the largest scale is decoded. Enlarging by a tenth there cannot be seen, and
# lets the published scales (0.38 to 0.55) decode at half size, in half the time.
SHARPNESS = 0.9


class PastConfig(Config, frozen=True):
    """Which earlier key frames come with each sample: `num_frames`, each `step` key frames before the next.

    `training_steps` draws the step anew for each sample in training, from the first to the last of the two, so
    that a detector learns to cope with gaps of any length.
    """

    num_frames: int = 1
    step: int = 1
    training_steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.step < 1:
            raise ConfigError(
                f"num_frames={self.num_frames}, step={self.step}; expected 1 or more of both "
                "(past=None for no earlier frames)"
            )
        if self.training_steps is not None and not 1 <= self.training_steps[0] <= self.training_steps[1]:
            raise ConfigError(f"training_steps={self.training_steps}; expected (low, high) from 1 on")


class DataConfig(Config, frozen=True):
    """What a detector is fed, and how training varies it (both augmentations are off outside training)."""

    image_size_px: tuple[int, int] = (704, 256)  # width, height of the network's image
    image_resize_offset: float = 0.0  # added to the scale that fits the width, where images are not augmented
    image_aug: ImageAugConfig | None = None
    bev_aug: BevAugConfig | None = None
    cameras: tuple[str, ...] | None = None  # channels, in the order of the batch; None for all of the rig
    num_sweeps: int = 0  # earlier LiDAR sweeps besides the key sweep
    virtual_points: VirtualPointsInput | None = None  # points then have 17 columns, not 5
    object_pasting: ObjectPastingConfig | None = None  # in training, for LiDAR teachers
    past: PastConfig | None = None  # earlier key frames' images, for detectors with a history
    load_images: bool = True
    load_points: bool = True
    exact_jpeg: bool = False  # decode in full and resize as the reference does
    remove_ego_radius_m: float = 1.0
    min_points_in_box: int = 1  # LiDAR and radar returns together; boxes with fewer are no targets
    max_box_distance_m: float | None = None  # from the LiDAR, along x or y; None for no limit

    def __post_init__(self) -> None:
        if min(self.image_size_px) < 1:
            raise ConfigError(f"image_size_px={self.image_size_px}: width and height must be positive pixels")
        if self.object_pasting is not None and (self.load_images or not self.load_points):
            raise ConfigError(
                "object_pasting puts objects among LiDAR points only; expected load_images=false and "
                "load_points=true, or object_pasting=null for a detector that sees images"
            )
        if self.num_sweeps < 0:
            raise ConfigError(
                f"num_sweeps={self.num_sweeps}: 0 is the key sweep alone, more adds earlier ones"
            )
        if self.cameras is not None and (not self.cameras or len(set(self.cameras)) != len(self.cameras)):
            raise ConfigError(
                f"cameras={self.cameras}: name each channel once, or leave it out for all cameras"
            )


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
        train: False switches both augmentations off, and the drawing of steps back.
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
        self._samples: dict[int, Sample] = {}
        self._earlier: dict[str, Sample] = {}  # by token
        self._images: dict[tuple[str, str], DecodedImage | NDArray[np.uint8]] = {}  # by token and channel
        self._points: dict[int, NDArray[np.float32]] = {}
        self.sweeps_without_virtual_points = 0
        if config.load_points and config.virtual_points is not None:
            require_same_tables(nuscenes, nuscenes.root / config.virtual_points.folder)
        self._objects = self._object_database()

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, frame_and_draw: tuple[int, int]) -> Batch:
        index, draw = frame_and_draw
        rng = np.random.default_rng([self.seed, draw])
        config = self.config
        sample = self._sample(index)
        cameras = self._cameras(sample)
        bev_aug = np.eye(4) if config.bev_aug is None else config.bev_aug.draw(rng).matrix
        image_augs = [self._draw_image_aug(rng, camera) for camera in cameras]
        points = None
        boxes = self._target_boxes(sample.annotations, bev_aug)
        if config.load_points:
            raw_points = self._raw_points(index, sample)
            if boxes is not None and self._pastes(draw):
                raw_points, boxes = self._paste(sample, raw_points, boxes, bev_aug, draw)
            points = [torch.from_numpy(augment_points(bev_aug, raw_points))]
        present = self._seen(sample, cameras, image_augs, bev_aug)
        return replace(
            present,
            points=points,
            boxes=[boxes],
            past=self._past(present, sample, cameras, image_augs, bev_aug, draw),
        )

    def _seen(
        self,
        sample: Sample,
        cameras: Sequence[CameraFrame],
        image_augs: Sequence[ImageAugmentation],
        bev_aug: NDArray[np.float64],
    ) -> Batch:
        """What the cameras saw in a key frame, in the LiDAR frame of that time."""
        global2lidar = invert_rigid(sample.lidar2global)
        images = None
        if self.config.load_images:
            network_images = [
                self._network_image(sample.token, camera, image_aug)
                for camera, image_aug in zip(cameras, image_augs, strict=True)
            ]
            images = torch.from_numpy(np.stack(network_images)).permute(0, 3, 1, 2).contiguous()[None]
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
        )

    def _past(
        self,
        present: Batch,
        sample: Sample,
        cameras: Sequence[CameraFrame],
        image_augs: Sequence[ImageAugmentation],
        bev_aug: NDArray[np.float64],
        draw: int,
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
                seen = self._seen(earlier, earlier_cameras, image_augs, bev_aug)
            frames.append(seen)
            gaps_s.append(1e-6 * (sample.timestamp_us - earlier.timestamp_us))
        return PastFrames(frames, torch.tensor([gaps_s]))

    def _key_frame_before(self, sample: Sample, steps: int) -> Sample:
        """The key frame so many steps earlier, or the first of the scene.

        Raises:
            DataError: the table leads into another scene, or forward in time.
        """
        for _ in range(steps):
            if sample.previous_token is None:
                break
            before = self._earlier.get(sample.previous_token)
            if before is None:
                before = self.nuscenes.sample(sample.previous_token, num_sweeps=0, read_annotations=False)
                if self.cache:
                    self._earlier[before.token] = before
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

    def _sample(self, index: int) -> Sample:
        if index in self._samples:
            return self._samples[index]
        frame = self.frames[index]
        sample = self.nuscenes.sample(frame.token, self.config.num_sweeps, frame.labelled)
        if self.cache:
            self._samples[index] = sample
        return sample

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
            return plain_image_augmentation(camera.size_wh_px, config.image_size_px, offset)
        return config.image_aug.draw(rng, camera.size_wh_px, config.image_size_px)

    def _network_image(
        self, token: str, camera: CameraFrame, image_aug: ImageAugmentation
    ) -> NDArray[np.uint8]:
        config = self.config
        key = (token, camera.channel)
        kept = self._images.get(key)
        if isinstance(kept, np.ndarray):
            return kept
        if kept is None:
            # The largest scale that may be drawn, so that what is decoded does not depend on the draw.
            offset = config.image_aug.resize_range[1] if config.image_aug else config.image_resize_offset
            scale = SHARPNESS * (config.image_size_px[0] / camera.size_wh_px[0] + offset)
            kept = load_image(camera, scale, config.exact_jpeg)
        image = image_aug.apply(kept)
        if self.cache:
            self._images[key] = kept if config.image_aug else image
        return image

    def _raw_points(self, index: int, sample: Sample) -> NDArray[np.float32]:
        if index in self._points:
            return self._points[index]
        if self.config.virtual_points is None:
            points = load_points(sample, self.config.remove_ego_radius_m)
        else:
            points = self._with_virtual_points(sample, self.config.virtual_points)
        if self.cache:
            self._points[index] = points
        return points

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
            sample = self._sample(index)
            assert sample.annotations is not None, sample.token
            annotations = sample.annotations
            yield LabelledCloud(self._raw_points(index, sample), annotations.boxes, annotations.labels)

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
        keep = (annotations.labels >= 0) & (num_points >= config.min_points_in_box)
        if config.max_box_distance_m is not None:
            keep &= (np.abs(annotations.boxes[:, :2]) <= config.max_box_distance_m).all(axis=1)
        boxes = augment_boxes(bev_aug, annotations.boxes[keep])
        return Boxes3D(torch.from_numpy(boxes).float(), torch.from_numpy(annotations.labels[keep]))


def collate(pieces: Sequence[Batch]) -> Batch:
    """Several batches into one, in order.

    Raises:
        DataError: the samples do not have the same number of cameras, or of earlier frames.
    """
    first = pieces[0]
    if len(pieces) == 1:
        return first
    for piece in pieces:
        if piece.cam2img.shape[1] != first.cam2img.shape[1]:
            raise DataError(
                f"sample {first.tokens[0]} has {first.cam2img.shape[1]} cameras, sample {piece.tokens[0]} "
                f"has {piece.cam2img.shape[1]}; a batch needs one rig: name the cameras that all samples have"
            )
    images = [piece.images for piece in pieces if piece.images is not None]
    points = [cloud for piece in pieces if piece.points is not None for cloud in piece.points]
    return Batch(
        tokens=[token for piece in pieces for token in piece.tokens],
        images=torch.cat(images) if images else None,
        cam2img=torch.cat([piece.cam2img for piece in pieces]),
        cam2lidar=torch.cat([piece.cam2lidar for piece in pieces]),
        image_aug=torch.cat([piece.image_aug for piece in pieces]),
        bev_aug=torch.cat([piece.bev_aug for piece in pieces]),
        lidar2global=torch.cat([piece.lidar2global for piece in pieces]),
        points=points if first.points is not None else None,
        boxes=[boxes for piece in pieces for boxes in piece.boxes],
        past=_collate_past(pieces),
        scenes=_joined([piece.scenes for piece in pieces]),
        timestamps_us=_joined([piece.timestamps_us for piece in pieces]),
    )


def _collate_past(pieces: Sequence[Batch]) -> PastFrames | None:
    pasts = [piece.past for piece in pieces if piece.past is not None]
    counts = [len(piece.past.frames) if piece.past else 0 for piece in pieces]
    if len(set(counts)) > 1:
        raise DataError(
            f"samples {[token for piece in pieces for token in piece.tokens]} come with {counts} earlier "
            "frames; a batch needs as many for each"
        )
    if not pasts:
        return None
    frames = [collate(list(frames)) for frames in zip(*(past.frames for past in pasts), strict=True)]
    return PastFrames(frames, torch.cat([past.gaps_s for past in pasts]))


def _joined(lists: Sequence[list[T] | None]) -> list[T] | None:
    """One list, or None if one of them is absent."""
    known = [entries for entries in lists if entries is not None]
    return [entry for entries in known for entry in entries] if len(known) == len(lists) else None


@dataclass(frozen=True)
class FrameGroup:
    """Frames (indices into a dataset, repeats allowed) of which each step takes `per_step`."""

    frames: Sequence[int]
    per_step: int


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """The (frame, draw) pairs of each training step, as a pure function of seed and step.

    Every group is shuffled anew for each pass over it. A step's samples are dealt out, one after the other,
    to the processes and to the parts of the step that each of them accumulates: together they see what a
    single process would see at once. Iterating gives the parts of the steps from `first_step` on.

    Raises:
        ConfigError: an empty group, or a batch that cannot be shared evenly.
    """

    def __init__(
        self,
        groups: Sequence[FrameGroup],
        seed: int,
        steps: int,
        first_step: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.groups = [group for group in groups if group.per_step > 0]
        for group in self.groups:
            if not group.frames:
                raise ConfigError(
                    f"a step takes {group.per_step} frames of a group that has none; check the splits"
                )
        self.batch_size = sum(group.per_step for group in self.groups)
        shares = accumulate * world_size
        if self.batch_size == 0 or self.batch_size % shares:
            raise ConfigError(
                f"a step of {self.batch_size} frames cannot be shared evenly by {world_size} processes in "
                f"{accumulate} parts each; make the frames per step a multiple of {shares}"
            )
        self.seed = seed
        self.steps = steps
        self.first_step = first_step
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}  # group -> the pass in use and its order

    def __len__(self) -> int:
        return max(self.steps - self.first_step, 0) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.steps):
            for part in range(self.accumulate):
                yield self.part(step, part)

    def part(self, step: int, part: int = 0) -> list[tuple[int, int]]:
        """What this process loads for one part of one step."""
        frames = [
            self._frame(number, step * group.per_step + i)
            for number, group in enumerate(self.groups)
            for i in range(group.per_step)
        ]
        pieces = [(frame, step * self.batch_size + i) for i, frame in enumerate(frames)]
        return pieces[part * self.world_size + self.rank :: self.accumulate * self.world_size]

    def _frame(self, number: int, position: int) -> int:
        frames = self.groups[number].frames
        this_pass, offset = divmod(position, len(frames))
        if number not in self._orders or self._orders[number][0] != this_pass:
            order = np.random.default_rng([self.seed, number, this_pass]).permutation(len(frames))
            self._orders[number] = (this_pass, order)
        return int(frames[self._orders[number][1][offset]])


def batches_in_order(num_frames: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """Every frame once, in order; the last batch may be smaller."""
    return [
        [(index, index) for index in range(start, min(start + batch_size, num_frames))]
        for start in range(0, num_frames, batch_size)
    ]


def balance_classes(labels_of_frames: Sequence[set[int]], seed: int) -> list[int]:
    """Frame indices, repeated so that every class that occurs is drawn through equally many frames.

    Source: class-balanced grouping and sampling (arXiv:1908.09492), section 3.1, in the form that the
    reference uses: of the N frame-class pairs each of K classes gives N/K frames, drawn with replacement.
    """
    frames_of_class: dict[int, list[int]] = {}
    for frame, labels in enumerate(labels_of_frames):
        for label in labels:
            frames_of_class.setdefault(label, []).append(frame)
    if not frames_of_class:
        raise DataError("no frame holds a box of any detection class; nothing to balance")
    rng = np.random.default_rng(seed)
    share = sum(map(len, frames_of_class.values())) / len(frames_of_class)
    return [
        int(frame)
        for label in sorted(frames_of_class)
        for frame in rng.choice(frames_of_class[label], max(int(share), 1))
    ]


class BatchLoader:
    """Iterates over batches; errors of ours come out of the workers as they were raised there."""

    def __init__(self, loader: DataLoader[Batch | DistillBevError], num_batches: int) -> None:
        self._loader = loader
        self._num_batches = num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        for item in self._loader:
            if isinstance(item, DistillBevError):
                raise item
            yield item


def make_loader(
    dataset: FrameDataset, batches: TrainingBatches | list[list[tuple[int, int]]], workers: int = 0
) -> BatchLoader:
    """A loader that gives the batches in the order asked for, whatever the number of worker processes."""
    if workers > 0:
        dataset.fill_cache()
    loader = DataLoader(
        cast(Dataset[Batch | DistillBevError], _ErrorsAsValues(dataset)),
        batch_sampler=cast(Iterable[list[int]], batches),  # torch's types know plain indices only
        num_workers=workers,
        collate_fn=_collate_or_error,
        worker_init_fn=_limit_threads if workers else None,
    )
    return BatchLoader(loader, len(batches))


def make_training_loader(
    dataset: FrameDataset,
    groups: tuple[list[int], list[int]],
    per_step: tuple[int, int],
    steps: int,
    first_step: int = 0,
    accumulate: int = 1,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    class_balanced: bool = False,
) -> BatchLoader:
    """The batches of a training run: `accumulate` of them for each step from `first_step` on.

    Args:
        dataset: its seed also orders the frames.
        groups: labelled and unlabelled frames, as `frames_of_splits` gives them.
        per_step: labelled and unlabelled samples of one step, over all processes and parts.
        class_balanced: repeat labelled frames so that every class is seen in equally many.
    """
    labelled, unlabelled = groups
    if class_balanced:
        tokens = [dataset.frames[index].token for index in labelled]
        min_points = dataset.config.min_points_in_box
        labels = [dataset.nuscenes.labels_in(token, min_points) for token in tokens]
        labelled = [labelled[index] for index in balance_classes(labels, dataset.seed)]
    batches = TrainingBatches(
        [FrameGroup(labelled, per_step[0]), FrameGroup(unlabelled, per_step[1])],
        dataset.seed,
        steps,
        first_step,
        accumulate,
        rank,
        world_size,
    )
    return make_loader(dataset, batches, workers)


def make_inference_loader(dataset: FrameDataset, batch_size: int, workers: int = 0) -> BatchLoader:
    """Every frame once, in order."""
    return make_loader(dataset, batches_in_order(len(dataset), batch_size), workers)


class _ErrorsAsValues(Dataset["Batch | DistillBevError"]):
    """torch rewrites exceptions that leave a worker; values pass unchanged."""

    def __init__(self, dataset: FrameDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, frame_and_draw: tuple[int, int]) -> Batch | DistillBevError:
        try:
            return self.dataset[frame_and_draw]
        except DistillBevError as error:
            return error


def _collate_or_error(pieces: list[Batch | DistillBevError]) -> Batch | DistillBevError:
    for piece in pieces:
        if isinstance(piece, DistillBevError):
            return piece
    try:
        return collate(cast(list[Batch], pieces))
    except DistillBevError as error:
        return error


def _limit_threads(_worker: int) -> None:
    torch.set_num_threads(1)


def _matrices(matrices: Sequence[NDArray[np.float64]]) -> Tensor:
    return torch.from_numpy(np.array(matrices, dtype=np.float64).reshape(-1, 4, 4)).float()


def _without_augmentation(config: DataConfig) -> DataConfig:
    past = config.past and msgspec.structs.replace(config.past, training_steps=None)
    return msgspec.structs.replace(config, image_aug=None, bev_aug=None, past=past, object_pasting=None)
