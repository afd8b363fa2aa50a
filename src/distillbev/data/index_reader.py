"""Reads the columns that `index_writer.py` wrote: the same rows as of the JSON tables, made when asked for."""

from __future__ import annotations

import contextlib
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .files import NOT_JSON, read_whole
from .table_columns import LAYOUTS
from .tables import (
    AnnotationRow,
    EgoPoseRow,
    InstanceRow,
    RowsByToken,
    RowT,
    SampleDataRow,
    SampleRow,
    Tables,
)
from .token_keys import TokenOrder

LIST = "index.json"  # of the files, written last
MOST_LIST_BYTES = 2**20
HEAD_BYTES = 128  # of a .npy file, which say its type and shape
# What arithmetic on damaged columns may raise.
DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class FileFacts(msgspec.Struct, frozen=True):
    """Of one file of an index: its length, and checksums of its head and of the whole."""

    size: int
    head_crc32: int
    crc32: int


class IndexList(msgspec.Struct, frozen=True):
    """What an index is made of, and of which tables (size and time of change of each)."""

    format: int
    tables: dict[str, list[int]]
    files: dict[str, FileFacts]


def read_list(place: Path) -> IndexList | None:
    """The list of an index; None where it is absent or damaged."""
    try:
        content = read_whole(place / LIST, "list of an index", MOST_LIST_BYTES, "")
        return msgspec.json.decode(content, type=IndexList)
    except (DataError, *NOT_JSON):
        return None


def is_whole(place: Path) -> bool:
    """Whether every file of an index is there with the length and the head that its list says."""
    listed = read_list(place)
    if listed is None or not listed.files:
        return False
    try:
        for name, facts in listed.files.items():
            with (place / name).open("rb") as file:
                head = file.read(HEAD_BYTES)
                if os.fstat(file.fileno()).st_size != facts.size or zlib.crc32(head) != facts.head_crc32:
                    return False
    except (OSError, ValueError):
        return False
    return True


class IndexTable(RowsByToken[RowT]):
    """One table of an index. Columns are mapped: their pages are shared by all processes that read them."""

    def __init__(self, name: str, place: Path, make: Callable[[IndexTable[RowT], int], RowT]) -> None:
        self.name = name
        self.place = place
        self._make = make
        self._columns: dict[str, NDArray[Any]] = {}
        try:
            for path in place.glob(f"{name}.*.npy"):
                with warnings.catch_warnings(action="error"):  # a head that numpy did not write
                    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
                self._columns[path.name[len(name) + 1 : -4]] = mapped.view(np.ndarray)
            self._tokens = TokenOrder(self["token"], self["order"], self["sorted_keys"])
        except Exception as error:  # numpy raises many types for heads that somebody made up
            raise _damaged(place, error) from None

    def __getitem__(self, column: str) -> NDArray[Any]:
        return self._columns[column]

    def __len__(self) -> int:
        return len(self["token"])

    def __iter__(self) -> Iterator[RowT]:
        return (self.row(number) for number in range(len(self)))

    def row(self, number: int) -> RowT:
        with _damage_told(self.place):
            return self._make(self, number)

    def number_of(self, token: str) -> int | None:
        with _damage_told(self.place):
            return self._tokens.row_of(token)

    def get(self, token: str) -> RowT | None:
        number = self.number_of(token)
        return None if number is None else self.row(number)

    def text(self, column: str, number: int) -> str:
        if number < 0:  # which numpy counts from the end
            raise IndexError(f"row {number}")
        return self[column][number].decode()

    def coded(self, column: str, number: int) -> str:
        """Of a column that repeats few texts: its vocabulary lies beside the codes."""
        code = int(self[column][number])
        return "" if code < 0 else self[f"{column}.texts"][code].decode()

    def link(self, column: str, number: int) -> str:
        """Token of the row of this table that a column of row numbers leads to; "" for -1."""
        target = self[column][number]
        return "" if target < 0 else self.text("token", target)


class RowsOfSample(Mapping[str, list[RowT]]):
    """Sample token -> the rows that belong to it."""

    def __init__(self, samples: IndexTable[SampleRow], rows: IndexTable[RowT]) -> None:
        self._samples = samples
        self._rows = rows

    def numbers(self, token: str) -> NDArray[np.int32]:
        number = self._samples.number_of(token)
        if number is None:
            raise KeyError(token)
        with _damage_told(self._rows.place):
            starts = self._rows["group_starts"]
            return self._rows["grouped"][starts[number] : starts[number + 1]]

    def __getitem__(self, token: str) -> list[RowT]:
        return [self._rows.row(number) for number in self.numbers(token).tolist()]

    def __iter__(self) -> Iterator[str]:
        return (row.token for row in self._samples)

    def __len__(self) -> int:
        return len(self._samples)


class IndexedTables(Tables):
    """The tables of a version folder, the big ones through an index in the folder `place`.

    Raises (here or in any method):
        DataError: the index is damaged.
    """

    def __init__(self, folder: Path, place: Path) -> None:
        super().__init__(folder)
        self.place = place
        # All files at once: should the tables change, another process may take files away, but not maps.
        for name in LAYOUTS:
            getattr(self, name)

    def __reduce__(self) -> tuple[type[IndexedTables], tuple[Path, Path]]:
        # A worker maps the files itself; a copy would be gigabytes.
        return IndexedTables, (self.folder, self.place)

    @cached_property
    def sample(self) -> IndexTable[SampleRow]:
        return IndexTable("sample", self.place, _sample_row)

    @cached_property
    def instance(self) -> IndexTable[InstanceRow]:
        return IndexTable("instance", self.place, _instance_row)

    @cached_property
    def ego_pose(self) -> IndexTable[EgoPoseRow]:
        return IndexTable("ego_pose", self.place, _ego_pose_row)

    @cached_property
    def sample_data(self) -> IndexTable[SampleDataRow]:
        def row(table: IndexTable[SampleDataRow], number: int) -> SampleDataRow:
            return SampleDataRow(
                token=table.text("token", number),
                sample_token=self.sample.text("token", table["sample"][number]),
                ego_pose_token=self.ego_pose.text("token", table["ego_pose"][number]),
                calibrated_sensor_token=table.coded("calibrated_sensor", number),
                timestamp=int(table["timestamp"][number]),
                is_key_frame=bool(table["is_key_frame"][number]),
                filename=table.text("filename", number),
                prev=table.link("prev", number),
                width=int(table["width"][number]),
                height=int(table["height"][number]),
            )

        return IndexTable("sample_data", self.place, row)

    @cached_property
    def sample_annotation(self) -> IndexTable[AnnotationRow]:
        def row(table: IndexTable[AnnotationRow], number: int) -> AnnotationRow:
            attribute = table.coded("attribute", number)
            return AnnotationRow(
                token=table.text("token", number),
                sample_token=self.sample.text("token", table["sample"][number]),
                instance_token=self.instance.text("token", table["instance"][number]),
                visibility_token=table.coded("visibility", number),
                attribute_tokens=[attribute] if attribute else [],
                translation=tuple(table["translation"][number].tolist()),
                size=tuple(table["size"][number].tolist()),
                rotation=tuple(table["rotation"][number].tolist()),
                prev=table.link("prev", number),
                next=table.link("next", number),
                num_lidar_pts=int(table["num_lidar_pts"][number]),
                num_radar_pts=int(table["num_radar_pts"][number]),
            )

        return IndexTable("sample_annotation", self.place, row)

    @cached_property
    def samples_of_scene(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {scene.token: [] for scene in self.scene}
        with _damage_told(self.place):
            for number in np.lexsort((self.sample["timestamp"], self.sample["scene"])).tolist():
                scene = self.sample.coded("scene", number)
                if scene not in found:
                    self.scene.follow(scene, "sample", self.sample.row(number), "scene_token")
                found[scene].append(self.sample.text("token", number))
        return found

    @cached_property
    def key_data_of_sample(self) -> RowsOfSample[SampleDataRow]:
        return RowsOfSample(self.sample, self.sample_data)

    @cached_property
    def annotations_of_sample(self) -> RowsOfSample[AnnotationRow]:
        return RowsOfSample(self.sample, self.sample_annotation)

    def categories_of_sample(self, token: str) -> list[tuple[str, int]]:
        rows = self.annotations_of_sample.numbers(token)
        annotations, instances = self.sample_annotation, self.instance
        with _damage_told(self.place):
            points = annotations["num_lidar_pts"][rows] + annotations["num_radar_pts"][rows]
            codes = instances["category"][annotations["instance"][rows]]
            return [
                (self._category_name(code), count)
                for code, count in zip(codes.tolist(), points.tolist(), strict=True)
            ]

    def velocities_of_sample(self, token: str) -> list[tuple[float, float]]:
        rows = self.annotations_of_sample.numbers(token)
        with _damage_told(self.place):
            return [(vx, vy) for vx, vy in self.sample_annotation["velocity"][rows].tolist()]

    def _category_name(self, code: int) -> str:
        if code not in self._category_names:
            row = self.instance.row(int(np.argmax(self.instance["category"] == code)))
            self._category_names[code] = self.category.follow(
                row.category_token, "instance", row, "category_token"
            ).name
        return self._category_names[code]

    @cached_property
    def _category_names(self) -> dict[int, str]:
        return {}


def _sample_row(table: IndexTable[SampleRow], number: int) -> SampleRow:
    return SampleRow(
        token=table.text("token", number),
        timestamp=int(table["timestamp"][number]),
        scene_token=table.coded("scene", number),
        prev=table.link("prev", number),
        next=table.link("next", number),
    )


def _instance_row(table: IndexTable[InstanceRow], number: int) -> InstanceRow:
    return InstanceRow(token=table.text("token", number), category_token=table.coded("category", number))


def _ego_pose_row(table: IndexTable[EgoPoseRow], number: int) -> EgoPoseRow:
    return EgoPoseRow(
        token=table.text("token", number),
        translation=tuple(table["translation"][number].tolist()),
        rotation=tuple(table["rotation"][number].tolist()),
    )


@contextlib.contextmanager
def _damage_told(place: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise _damaged(place, error) from None


def _damaged(place: Path, error: Exception) -> DataError:
    return DataError(f"{place}: the index is damaged ({error}); delete this folder, and it is built again")
