"""Instance masks of images: read from files, or true ones made as bad as a detector's.

Masks of any 2-D detector are read from files: for every image `FOLDER/CHANNEL/NAME.png`, where NAME is the
image's without its ending, of the image's size, one channel of 8 or 16 bits, 0 where nothing is and else the
number of an instance; beside it `NAME.json`: `{"instances": [{"id": 1, "class": "car", "score": 0.9}, ...]}`. An
image in which nothing was found has both files, too.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..classes import CLASSES
from ..config import Config
from ..errors import ConfigError, DataError
from .files import NOT_JSON, read_whole
from .images import FORMATS, read_image_file
from .schema import CameraFrame, Sample

MOST_LIST_BYTES = 2**24


@dataclass(frozen=True)
class InstanceMasks:
    """The instances found in one image: masks (n, H, W) bool, labels (n,) into CLASSES, scores (n,)."""

    masks: NDArray[np.bool_]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keep: NDArray[np.bool_]) -> InstanceMasks:
        return InstanceMasks(self.masks[keep], self.labels[keep], self.scores[keep])


ReadMasks = Callable[[Sample], list[InstanceMasks]]  # one for each of the sample's cameras


@dataclass(frozen=True)
class MaskFiles:
    """Reads the mask files of any 2-D detector; the format stands at the top of this file."""

    folder: Path

    def __call__(self, sample: Sample) -> list[InstanceMasks]:
        """The masks of each camera's image.

        Raises:
            DataError: a file is absent, damaged, or at odds with the image or with the other file.
        """
        return [self._read(camera) for camera in sample.cameras]

    def _read(self, camera: CameraFrame) -> InstanceMasks:
        stem = self.folder / camera.channel / camera.path.stem
        numbers = read_instance_numbers(stem.with_name(f"{stem.name}.png"), camera)
        listing = stem.with_name(f"{stem.name}.json")
        instances = list(_read_listing(listing))
        unlisted = set(np.unique(numbers).tolist()) - {0} - {number for number, _, _ in instances}
        if unlisted:
            raise DataError(
                f"{listing}: no instance {min(unlisted)}, though the mask image has pixels of it; list every "
                "number of the image"
            )
        return InstanceMasks(
            numbers[None] == np.array([number for number, _, _ in instances]).reshape(-1, 1, 1),
            np.array([label for _, label, _ in instances], dtype=np.int64),
            np.array([score for _, _, score in instances], dtype=np.float32),
        )


@dataclass(frozen=True)
class WorldMasks:
    """Reads the true masks of a simulated world: of annotated objects of the ten classes, with a score of 1.

    `ROOT/instance_masks` holds the mask images, and for every scene `SCENE.json`: number -> instance token.
    """

    root: Path

    def __call__(self, sample: Sample) -> list[InstanceMasks]:
        """The masks of each camera's image.

        Raises:
            DataError: a file is absent or damaged, or the sample came without annotations.
        """
        if sample.annotations is None:
            raise DataError(f"sample {sample.token} came without annotations, and they tell a mask's class")
        folder = self.root / "instance_masks"
        mapping = folder / f"{sample.scene}.json"
        absent = "; only a world simulated with masks has true ones"
        content = read_whole(mapping, "list of masks", MOST_LIST_BYTES, absent)
        try:
            numbers = msgspec.json.decode(content, type=dict[int, str])
        except NOT_JSON as error:
            raise DataError(f"{mapping}: expected {{number: instance token}}: {error}") from None
        tokens = {token: number for number, token in numbers.items()}
        annotations = sample.annotations
        label_of = {
            tokens[token]: int(label)
            for token, label in zip(annotations.instance_tokens, annotations.labels, strict=True)
            if label >= 0 and token in tokens
        }
        result = []
        for camera in sample.cameras:
            pixels = read_instance_numbers(folder / camera.channel / f"{camera.path.stem}.png", camera)
            seen = [number for number in np.unique(pixels).tolist() if number in label_of]
            result.append(
                InstanceMasks(
                    pixels[None] == np.array(seen, dtype=np.int64).reshape(-1, 1, 1),
                    np.array([label_of[number] for number in seen], dtype=np.int64),
                    np.ones(len(seen), dtype=np.float32),
                )
            )
        return result


def read_instance_numbers(path: Path, camera: CameraFrame) -> NDArray[np.int64]:
    """(H, W) the number of the instance at each pixel, 0 for none.

    Raises:
        DataError: the file is absent, no image of one channel, or of another size than the camera's images.
    """
    absent = f" for {camera.path.name}; run the 2-D detector on every image (one without instances has a mask of zeros)"
    content = read_image_file(path, "mask image", absent)
    width, height = camera.size_wh_px
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            # What claims to be larger is not decoded.
            numbers = np.array(image) if image.size == camera.size_wh_px else np.empty(image.size[::-1], bool)
    except Exception as error:  # Pillow's decoders raise many types, and any of them means the same here
        raise DataError(f"{path}: unreadable mask image: {error}; write it again") from None
    if numbers.shape != (height, width) or not np.issubdtype(numbers.dtype, np.integer):
        raise DataError(
            f"{path}: mask image of shape {numbers.shape} and type {numbers.dtype}; expected one channel of "
            f"whole numbers, {height} rows by {width} columns as {camera.path.name}"
        )
    return numbers.astype(np.int64)


class _Instance(msgspec.Struct):
    id: int
    name: str = msgspec.field(name="class")
    score: float


class _Listing(msgspec.Struct):
    instances: list[_Instance]


def _read_listing(path: Path) -> Iterator[tuple[int, int, float]]:
    content = read_whole(path, "list of instances", MOST_LIST_BYTES, " beside the mask image; write one")
    try:
        instances = msgspec.json.decode(content, type=_Listing).instances
    except NOT_JSON as error:
        raise DataError(
            f'{path}: not a list of instances ({error}); expected {{"instances": [{{"id": 1, "class": '
            '"car", "score": 0.9}, ...]}'
        ) from None
    seen: set[int] = set()
    for row in instances:
        number, name, score = row.id, row.name, row.score
        if number in seen:
            raise DataError(f"{path}: instance {number} is listed twice; list each once")
        seen.add(number)
        if name not in CLASSES:
            near = difflib.get_close_matches(name[:80], CLASSES, n=2) or CLASSES
            raise DataError(
                f"{path}: instance {number} is of class {name[:80]!r}; expected one of {', '.join(near)}"
            )
        if number < 1 or not 0 <= score <= 1:
            raise DataError(
                f"{path}: instance {number} with score {score}; expected a number from 1 and a score from 0 to 1"
            )
        yield number, CLASSES.index(name), score


class MaskErrors(Config, frozen=True):
    """Turns perfect masks into such as a detector gives.

    An instance is missed with `miss_rate`, and always below `min_pixels`; another class is named with
    `confusion_rate`; outlines grow or shrink by up to `outline_px`; scores are drawn about `mean_score`, and
    about half of it where the class is wrong.
    """

    miss_rate: float = 0.1
    min_pixels: int = 30
    confusion_rate: float = 0.05
    outline_px: int = 2
    mean_score: float = 0.75

    def __post_init__(self) -> None:
        for name in ("miss_rate", "confusion_rate", "mean_score"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected a share from 0 to 1")
        if self.min_pixels < 0 or self.outline_px < 0:
            raise ConfigError(
                f"min_pixels={self.min_pixels}, outline_px={self.outline_px}; expected no negative pixels"
            )


def degrade_masks(found: InstanceMasks, errors: MaskErrors, rng: np.random.Generator) -> InstanceMasks:
    """Perfect masks with a detector's errors."""
    masks, labels, scores = [], [], []
    for mask, label in zip(found.masks, found.labels, strict=True):
        missed, confused = rng.random(2) < (errors.miss_rate, errors.confusion_rate)
        other = int(rng.integers(len(CLASSES) - 1))
        change_px = int(rng.integers(-errors.outline_px, errors.outline_px + 1))
        mean = errors.mean_score / 2 if confused else errors.mean_score
        score = float(np.clip(rng.normal(mean, 0.1), 0.05, 1.0))
        if missed or mask.sum() < errors.min_pixels:
            continue
        masks.append(grow_mask(mask, change_px))
        labels.append(other + (other >= label) if confused else label)
        scores.append(score)
    return InstanceMasks(
        np.array(masks, dtype=bool).reshape(-1, *found.masks.shape[1:]),
        np.array(labels, dtype=np.int64),
        np.array(scores, dtype=np.float32),
    )


def grow_mask(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """The mask with its outline moved outward by so many pixels along rows and columns (inward where negative)."""
    grown = mask.copy() if pixels >= 0 else ~mask
    for _ in range(abs(pixels)):
        before = grown.copy()
        grown[1:] |= before[:-1]
        grown[:-1] |= before[1:]
        grown[:, 1:] |= before[:, :-1]
        grown[:, :-1] |= before[:, 1:]
    return grown if pixels >= 0 else ~grown
