"""The official results file of the nuScenes detection task: written, checked, read.

Boxes in it are in the global frame: gravity centre, (width, length, height), full quaternion, velocity over
ground; detectors predict no attribute, `eval_boxes.choose_attributes` gives it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..classes import CLASSES
from ..data.files import LONGEST_NAME, read_whole
from ..errors import DataError
from .eval_boxes import (
    ATTRIBUTES,
    NO_ATTRIBUTE,
    EvalBoxes,
    GroundTruth,
    check_tokens,
    detected_boxes,
    eval_boxes_from_columns,
)
from .metrics import check_box_counts

if TYPE_CHECKING:
    from ..boxes import Boxes3D
    from ..data.schema import Sample

MAX_BOXES_PER_SAMPLE = 500
MOST_RESULTS_BYTES = 2**31  # test, all 500 boxes in every sample, has half of it
Text = Annotated[str, msgspec.Meta(max_length=LONGEST_NAME)]

FormT = TypeVar("FormT")


class ResultsMeta(msgspec.Struct, frozen=True, kw_only=True):
    """Which sensors the detector used, as the task asks."""

    use_camera: bool
    use_lidar: bool
    use_radar: bool = False
    use_map: bool = False
    use_external: bool = False


CAMERA_ONLY = ResultsMeta(use_camera=True, use_lidar=False)
LIDAR_ONLY = ResultsMeta(use_camera=False, use_lidar=True)


class _Box(msgspec.Struct):
    sample_token: Text
    translation: tuple[float, float, float]
    size: tuple[float, float, float]
    rotation: tuple[float, float, float, float]
    velocity: tuple[float, float]
    detection_name: Text
    detection_score: float
    attribute_name: Text
    num_pts: Annotated[int, msgspec.Meta(ge=-1, le=2**31)] = -1


class _Results(msgspec.Struct):
    meta: ResultsMeta
    results: dict[Text, list[_Box]]


class _RawResults(msgspec.Struct):
    """The same, the boxes of a sample still undecoded: as objects all of them would fill gigabytes."""

    meta: ResultsMeta
    results: dict[Text, msgspec.Raw]


def write_results(path: Path, boxes: EvalBoxes, meta: ResultsMeta = CAMERA_ONLY) -> None:
    """Writes an official results file; every sample of `boxes.tokens` gets an entry.

    Raises:
        DataError: a sample holds more boxes than the task allows.
    """
    check_box_counts(boxes, MAX_BOXES_PER_SAMPLE)
    order = np.argsort(boxes.sample_index, kind="stable")
    edges = np.cumsum(np.bincount(boxes.sample_index, minlength=len(boxes.tokens)))[:-1]
    part = path.with_name(path.name + ".part")  # a reader never meets half a file
    with part.open("wb") as file:
        file.write(b'{"meta":' + msgspec.json.encode(meta) + b',"results":{')
        for number, (token, rows) in enumerate(zip(boxes.tokens, np.split(order, edges), strict=False)):
            file.write(b"," if number else b"")
            file.write(msgspec.json.encode(token) + b":" + _encode(token, boxes[rows]))
        file.write(b"}}")
    os.replace(part, path)


def _encode(token: str, boxes: EvalBoxes) -> bytes:
    """The boxes of one sample as a JSON list."""
    columns = zip(
        boxes.centre_m.tolist(),
        boxes.size_wlh_m.tolist(),
        boxes.quat_wxyz.tolist(),
        boxes.velocity_m_s.tolist(),
        boxes.labels.tolist(),
        boxes.scores.tolist(),
        boxes.attributes.tolist(),
        strict=True,
    )
    rows = [
        _Box(token, centre, size, quat, velocity, CLASSES[label], score, ATTRIBUTES[a] if a >= 0 else "")
        for centre, size, quat, velocity, label, score, a in columns
    ]
    # JSON proper has no NaN; the standard library writes the word that the devkit reads, msgspec is faster.
    if np.isnan(boxes.velocity_m_s).any():
        return json.dumps(msgspec.to_builtins(rows)).encode()
    return msgspec.json.encode(rows)


def write_detections(
    path: Path,
    detections: Mapping[str, Boxes3D],
    samples: Sequence[Sample],
    meta: ResultsMeta = CAMERA_ONLY,
) -> None:
    """`write_results` for detections in the LiDAR frame of their key frames."""
    write_results(path, detected_boxes(detections, samples), meta)


def merge_results(parts: Sequence[Path], path: Path) -> None:
    """Joins files that `write_results` wrote, each of one sample or more, in the order given.

    The outcome is what `write_results` makes of all samples at once, while one part at a time is in memory.
    """
    whole = path.with_name(path.name + ".part")
    with whole.open("wb") as file:
        for number, part in enumerate(parts):
            content = part.read_bytes()
            entries = content.index(b"{", content.index(b'"results"')) + 1
            file.write(b"," if number else content[:entries])
            file.write(content[entries : -len(b"}}")])
        file.write(b"}}")
    os.replace(whole, path)


def read_results(path: Path, ground_truth: GroundTruth) -> tuple[EvalBoxes, ResultsMeta]:
    """Reads and checks a results file against the samples of the ground truth.

    Rows keep the order of the file, which decides between equal scores.

    Raises:
        DataError: the file is absent or damaged, names unknown classes or attributes, lists other samples
            than the ground truth, or holds too many boxes or boxes that are not finite. `check_results` lists
            all of it.
    """
    content = _decode(path)
    tokens = ground_truth.boxes.tokens
    try:
        check_tokens(content.results, tokens)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    index_of = {token: index for index, token in enumerate(tokens)}
    parts = []
    for token, entry in content.results.items():
        boxes = entry if isinstance(entry, list) else _parse(path, f"results[{token!r}]: ", entry, list[_Box])
        parts.append(_columns(path, token, index_of[token], boxes))
    try:
        found = eval_boxes_from_columns(tokens, parts, ground_truth.ego_xy_m)
        check_box_counts(found, MAX_BOXES_PER_SAMPLE)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return found, content.meta


_LABELS = {name: label for label, name in enumerate(CLASSES)}
_ATTRIBUTES = {"": NO_ATTRIBUTE} | {name: index for index, name in enumerate(ATTRIBUTES)}


def _columns(path: Path, token: str, index: int, boxes: list[_Box]) -> dict[str, NDArray]:
    """The boxes of one sample as columns; `index` is that of the sample."""
    for row, box in enumerate(boxes):
        if (
            box.sample_token != token
            or box.detection_name not in _LABELS
            or box.attribute_name not in _ATTRIBUTES
        ):
            raise DataError(
                f"{path}: results[{token!r}][{row}] has sample_token {box.sample_token!r}, "
                f"detection_name {box.detection_name!r}, attribute_name {box.attribute_name!r}; expected "
                f"that sample, one of {', '.join(CLASSES)}, and one of {', '.join(ATTRIBUTES)} or ''"
            )
    return {
        "sample_index": np.full(len(boxes), index),
        "centre_m": np.array([box.translation for box in boxes], dtype=np.float64).reshape(-1, 3),
        "size_wlh_m": np.array([box.size for box in boxes], dtype=np.float64).reshape(-1, 3),
        "quat_wxyz": np.array([box.rotation for box in boxes], dtype=np.float64).reshape(-1, 4),
        "velocity_m_s": np.array([box.velocity for box in boxes], dtype=np.float64).reshape(-1, 2),
        "labels": np.array([_LABELS[box.detection_name] for box in boxes], dtype=np.int64),
        "scores": np.array([box.detection_score for box in boxes], dtype=np.float64),
        "attributes": np.array([_ATTRIBUTES[box.attribute_name] for box in boxes], dtype=np.int64),
        "num_points": np.array([box.num_pts for box in boxes], dtype=np.int64),
    }


def _decode(path: Path) -> _Results | _RawResults:
    text = read_whole(path, "results file", MOST_RESULTS_BYTES, "; expected a nuScenes results file")
    # NaN is no JSON proper, yet what json.dump writes for an unknown velocity.
    return _parse(path, "", text, _Results if b"NaN" in text else _RawResults)


def _parse(path: Path, where: str, text: bytes | msgspec.Raw, form: type[FormT]) -> FormT:
    """JSON of this form; in `_Results` NaN is allowed, and dear."""
    try:
        if form is _Results:
            return msgspec.convert(json.loads(bytes(text)), form)
        return msgspec.json.decode(text, type=form)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: no nuScenes results file: {where}{error}; expected {{'meta': {{'use_camera': ...}}, "
            "'results': {token: [box, ...]}} as the detection task defines it"
        ) from None
