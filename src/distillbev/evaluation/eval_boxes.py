"""What is compared: boxes of many samples as flat arrays in the global frame, as nuScenes evaluates them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..classes import CLASSES
from ..errors import DataError
from ..geometry import Array, rotation_to_quaternion

if TYPE_CHECKING:  # both import torch, which metrics do not need
    from ..boxes import Boxes3D
    from ..data.schema import Annotations, Sample

ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.stopped",
    "vehicle.parked",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.moving",
    "pedestrian.standing",
    "pedestrian.sitting_lying_down",
)
NO_ATTRIBUTE = -1
BICYCLE_RACK = "static_object.bicycle_rack"

# Speed (m/s) above which an object is said to move; the value that nuScenes submissions commonly use.
MOVING_SPEED_M_S = 0.2
# class -> (attribute when it moves, attribute when it stands). Cones and barriers have none.
_ATTRIBUTE_RULE = {
    "car": ("vehicle.moving", "vehicle.parked"),
    "truck": ("vehicle.moving", "vehicle.parked"),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    "trailer": ("vehicle.moving", "vehicle.parked"),
    "construction_vehicle": ("vehicle.moving", "vehicle.parked"),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
    "motorcycle": ("cycle.with_rider", "cycle.without_rider"),
    "bicycle": ("cycle.with_rider", "cycle.without_rider"),
}
_RULE_TABLE = np.array(
    [
        [ATTRIBUTES.index(name) for name in _ATTRIBUTE_RULE[c]] if c in _ATTRIBUTE_RULE else [-1, -1]
        for c in CLASSES
    ]
)


@dataclass(frozen=True)
class EvalBoxes:
    """Boxes of many samples in the global frame. Rows keep the order in which boxes were given.

    The order matters: among equal scores the later row counts as the surer one, as in the official code.

    Attributes:
        tokens: the samples, S of them; a sample without boxes is listed too.
        sample_index: (n,) into `tokens`.
        centre_m: (n, 3) gravity centres.
        size_wlh_m: (n, 3) width, length, height.
        quat_wxyz: (n, 4) orientation; its length does not matter.
        velocity_m_s: (n, 2) over ground, global x and y; NaN where unknown.
        labels: (n,) into CLASSES.
        scores: (n,) confidence; -1 for ground truth.
        attributes: (n,) into ATTRIBUTES, NO_ATTRIBUTE where there is none.
        num_points: (n,) LiDAR and radar points inside; -1 where not counted (detections).
        ego_distance_m: (n,) from the ego pose of the key LiDAR sweep, in the ground plane.
    """

    tokens: tuple[str, ...]
    sample_index: NDArray[np.int64]
    centre_m: Array
    size_wlh_m: Array
    quat_wxyz: Array
    velocity_m_s: Array
    labels: NDArray[np.int64]
    scores: Array
    attributes: NDArray[np.int64]
    num_points: NDArray[np.int64]
    ego_distance_m: Array

    def __len__(self) -> int:
        return len(self.sample_index)

    def __getitem__(self, keep: NDArray[np.bool_] | NDArray[np.integer]) -> EvalBoxes:
        """The rows that a mask or an index array selects; the samples stay all listed."""
        rows = {f.name: getattr(self, f.name)[keep] for f in fields(self) if f.name != "tokens"}
        return replace(self, **rows)

    def yaw_rad(self) -> Array:
        """(n,) heading in the global ground plane."""
        return yaw_of_quaternion(self.quat_wxyz)


@dataclass(frozen=True)
class GroundTruth:
    """The annotated boxes of the challenge's classes, and what filtering and diagnosis need besides.

    Attributes:
        boxes: annotated boxes, all of them (filters are the evaluation's business).
        racks: bicycle racks (their labels are -1); cycles inside them do not count.
        scenes: (S) name of each sample's scene.
        lidar2global: (S, 4, 4).
        ego_xy_m: (S, 2) global position of the ego vehicle at the key LiDAR sweep.
        visibility: of each of the `boxes`, 1 (least) to 4, 0 unknown.
    """

    boxes: EvalBoxes
    racks: EvalBoxes
    scenes: tuple[str, ...]
    lidar2global: Array
    ego_xy_m: Array
    visibility: NDArray[np.int64]


def yaw_of_quaternion(quat_wxyz: Array) -> Array:
    """(..., 4) -> (...) heading of the turned x axis in the xy plane, radians; needs no unit length."""
    w, x, y, z = np.moveaxis(quat_wxyz, -1, 0)
    return np.arctan2(2 * (w * z + x * y), w * w + x * x - y * y - z * z)


def choose_attributes(labels: NDArray[np.int64], velocity_m_s: Array) -> NDArray[np.int64]:
    """The attribute of a detection that predicts none, by the rule common among submissions.

    Faster than `MOVING_SPEED_M_S`: moving, or with rider. Else the commonest attribute of a standing object
    of the class: parked (bus: stopped), standing, without rider. Cones and barriers get none. An unknown
    (NaN) velocity counts as standing.

    Args:
        labels: (n,) into CLASSES.
        velocity_m_s: (n, 2).

    Returns:
        (n,) into ATTRIBUTES, or NO_ATTRIBUTE.
    """
    moving = np.hypot(velocity_m_s[:, 0], velocity_m_s[:, 1]) > MOVING_SPEED_M_S
    return _RULE_TABLE[labels, np.where(moving, 0, 1)]


def ground_truth_boxes(samples: Sequence[Sample]) -> GroundTruth:
    """Gathers what was annotated in the samples, in the global frame.

    nuScenes annotates boxes upright in the global frame. The heading and velocity of the LiDAR frame are
    therefore carried back by the exact inverse of dropping their z part there, not by turning them.

    Raises:
        DataError: a sample has no annotations, or an attribute that nuScenes does not know.
    """
    boxes, racks = _Rows(samples), _Rows(samples)
    visibility = [np.zeros(0, dtype=np.int64)]
    for index, sample in enumerate(samples):
        annotations = sample.annotations
        if annotations is None:
            raise DataError(
                f"sample {sample.token} (scene {sample.scene}) has no annotations to evaluate against; "
                "leave it out, or use a split that is labelled"
            )
        points = annotations.num_lidar_points + annotations.num_radar_points
        visibility.append(annotations.visibility[annotations.labels >= 0])
        for rows, chosen in (
            (boxes, annotations.labels >= 0),
            (racks, np.array([name == BICYCLE_RACK for name in annotations.categories], dtype=bool)),
        ):
            if not chosen.any():
                continue
            kept = annotations.boxes[chosen]
            matrix = sample.lidar2global
            # Global -> LiDAR kept the upper left 2x2 block of the inverse rotation: undo just that.
            undo = np.linalg.inv(matrix[:3, :3].T[:2, :2])
            heading = np.stack([np.cos(kept[:, 6]), np.sin(kept[:, 6])], axis=-1) @ undo.T
            half = np.arctan2(heading[:, 1], heading[:, 0]) / 2
            zero = np.zeros_like(half)
            rows.add(
                index,
                centre_m=kept[:, :3] @ matrix[:3, :3].T + matrix[:3, 3],
                size_wlh_m=kept[:, [4, 3, 5]],
                quat_wxyz=np.stack([np.cos(half), zero, zero, np.sin(half)], axis=-1),
                velocity_m_s=kept[:, 7:9] @ undo.T,
                labels=annotations.labels[chosen],
                scores=np.full(len(kept), -1.0),
                attributes=_attribute_indices(annotations, chosen, sample.token),
                num_points=points[chosen],
            )
    return GroundTruth(
        boxes=boxes.gather(),
        racks=racks.gather(),
        scenes=tuple(sample.scene for sample in samples),
        lidar2global=np.array([sample.lidar2global for sample in samples]).reshape(-1, 4, 4),
        ego_xy_m=_ego_xy(samples),
        visibility=np.concatenate(visibility),
    )


def detected_boxes(detections: Mapping[str, Boxes3D], samples: Sequence[Sample]) -> EvalBoxes:
    """Takes detections to the global frame, with the full rotation, and gives them attributes.

    Args:
        detections: per sample token, boxes in the (physical) LiDAR frame of the key frame, with scores.
        samples: every sample to be evaluated, in the order of the evaluation.

    Raises:
        DataError: tokens differ from those of the samples, or boxes lack scores.
    """
    check_tokens(detections, [sample.token for sample in samples])
    rows = _Rows(samples)
    for index, sample in enumerate(samples):
        found = detections[sample.token]
        if len(found) == 0:
            continue
        if found.scores is None:
            raise DataError(f"the detections of sample {sample.token} have no scores; set Boxes3D.scores")
        boxes = found.boxes.detach().cpu().double().numpy()
        labels = found.labels.detach().cpu().numpy().astype(np.int64)
        matrix = sample.lidar2global
        half = boxes[:, 6] / 2
        rows.add(
            index,
            centre_m=boxes[:, :3] @ matrix[:3, :3].T + matrix[:3, 3],
            size_wlh_m=boxes[:, [4, 3, 5]],
            quat_wxyz=_times_turn_about_z(rotation_to_quaternion(matrix[:3, :3]), half),
            velocity_m_s=boxes[:, 7:9] @ matrix[:2, :2].T,
            labels=labels,
            scores=found.scores.detach().cpu().double().numpy(),
            attributes=choose_attributes(labels, boxes[:, 7:9]),
            num_points=np.full(len(boxes), -1),
        )
    return rows.gather()


def check_tokens(found: Mapping[str, object], expected: Sequence[str]) -> None:
    """Raises DataError unless both name the same samples, saying which are missing or foreign."""
    missing = [token for token in expected if token not in found]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(expected)} samples are not among the detections (first: {missing[0]}); "
            "a sample without detections needs an empty entry; was another split predicted?"
        )
    if len(found) != len(expected):
        known = set(expected)
        foreign = [token for token in found if token not in known]
        raise DataError(
            f"{len(foreign)} detected samples are not evaluated (the first: {foreign[0]}); "
            "expected exactly the samples of the split; evaluate the split that was predicted"
        )


class _Rows:
    """Collects the rows of `EvalBoxes` sample by sample."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.tokens = tuple(sample.token for sample in samples)
        self.ego_xy_m = _ego_xy(samples)
        self.parts: list[dict[str, NDArray]] = []

    def add(self, index: int, **columns: NDArray) -> None:
        columns["sample_index"] = np.full(len(columns["labels"]), index)
        self.parts.append(columns)

    def gather(self) -> EvalBoxes:
        return eval_boxes_from_columns(self.tokens, self.parts, self.ego_xy_m)


_COLUMN_FORMS: dict[str, tuple[tuple[int, ...], type]] = {
    "sample_index": ((), np.int64),
    "centre_m": ((3,), np.float64),
    "size_wlh_m": ((3,), np.float64),
    "quat_wxyz": ((4,), np.float64),
    "velocity_m_s": ((2,), np.float64),
    "labels": ((), np.int64),
    "scores": ((), np.float64),
    "attributes": ((), np.int64),
    "num_points": ((), np.int64),
}
_VECTORS = ("centre_m", "size_wlh_m", "quat_wxyz")
LARGEST = 1e12  # numbers from here on count as infinite: their squares may be


def eval_boxes_from_columns(
    tokens: tuple[str, ...], parts: Sequence[Mapping[str, NDArray]], ego_xy_m: Array
) -> EvalBoxes:
    """Joins column parts (all of EvalBoxes but the distance) and measures the distance from the ego vehicle.

    Raises:
        DataError: a token is listed twice, or a box is not finite, has no extent or no orientation.
    """
    if len(set(tokens)) != len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise DataError(f"sample {twice} is listed more than once; list every sample once")
    columns = {
        name: np.concatenate(
            [np.asarray(part[name], dtype) for part in parts] or [np.zeros((0, *tail), dtype)]
        )
        for name, (tail, dtype) in _COLUMN_FORMS.items()
    }
    finite = {name: (np.abs(columns[name]) < LARGEST).all(axis=1) for name in _VECTORS}
    wrong = {
        "centre is not finite": ~finite["centre_m"],
        "size is not positive": ~(finite["size_wlh_m"] & (columns["size_wlh_m"] > 0).all(axis=1)),
        "orientation is not a quaternion": ~(
            finite["quat_wxyz"] & (np.abs(columns["quat_wxyz"]).max(axis=1) > 1e-6)
        ),
        "velocity is infinite": (np.abs(columns["velocity_m_s"]) >= LARGEST).any(axis=1),
        "score is not a number": np.isnan(columns["scores"]),
    }
    for reason, bad in wrong.items():
        if bad.any():
            row = int(np.argmax(bad))
            sample = tokens[columns["sample_index"][row]]
            at = int((columns["sample_index"][:row] == columns["sample_index"][row]).sum())
            raise DataError(
                f"sample {sample}, box {at}: {reason} (centre {columns['centre_m'][row].tolist()}, w l h "
                f"{columns['size_wlh_m'][row].tolist()}, quaternion {columns['quat_wxyz'][row].tolist()}, "
                f"score {columns['scores'][row]}); mend or drop the box before it is evaluated"
            )
    from_ego = columns["centre_m"][:, :2] - ego_xy_m[columns["sample_index"]]
    return EvalBoxes(
        tokens=tokens,
        ego_distance_m=np.sqrt(np.square(from_ego[:, 0]) + np.square(from_ego[:, 1])),
        **columns,
    )


def _ego_xy(samples: Sequence[Sample]) -> Array:
    return np.array([sample.ego2global[:2, 3] for sample in samples], dtype=np.float64).reshape(-1, 2)


def _times_turn_about_z(quat_wxyz: Array, half_angle_rad: Array) -> Array:
    """(4,) quaternion after turns about z by twice the (n,) half angles -> (n, 4) Hamilton products."""
    w, x, y, z = quat_wxyz
    cos, sin = np.cos(half_angle_rad), np.sin(half_angle_rad)
    return np.stack([w * cos - z * sin, x * cos + y * sin, y * cos - x * sin, w * sin + z * cos], axis=-1)


def _attribute_indices(annotations: Annotations, chosen: NDArray[np.bool_], token: str) -> NDArray[np.int64]:
    indices = []
    for row in np.flatnonzero(chosen):
        name = annotations.attributes[row]
        if name and name not in ATTRIBUTES:
            raise DataError(
                f"sample {token}, annotation {row}: attribute {name!r} is unknown; expected one of "
                f"{', '.join(ATTRIBUTES)} or an empty string"
            )
        indices.append(ATTRIBUTES.index(name) if name else NO_ATTRIBUTE)
    return np.array(indices, dtype=np.int64)
