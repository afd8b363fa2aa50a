"""The official results file of the nuScenes detection task: written, checked, read.

Boxes in it are in the global frame: gravity centre, (width, length, height), full quaternion, velocity over
ground; detectors predict no attribute, `eval_boxes.choose_attributes` gives it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np

from ..classes import CLASSES
from ..data.files import LONGEST_NAME, read_whole
from ..errors import DataError
from .eval_boxes import (
    ATTRIBUTES,
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


def write_results(path: Path, boxes: EvalBoxes, meta: ResultsMeta = CAMERA_ONLY) -> None:
    """Writes an official results file; every sample of `boxes.tokens` gets an entry.

    Raises:
        DataError: a sample holds more boxes than the task allows.
    """
    check_box_counts(boxes, MAX_BOXES_PER_SAMPLE)
    entries: dict[str, list[_Box]] = {token: [] for token in boxes.tokens}
    columns = zip(
        boxes.sample_index.tolist(),
        boxes.centre_m.tolist(),
        boxes.size_wlh_m.tolist(),
        boxes.quat_wxyz.tolist(),
        boxes.velocity_m_s.tolist(),
        boxes.labels.tolist(),
        boxes.scores.tolist(),
        boxes.attributes.tolist(),
        strict=True,
    )
    for index, centre, size, quat, velocity, label, score, attribute in columns:
        token = boxes.tokens[index]
        name = ATTRIBUTES[attribute] if attribute >= 0 else ""
        entries[token].append(_Box(token, centre, size, quat, velocity, CLASSES[label], score, name))
    content = _Results(meta, entries)
    # JSON proper has no NaN; the standard library writes the word that the devkit reads, msgspec is faster.
    if np.isnan(boxes.velocity_m_s).any():
        text = json.dumps(msgspec.to_builtins(content)).encode()
    else:
        text = msgspec.json.encode(content)
    part = path.with_name(path.name + ".part")  # a reader never meets half a file
    part.write_bytes(text)
    os.replace(part, path)


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
    labels = {name: label for label, name in enumerate(CLASSES)}
    attributes = {"": -1} | {name: index for index, name in enumerate(ATTRIBUTES)}
    boxes = [box for entry in content.results.values() for box in entry]
    for token, entry in content.results.items():
        for row, box in enumerate(entry):
            if (
                box.sample_token != token
                or box.detection_name not in labels
                or box.attribute_name not in attributes
            ):
                raise DataError(
                    f"{path}: results[{token!r}][{row}] has sample_token {box.sample_token!r}, "
                    f"detection_name {box.detection_name!r}, attribute_name {box.attribute_name!r}; expected "
                    f"that sample, one of {', '.join(CLASSES)}, and one of {', '.join(ATTRIBUTES)} or ''"
                )
    columns = {
        "sample_index": np.array([index_of[box.sample_token] for box in boxes], dtype=np.int64),
        "centre_m": np.array([box.translation for box in boxes], dtype=np.float64).reshape(-1, 3),
        "size_wlh_m": np.array([box.size for box in boxes], dtype=np.float64).reshape(-1, 3),
        "quat_wxyz": np.array([box.rotation for box in boxes], dtype=np.float64).reshape(-1, 4),
        "velocity_m_s": np.array([box.velocity for box in boxes], dtype=np.float64).reshape(-1, 2),
        "labels": np.array([labels[box.detection_name] for box in boxes], dtype=np.int64),
        "scores": np.array([box.detection_score for box in boxes], dtype=np.float64),
        "attributes": np.array([attributes[box.attribute_name] for box in boxes], dtype=np.int64),
        "num_points": np.array([box.num_pts for box in boxes], dtype=np.int64),
    }
    try:
        found = eval_boxes_from_columns(tokens, [columns], ground_truth.ego_xy_m)
        check_box_counts(found, MAX_BOXES_PER_SAMPLE)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return found, content.meta


def _decode(path: Path) -> _Results:
    text = read_whole(path, "results file", MOST_RESULTS_BYTES, "; expected a nuScenes results file")
    try:
        if b"NaN" in text:  # no JSON proper, yet what json.dump writes for an unknown velocity
            return msgspec.convert(json.loads(text), _Results)
        return msgspec.json.decode(text, type=_Results)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: no nuScenes results file: {error}; expected {{'meta': {{'use_camera': ...}}, "
            "'results': {token: [box, ...]}} as the detection task defines it"
        ) from None
