"""Lists all faults of a results file, where reading stops at the first one."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..classes import CLASSES
from ..data.files import read_whole
from ..data.findings import Finding, Findings, Severity
from ..errors import DataError
from .eval_boxes import ATTRIBUTES, LARGEST
from .results import MAX_BOXES_PER_SAMPLE, MOST_RESULTS_BYTES

Fault = tuple[Severity, str, str]  # severity, what, where

SENSORS = ("use_camera", "use_lidar", "use_radar", "use_map", "use_external")
VECTORS = {"translation": 3, "size": 3, "rotation": 4, "velocity": 2}
TEXTS = ("sample_token", "detection_name", "attribute_name")


def check_results(path: Path, tokens: Sequence[str]) -> list[Finding]:
    """Everything that is wrong with a results file; an empty list where nothing is.

    An "error" is refused when the file is scored; a "warning" is scored, yet is hardly meant.

    Args:
        path: the file.
        tokens: the samples that it should hold.
    """
    findings = Findings()
    for fault in _faults(path, tokens):
        findings.add(*fault)
    return findings.listed()


def _faults(path: Path, tokens: Sequence[str]) -> Iterator[Fault]:
    twice: list[str] = []

    def take_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        taken = dict(pairs)
        if len(taken) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice.extend(name for name, count in counts.items() if count > 1)
        return taken

    try:
        text = read_whole(path, "results file", MOST_RESULTS_BYTES, "; give another path")
        content = json.loads(text, object_pairs_hook=take_pairs)
    except DataError as error:
        yield "error", "the file cannot be read", str(error)
        return
    except (ValueError, RecursionError) as error:
        yield "error", "the file is not JSON", str(error)
        return
    for name in twice:
        yield "error", "a key occurs twice, of which only the last would count", name
    if not (isinstance(content, dict) and isinstance(content.get("results"), dict)):
        yield "error", "expected {'meta': {...}, 'results': {sample token: [box, ...]}}", str(path)
        return
    yield from _faults_of_meta(content.get("meta"))
    results: dict[str, Any] = content["results"]
    known = set(tokens)
    for token in tokens:
        if token not in results:
            yield "error", "a sample of the split is missing", token
    for token, boxes in results.items():
        if token not in known:
            yield "error", "a sample is not in the split", token
        if not isinstance(boxes, list):
            yield "error", "the entry of a sample is no list of boxes", token
            continue
        if len(boxes) > MAX_BOXES_PER_SAMPLE:
            yield "error", f"a sample has more than {MAX_BOXES_PER_SAMPLE} boxes", f"{token} ({len(boxes)})"
        for row, box in enumerate(boxes):
            for severity, what, value in _faults_of_box(token, box):
                yield severity, what, f"{token}[{row}] {value[:80]}"


def _faults_of_meta(meta: Any) -> Iterator[Fault]:
    for name in SENSORS:
        value = meta.get(name) if isinstance(meta, dict) else None
        if not isinstance(value, bool):
            severity: Severity = "error" if name in SENSORS[:2] or value is not None else "warning"
            yield severity, "meta does not say true or false which sensors were used", name


def _faults_of_box(token: str, box: Any) -> Iterator[Fault]:
    """Severity, what and the value at fault."""
    if not isinstance(box, dict):
        yield "error", "a box is no object", repr(box)
        return
    malformed = [name for name in TEXTS if not isinstance(box.get(name), str)]
    malformed += [name for name, length in VECTORS.items() if not _is_vector(box.get(name), length)]
    malformed += [] if _is_vector([box.get("detection_score")], 1) else ["detection_score"]
    for name in malformed:
        form = f"{VECTORS[name]} numbers" if name in VECTORS else "text" if name in TEXTS else "a number"
        yield "error", f"{name} is not {form}", repr(box.get(name, "absent"))
    num_points = box.get("num_pts", -1)
    if not (type(num_points) in (int, float) and -1 <= num_points <= 2**31 and num_points % 1 == 0):
        yield "error", "num_pts is not a whole number", repr(num_points)
    if malformed:
        return
    if box["sample_token"] != token:
        yield "error", "sample_token is not that of its entry", repr(box["sample_token"])
    if box["detection_name"] not in CLASSES:
        yield "error", f"detection_name is none of {', '.join(CLASSES)}", repr(box["detection_name"])
    if box["attribute_name"] not in (*ATTRIBUTES, ""):
        yield "error", f"attribute_name is none of {', '.join(ATTRIBUTES)} or ''", repr(box["attribute_name"])
    if not all(abs(value) < LARGEST for value in box["translation"]):
        yield "error", "translation is not finite", str(box["translation"])
    if not all(0 < side < LARGEST for side in box["size"]):
        yield "error", "size is not positive", str(box["size"])
    if any(abs(value) >= LARGEST for value in box["velocity"]):
        yield "error", "velocity is infinite", str(box["velocity"])
    if math.isnan(box["detection_score"]):
        yield "error", "detection_score is not a number", "nan"
    elif not 0 <= box["detection_score"] <= 1:
        yield "warning", "detection_score is not in 0 to 1", str(box["detection_score"])
    yield from _faults_of_rotation(box["rotation"])


def _faults_of_rotation(rotation: list[float]) -> Iterator[Fault]:
    w, x, y, z = rotation
    square = w * w + x * x + y * y + z * z
    if not 1e-6 < max(map(abs, rotation)) < LARGEST or math.isnan(square):
        yield "error", "rotation is not a quaternion", str(rotation)
        return
    if abs(math.sqrt(square) - 1) > 0.01:
        yield "warning", "rotation is not of unit length", str(rotation)
    if w * w - x * x - y * y + z * z < 0.5 * square:
        yield "warning", "box is not upright; rotation is expected as w, x, y, z", str(rotation)


def _is_vector(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    """Whether it fits into a float; Python reads whole numbers of any length."""
    return type(value) is float or (type(value) is int and abs(value) < 10**300)
