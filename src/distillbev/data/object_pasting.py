"""Object pasting (ground-truth sampling): objects cut out of other frames are put into a LiDAR teacher's frames.

Source: SECOND (Sensors 2018), section 3.4, with the class counts of CBGS (arXiv:1908.09492), which CenterPoint and
MVP train with. An object keeps the place that it had in its own frame's LiDAR frame. All in metres, before the
BEV augmentation.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..classes import CLASSES
from ..config import Config
from ..errors import ConfigError, DataError
from ..geometry import rotation_about_z

DATABASE_VERSION = 1
PUBLISHED_COUNTS = {
    "car": 2,
    "truck": 3,
    "construction_vehicle": 7,
    "bus": 4,
    "trailer": 6,
    "barrier": 2,
    "motorcycle": 6,
    "bicycle": 6,
    "pedestrian": 2,
    "traffic_cone": 2,
}


class ObjectPastingConfig(Config, frozen=True):
    """How many objects of each class a training frame should hold; pasting makes up what it lacks.

    `min_points` is what an object needs to be kept in the database, over all sweeps. `stop_after_samples` ends
    pasting after so many samples of the run, so that its end sees frames as they are; None pastes to the end, as
    the published teachers do. `folder` holds the databases, relative to the dataset's root.
    """

    counts: dict[str, int] = msgspec.field(default_factory=lambda: dict(PUBLISHED_COUNTS))
    min_points: int = 5
    stop_after_samples: int | None = None
    folder: str = "object_database"

    def __post_init__(self) -> None:
        unknown = [name for name in self.counts if name not in CLASSES]
        if unknown or any(count < 0 for count in self.counts.values()):
            raise ConfigError(
                f"counts={self.counts}; expected numbers from 0 for some of {', '.join(CLASSES)}"
            )
        if self.min_points < 1:
            raise ConfigError(f"min_points={self.min_points}; expected at least 1")
        if self.stop_after_samples is not None and self.stop_after_samples < 0:
            raise ConfigError(f"stop_after_samples={self.stop_after_samples}; expected 0 or more, or null")


@dataclass(frozen=True)
class LabelledCloud:
    """One frame: points (P, C), boxes (n, 9) as BOX_FIELDS, labels (n,), -1 outside the detection classes."""

    points: NDArray[np.float32]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class ObjectDatabase:
    """Objects cut out of frames: boxes (n, 9), labels (n,); object i has rows starts[i] to starts[i+1] of points."""

    points: NDArray[np.float32]  # (sum of P, C), left on disk
    starts: NDArray[np.int64]  # (n + 1,)
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def points_of(self, index: int) -> NDArray[np.float32]:
        """(P, C) points of one object."""
        return np.array(self.points[self.starts[index] : self.starts[index + 1]])


def database_key(*parts: object) -> str:
    """A name for the database of these frames and settings; others have another."""
    return hashlib.sha256(repr((DATABASE_VERSION, *parts)).encode()).hexdigest()[:16]


def build_database(clouds: Iterable[LabelledCloud], path: Path, min_points: int) -> None:
    """Cuts all objects out in one pass, holding one frame at a time; the folder appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        counts: list[int] = []
        boxes: list[NDArray[np.float64]] = []
        labels: list[int] = []
        columns = 0
        with (unfinished / "points.npy").open("wb") as file:
            for cloud in clouds:
                if not columns:
                    columns = cloud.points.shape[1]
                    _write_header(file, 0, columns)
                for box, label in zip(cloud.boxes, cloud.labels, strict=True):
                    if label < 0:
                        continue
                    inside = cloud.points[points_in_box(cloud.points, box)]
                    if len(inside) < min_points:
                        continue
                    file.write(np.ascontiguousarray(inside, dtype="<f4").tobytes())
                    counts.append(len(inside))
                    boxes.append(box)
                    labels.append(int(label))
            file.seek(0)
            _write_header(file, sum(counts), columns)  # numpy's header has room for the number to grow
        np.save(unfinished / "starts.npy", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        np.save(unfinished / "boxes.npy", np.array(boxes, dtype=np.float64).reshape(-1, 9))
        np.save(unfinished / "labels.npy", np.array(labels, dtype=np.int64))
        if not path.exists():  # another process may have been faster, with the same result
            unfinished.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_database(path: Path) -> ObjectDatabase:
    """Opens what `build_database` wrote.

    Raises:
        DataError: a file is absent or damaged, or they do not fit each other.
    """
    try:
        points = np.load(path / "points.npy", mmap_mode="r", allow_pickle=False)
        starts, boxes, labels = (
            np.load(path / f"{name}.npy", allow_pickle=False) for name in ("starts", "boxes", "labels")
        )
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: unreadable object database: {error}; delete the folder, it is built again"
        ) from None
    if not (len(starts) - 1 == len(boxes) == len(labels)) or starts[-1] != len(points):
        raise DataError(
            f"{path}: object database of {len(points)} points, {len(boxes)} boxes, {len(labels)} labels "
            "that do not fit; delete the folder, it is built again"
        )
    return ObjectDatabase(points, starts, boxes, labels)


def paste_objects(
    cloud: LabelledCloud,
    database: ObjectDatabase,
    counts: dict[str, int],
    rng: np.random.Generator,
    max_distance_m: float | None = None,
) -> tuple[LabelledCloud, NDArray[np.int64]]:
    """The frame with objects of the database added where they hit no box seen from above.

    Objects that would collide are left out, not moved. The frame's own points inside a pasted box go.

    Args:
        cloud: with the boxes of all its objects, also of those outside the detection classes.
        counts: how many objects of a class the frame should hold.
        max_distance_m: objects farther along x or y are not pasted.

    Returns:
        The frame, its own boxes first. And (m,) the pasted objects' numbers in the database.
    """
    pasted: list[int] = []
    boxes = cloud.boxes
    near = (np.abs(database.boxes[:, :2]) <= (np.inf if max_distance_m is None else max_distance_m)).all(
        axis=1
    )
    for label, name in enumerate(CLASSES):
        lacking = counts.get(name, 0) - int((cloud.labels == label).sum())
        candidates = np.flatnonzero((database.labels == label) & near)
        if lacking <= 0 or len(candidates) == 0:
            continue
        for index in rng.choice(candidates, min(lacking, len(candidates)), replace=False).tolist():
            box = database.boxes[index]
            if not footprints_overlap(box[None], boxes).any():
                pasted.append(index)
                boxes = np.concatenate([boxes, box[None]])
    if not pasted:
        return cloud, np.zeros(0, dtype=np.int64)
    covered = np.zeros(len(cloud.points), dtype=bool)
    for index in pasted:
        covered |= points_in_box(cloud.points, database.boxes[index])
    points = [cloud.points[~covered], *(database.points_of(index) for index in pasted)]
    labels = np.concatenate([cloud.labels, database.labels[pasted]])
    return LabelledCloud(np.concatenate(points), boxes, labels), np.array(pasted, dtype=np.int64)


def points_in_box(points: NDArray[np.float32], box: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(P,) which points an upright box (as BOX_FIELDS) holds, faces included."""
    offset = points[:, :3] - box[:3]
    radius = float(np.linalg.norm(box[3:6])) / 2
    inside: NDArray[np.bool_] = np.all(np.abs(offset) <= radius, axis=1)  # most fall out here
    near = offset[inside] @ rotation_about_z(box[6])
    inside[inside] = (np.abs(near) <= box[3:6] / 2).all(axis=1)
    return inside


def footprints_overlap(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n, >=7) and (m, >=7) boxes -> (n, m) which overlap seen from above; touching is no overlap.

    Two rectangles are apart exactly where they are apart along a side of one of them.
    """
    corners = [_footprint(boxes) for boxes in (first, second)]  # (n, 4, 2), (m, 4, 2)
    apart = np.zeros((len(first), len(second)), dtype=bool)
    for boxes, of_first in ((first, True), (second, False)):
        for turn in (0.0, np.pi / 2):
            axis = np.stack([np.cos(boxes[:, 6] + turn), np.sin(boxes[:, 6] + turn)], axis=1)
            if of_first:
                a = np.einsum("nkd,nd->nk", corners[0], axis)[:, None]  # (n, 1, 4)
                b = np.einsum("mkd,nd->nmk", corners[1], axis)  # (n, m, 4)
            else:
                a = np.einsum("nkd,md->nmk", corners[0], axis)
                b = np.einsum("mkd,md->mk", corners[1], axis)[None]
            apart |= (a.max(axis=-1) <= b.min(axis=-1)) | (b.max(axis=-1) <= a.min(axis=-1))
    return ~apart


def _footprint(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    signs = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) / 2
    local = signs * boxes[:, None, 3:5]
    cos, sin = np.cos(boxes[:, 6])[:, None], np.sin(boxes[:, 6])[:, None]
    turned = np.stack(
        [cos * local[..., 0] - sin * local[..., 1], sin * local[..., 0] + cos * local[..., 1]], -1
    )
    return boxes[:, None, :2] + turned


def _write_header(file: Any, rows: int, columns: int) -> None:
    header: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": (rows, columns)}
    np.lib.format.write_array_header_1_0(file, header)
