"""A big JSON table as columns: read block by block, its rows turned into numpy arrays, one for each field."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .files import NOT_JSON
from .tables import AnnotationRow, EgoPoseRow, InstanceRow, Row, SampleDataRow, SampleRow, read_rows

_CHUNK_BYTES = 8 * 2**20
_LONGEST_ROW_BYTES = 2**16  # those of nuScenes have some 500
_ROW_BORDER = re.compile(rb"\}\s*,\s*\{")


class NotIndexableError(Exception):
    """The tables are absent or faulty; the JSON path says how."""


class Codes(defaultdict[str, int]):
    """Text -> number in the order of appearance, for columns that repeat few texts."""

    def __missing__(self, text: str) -> int:
        self[text] = len(self)
        return self[text]


Columns = dict[str, NDArray[Any]]
CodesOfColumns = defaultdict[str, Codes]


def read_columns(path: Path, layout: Layout) -> Columns:
    """A whole table as columns, read some thousand rows at a time; links are still tokens.

    Columns of few texts are codes into a column NAME.texts, -1 for an empty text.

    Raises:
        NotIndexableError: the table is absent or faulty.
    """
    codes: CodesOfColumns = defaultdict(Codes)
    try:
        try:
            parts = [layout.columns(rows, codes) for rows in _chunks(path, layout.row_type)]
        except (*NOT_JSON, ValueError):
            codes.clear()  # the whole at once tells errors and takes the NaN of Python's json
            parts = [layout.columns(read_rows(path, layout.row_type), codes)]
    except (DataError, ValueError, OverflowError) as error:
        raise NotIndexableError(str(error)) from None
    # Column by column, giving each part's memory back: this is the peak.
    columns = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
    return columns | {f"{name}.texts": _texts(list(texts)) for name, texts in codes.items()}


def _chunks(path: Path, row_type: type[Row]) -> Iterator[list[Any]]:
    """Rows of a table, cut where a row ends; a cut inside a text or a row makes no JSON, and so is noticed."""
    decoder = msgspec.json.Decoder(list[row_type])
    if not path.is_file():
        raise NotIndexableError(f"{path}: no such table")
    head, text = b"", b""
    with path.open("rb") as file:
        while block := file.read(_CHUNK_BYTES):
            text += block
            borders = list(_ROW_BORDER.finditer(text, max(len(text) - _LONGEST_ROW_BYTES, 0)))
            if borders:
                yield decoder.decode(head + text[: borders[-1].start() + 1] + b"]")
                head, text = b"[", text[borders[-1].end() - 1 :]
            elif len(text) > _CHUNK_BYTES + _LONGEST_ROW_BYTES:
                raise NotIndexableError(f"{path}: a row of over {_LONGEST_ROW_BYTES} bytes")
    yield decoder.decode(head + text)


def _sample_columns(rows: list[SampleRow], codes: CodesOfColumns) -> Columns:
    return {
        "token": _texts([row.token for row in rows]),
        "timestamp": np.array([row.timestamp for row in rows], dtype=np.int64),
        "scene": _coded([row.scene_token for row in rows], codes["scene"]),
        "prev": _texts([row.prev for row in rows]),
        "next": _texts([row.next for row in rows]),
    }


def _instance_columns(rows: list[InstanceRow], codes: CodesOfColumns) -> Columns:
    return {
        "token": _texts([row.token for row in rows]),
        "category": _coded([row.category_token for row in rows], codes["category"]),
    }


def _ego_pose_columns(rows: list[EgoPoseRow], codes: CodesOfColumns) -> Columns:
    return {
        "token": _texts([row.token for row in rows]),
        "translation": np.array([row.translation for row in rows], dtype=np.float64).reshape(-1, 3),
        "rotation": np.array([row.rotation for row in rows], dtype=np.float64).reshape(-1, 4),
    }


def _sample_data_columns(rows: list[SampleDataRow], codes: CodesOfColumns) -> Columns:
    calibrations = [row.calibrated_sensor_token for row in rows]
    return {
        "token": _texts([row.token for row in rows]),
        "sample": _texts([row.sample_token for row in rows]),
        "ego_pose": _texts([row.ego_pose_token for row in rows]),
        "calibrated_sensor": _coded(calibrations, codes["calibrated_sensor"]),
        "timestamp": np.array([row.timestamp for row in rows], dtype=np.int64),
        "is_key_frame": np.array([row.is_key_frame for row in rows], dtype=np.bool_),
        "filename": _texts([row.filename for row in rows]),
        "prev": _texts([row.prev for row in rows]),
        "width": np.array([row.width for row in rows], dtype=np.int32),
        "height": np.array([row.height for row in rows], dtype=np.int32),
    }


def _annotation_columns(rows: list[AnnotationRow], codes: CodesOfColumns) -> Columns:
    attributes = [row.attribute_tokens[0] if row.attribute_tokens else "" for row in rows]
    if any(row.attribute_tokens and not attribute for row, attribute in zip(rows, attributes, strict=True)):
        raise NotIndexableError("sample_annotation.json has an empty attribute token")
    return {
        "token": _texts([row.token for row in rows]),
        "sample": _texts([row.sample_token for row in rows]),
        "instance": _texts([row.instance_token for row in rows]),
        "visibility": _coded([row.visibility_token for row in rows], codes["visibility"]),
        "attribute": _coded(attributes, codes["attribute"]),
        "translation": np.array([row.translation for row in rows], dtype=np.float64).reshape(-1, 3),
        "size": np.array([row.size for row in rows], dtype=np.float64).reshape(-1, 3),
        "rotation": np.array([row.rotation for row in rows], dtype=np.float64).reshape(-1, 4),
        "prev": _texts([row.prev for row in rows]),
        "next": _texts([row.next for row in rows]),
        "num_lidar_pts": np.array([row.num_lidar_pts for row in rows], dtype=np.int64),
        "num_radar_pts": np.array([row.num_radar_pts for row in rows], dtype=np.int64),
    }


def _texts(texts: list[str]) -> NDArray[np.bytes_]:
    if "\0" in "".join(texts):
        raise NotIndexableError("a token or file name with a zero byte, which numpy takes for padding")
    try:
        return np.array(texts, dtype=np.bytes_)  # four times as fast as what follows, but ASCII only
    except UnicodeEncodeError:
        return np.array([text.encode() for text in texts], dtype=np.bytes_)


def _coded(texts: list[str], codes: Codes) -> NDArray[np.int32]:
    return np.array([codes[text] if text else -1 for text in texts], dtype=np.int32)


@dataclass(frozen=True)
class Layout:
    """How a table becomes columns. Links: column -> table; those within a table may be empty."""

    row_type: type[Row]
    columns: Callable[[list[Any], CodesOfColumns], Columns]
    links: Mapping[str, str] = field(default_factory=dict)


# Of what a link leads to before what has the link.
LAYOUTS = {
    "sample": Layout(SampleRow, _sample_columns, {"prev": "sample", "next": "sample"}),
    "instance": Layout(InstanceRow, _instance_columns),
    "ego_pose": Layout(EgoPoseRow, _ego_pose_columns),
    "sample_data": Layout(
        SampleDataRow,
        _sample_data_columns,
        {"sample": "sample", "ego_pose": "ego_pose", "prev": "sample_data"},
    ),
    "sample_annotation": Layout(
        AnnotationRow,
        _annotation_columns,
        {
            "sample": "sample",
            "instance": "instance",
            "prev": "sample_annotation",
            "next": "sample_annotation",
        },
    ),
}
