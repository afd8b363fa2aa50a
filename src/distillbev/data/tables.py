"""The JSON tables of a nuScenes folder: typed rows by token, and links that name what is broken.

Source: the nuScenes database schema. Every table is read when it is first asked for, and its rows are looked
up by token; `samples.py` makes frames of them. Nothing outside the data layer sees a row.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec

from ..errors import DataError
from .files import LONGEST_NAME, NOT_JSON, is_plain_name, read_whole

Vector = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]
Text = Annotated[str, msgspec.Meta(max_length=LONGEST_NAME)]
# Whole numbers that differences and float64 hold exactly, and what an image can have at most.
Count = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
Pixels = Annotated[int, msgspec.Meta(ge=0, le=65_535)]

# Longest time between two annotations of an instance that still gives a velocity; twice that where the
# difference spans both neighbours. Source: nuScenes devkit, NuScenes.box_velocity.
MAX_VELOCITY_GAP_S = 1.5

MOST_TABLE_BYTES = 16 * 2**30  # ten times the largest table of nuScenes
LONGEST_ROW = 16_384  # characters; those of nuScenes have some 500


class Row(msgspec.Struct, frozen=True, gc=False):
    """A row of any table; fields that are not used here are skipped when reading."""

    token: Text


class SceneRow(Row, frozen=True, gc=False):
    name: Text


class SampleRow(Row, frozen=True, gc=False):
    timestamp: Count
    scene_token: Text
    prev: Text
    next: Text


class SampleDataRow(Row, frozen=True, gc=False):
    sample_token: Text
    ego_pose_token: Text
    calibrated_sensor_token: Text
    timestamp: Count
    is_key_frame: bool
    filename: Text
    prev: Text
    width: Pixels = 0
    height: Pixels = 0


class EgoPoseRow(Row, frozen=True, gc=False):
    translation: Vector
    rotation: Quaternion


class CalibratedSensorRow(Row, frozen=True, gc=False):
    sensor_token: Text
    translation: Vector
    rotation: Quaternion
    camera_intrinsic: list[list[float]] = []


class SensorRow(Row, frozen=True, gc=False):
    channel: Text
    modality: Literal["camera", "lidar", "radar"]  # a word of another kind would hide a sensor


class AnnotationRow(Row, frozen=True, gc=False):
    sample_token: Text
    instance_token: Text
    visibility_token: Text
    attribute_tokens: list[Text]
    translation: Vector
    size: Vector  # width, length, height
    rotation: Quaternion
    prev: Text
    next: Text
    num_lidar_pts: Count
    num_radar_pts: Count


class InstanceRow(Row, frozen=True, gc=False):
    category_token: Text


class NamedRow(Row, frozen=True, gc=False):
    """A category or an attribute."""

    name: Text


RowT = TypeVar("RowT", bound=Row)


class RowsByToken(ABC, Generic[RowT]):
    """One table: rows by token, in the order of the file."""

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[RowT]: ...

    @abstractmethod
    def get(self, token: str) -> RowT | None: ...

    def follow(self, token: str, table: str, row: Row, field: str) -> RowT:
        """The row that `field` of `row` in `table` points to.

        Raises:
            DataError: there is none; names the table, token and field of the broken link.
        """
        found = self.get(token)
        if found is None:
            raise DataError(
                f"{table}.json, token {row.token!r}: {field} {token!r} is not in {self.name}.json "
                f"({len(self)} rows); the tables do not belong together, copy or write them again"
            )
        return found


class Table(RowsByToken[RowT]):
    """A table read whole from its JSON file."""

    def __init__(self, path: Path, row_type: type[RowT]) -> None:
        self.name = path.stem
        self._rows: dict[str, RowT] = {}
        for row in read_rows(path, row_type):
            if self._rows.setdefault(row.token, row) is not row:
                raise DataError(
                    f"{path}: token {row.token!r} occurs more than once; delete all but the right row"
                )

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[RowT]:
        return iter(self._rows.values())

    def get(self, token: str) -> RowT | None:
        return self._rows.get(token)


class Tables:
    """The tables of one version folder, each read when it is first asked for.

    Raises (when a table is asked for):
        DataError: a table is absent, is no JSON, or holds a row that lacks a field.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _table(self, name: str, row_type: type[RowT]) -> Table[RowT]:
        return Table(self.folder / f"{name}.json", row_type)

    @cached_property
    def scene(self) -> Table[SceneRow]:
        table = self._table("scene", SceneRow)
        tokens: dict[str, str] = {}
        for row in table:
            check_name("scene", row, "name", row.name)
            if tokens.setdefault(row.name, row.token) != row.token:
                raise DataError(
                    f"scene.json, token {row.token!r}: scene {tokens[row.name]!r} has the name {row.name!r}, too; "
                    "give each its own"
                )
        return table

    @cached_property
    def sample(self) -> RowsByToken[SampleRow]:
        return self._table("sample", SampleRow)

    @cached_property
    def sample_data(self) -> RowsByToken[SampleDataRow]:
        return self._table("sample_data", SampleDataRow)

    @cached_property
    def ego_pose(self) -> RowsByToken[EgoPoseRow]:
        return self._table("ego_pose", EgoPoseRow)

    @cached_property
    def calibrated_sensor(self) -> Table[CalibratedSensorRow]:
        return self._table("calibrated_sensor", CalibratedSensorRow)

    @cached_property
    def sensor(self) -> Table[SensorRow]:
        table = self._table("sensor", SensorRow)
        for row in table:
            check_name("sensor", row, "channel", row.channel)
        return table

    @cached_property
    def sample_annotation(self) -> RowsByToken[AnnotationRow]:
        return self._table("sample_annotation", AnnotationRow)

    @cached_property
    def instance(self) -> RowsByToken[InstanceRow]:
        return self._table("instance", InstanceRow)

    @cached_property
    def category(self) -> Table[NamedRow]:
        return self._table("category", NamedRow)

    @cached_property
    def attribute(self) -> Table[NamedRow]:
        return self._table("attribute", NamedRow)

    @cached_property
    def samples_of_scene(self) -> dict[str, list[str]]:
        """Scene token -> its sample tokens in the order of time."""
        found: dict[str, list[SampleRow]] = {scene.token: [] for scene in self.scene}
        for row in self.sample:
            self.scene.follow(row.scene_token, "sample", row, "scene_token")
            found[row.scene_token].append(row)
        return {
            scene: [row.token for row in sorted(rows, key=lambda row: row.timestamp)]
            for scene, rows in found.items()
        }

    @cached_property
    def key_data_of_sample(self) -> Mapping[str, list[SampleDataRow]]:
        """Sample token -> the sensor recordings that belong to the key frame itself."""
        found: dict[str, list[SampleDataRow]] = {sample.token: [] for sample in self.sample}
        for row in self.sample_data:
            if row.is_key_frame:
                self.sample.follow(row.sample_token, "sample_data", row, "sample_token")
                found[row.sample_token].append(row)
        return found

    @cached_property
    def annotations_of_sample(self) -> Mapping[str, list[AnnotationRow]]:
        """Sample token -> its annotations."""
        found: dict[str, list[AnnotationRow]] = {sample.token: [] for sample in self.sample}
        for row in self.sample_annotation:
            self.sample.follow(row.sample_token, "sample_annotation", row, "sample_token")
            found[row.sample_token].append(row)
        return found

    def categories_of_sample(self, token: str) -> list[tuple[str, int]]:
        """Category and number of sensor returns (LiDAR and radar) of each annotation of a sample."""
        found = []
        for row in self.annotations_of_sample[token]:
            instance = self.instance.follow(row.instance_token, "sample_annotation", row, "instance_token")
            category = self.category.follow(instance.category_token, "instance", instance, "category_token")
            found.append((category.name, row.num_lidar_pts + row.num_radar_pts))
        return found

    def velocities_of_sample(self, token: str) -> list[tuple[float, float]]:
        """vx, vy (m/s, global frame) of each annotation of a sample, from its instance's neighbouring ones.

        NaN where there are none, or none near enough in time. Source: nuScenes devkit, NuScenes.box_velocity.
        """
        return [self._velocity(row) for row in self.annotations_of_sample[token]]

    def _velocity(self, row: AnnotationRow) -> tuple[float, float]:
        if not row.prev and not row.next:
            return math.nan, math.nan
        annotations = self.sample_annotation
        first = annotations.follow(row.prev, "sample_annotation", row, "prev") if row.prev else row
        last = annotations.follow(row.next, "sample_annotation", row, "next") if row.next else row
        times = [
            self.sample.follow(
                neighbour.sample_token, "sample_annotation", neighbour, "sample_token"
            ).timestamp
            for neighbour in (first, row, last)
        ]
        for neighbour, field, right in (
            (first, "prev", not row.prev or times[0] < times[1]),
            (last, "next", not row.next or times[1] < times[2]),
        ):
            if neighbour.instance_token != row.instance_token or not right:
                raise DataError(
                    f"sample_annotation.json, token {row.token!r}: {field} is {neighbour.token!r} of instance "
                    f"{neighbour.instance_token!r}; expected one of {row.instance_token!r} "
                    f"{'before' if field == 'prev' else 'after'} it in time"
                )
        seconds = 1e-6 * (times[2] - times[0])
        if seconds > MAX_VELOCITY_GAP_S * (2 if row.prev and row.next else 1):
            return math.nan, math.nan
        return (
            (last.translation[0] - first.translation[0]) / seconds,
            (last.translation[1] - first.translation[1]) / seconds,
        )


def find_version_folder(root: Path, version: str | None) -> Path:
    """The folder of tables below `root`: the named version, or the only `v1.0-*`; `root` may be one itself.

    Raises:
        DataError: no such folder, or none or several to choose from; lists those found.
    """
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; expected a nuScenes folder with v1.0-*/, samples/ and sweeps/"
        )
    found = sorted(path.name for path in root.glob("v1.0-*") if path.is_dir())
    listing = f"found {', '.join(found)}" if found else "found no v1.0-* folder"
    if version is not None:
        if version in found or (root / version).is_dir():
            return root / version
        raise DataError(f"{root}: no version folder {version!r}; {listing}")
    if not found and root.name.startswith("v1.0-"):
        return root
    if len(found) != 1:
        mend = f"give one of them, as in {root / found[0]}" if found else "check the path"
        raise DataError(f"{root}: expected a nuScenes folder with one v1.0-* folder, {listing}; {mend}")
    return root / found[0]


def check_name(table: str, row: Row, field: str, name: str) -> None:
    """Names of scenes, sensors and samples become parts of file names."""
    if not is_plain_name(name):
        raise DataError(
            f"{table}.json, token {row.token!r}: {field} {name[:LONGEST_NAME]!r}; expected a name of 1 to "
            f"{LONGEST_NAME} characters without separators, control characters or a dot at its start"
        )


def read_rows(path: Path, row_type: type[RowT]) -> list[RowT]:
    """All rows of one JSON table.

    Raises:
        DataError: the file is absent, damaged, or has a row that lacks a field or has an impossible one.
    """
    absent = f"; a nuScenes version folder holds {path.name}, copy it or write it again"
    content = read_whole(path, "table", MOST_TABLE_BYTES, absent)
    try:
        return msgspec.json.decode(content, type=list[row_type])
    except NOT_JSON:
        return _read_rows_slowly(path, content, row_type)


def _read_rows_slowly(path: Path, content: bytes, row_type: type[RowT]) -> list[RowT]:
    """Row by row, so that the error can name the row; takes the NaN that Python's json module writes."""
    rows, raw_row = [], None
    try:
        for raw_row in _raw_rows(content.decode("utf-8-sig")):
            json.dumps(
                raw_row, ensure_ascii=False
            ).encode()  # refuses half characters, which nothing can print
            rows.append(msgspec.convert(raw_row, row_type))
    except msgspec.ValidationError as error:
        token = raw_row.get("token") if isinstance(raw_row, dict) else None
        raise DataError(
            f"{path}, row {len(rows)}, token {reprlib.repr(token)}: {error}; mend the row or copy the table again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} ({len(content)} bytes): not a JSON table: {error} in row {len(rows)}; copy or write it again"
        ) from None
    return rows


def _raw_rows(text: str) -> Iterator[Any]:
    """The rows of a table one by one, so that a hostile one cannot become a hundred times its size in memory."""
    decode = json.JSONDecoder().raw_decode
    space = re.compile(r"[ \t\r\n]*")

    def skip(place: int) -> int:
        found = space.match(text, place)
        assert found is not None, place
        return found.end()

    place = skip(0)
    if text[place : place + 1] != "[":
        raise ValueError("expected a list of rows")
    place = skip(place + 1)
    closed = text[place : place + 1] == "]"
    while not closed:
        row, length = decode(text[place : place + LONGEST_ROW])
        yield row
        place = skip(place + length)
        closed = text[place : place + 1] == "]"
        if not closed and text[place : place + 1] != ",":
            raise ValueError("expected a comma or the end of the list after the row")
        place = skip(place + 1)
    if skip(place + 1) < len(text):
        raise ValueError("expected nothing after the list of rows")
