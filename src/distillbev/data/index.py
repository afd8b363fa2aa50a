"""An index of the big tables: columns in .npy files, mapped into memory, in place of gigabytes of JSON.

Only a copy of what `tables.py` reads, row for row: the JSON path stays as the readable twin, and faulty tables
(broken links, tokens that occur twice) are not indexed, so that their errors are always told by that path. The
small tables (scenes, sensors, calibrations, names) are read from JSON in any case.

An index lies in a folder named after its format and the size and time of change of every table. So a stale one
is never opened, a finished one appears by a single rename, and whoever loses a race finds the winner's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .tables import (
    AnnotationRow,
    EgoPoseRow,
    InstanceRow,
    RowsByToken,
    RowT,
    SampleDataRow,
    SampleRow,
    Tables,
    read_rows,
)

log = logging.getLogger(__name__)

FORMAT = 1
FOLDER = "table_index"
# Tables that together are smaller are read from JSON in under a second, which is not worth a folder in somebody's
# dataset; v1.0-mini has 50 MB, v1.0-trainval 2 GB. `distillbev prepare` indexes whatever it is given.
INDEX_FROM_BYTES = 128 * 2**20
INDEXED = ("sample", "instance", "ego_pose", "sample_data", "sample_annotation")

_CHUNK_BYTES = 16 * 2**20
_LONGEST_TEXT_BYTES = 255
_ROW_BORDER = re.compile(rb"\}\s*,\s*\{")
_MIX = np.uint64(0x9E3779B97F4A7C15)  # an odd number with evenly spread bits (2^64 / golden ratio)


class NotIndexableError(Exception):
    """The tables are absent or faulty; the JSON path says how."""


# Finding and opening --------------------------------------------------------------------------------------------


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Size (bytes) and time of change (ns) of every table of a version folder."""
    stats = {path.stem: path.stat() for path in sorted(folder.glob("*.json"))}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def index_folders(folder: Path) -> list[Path]:
    """Where the index of a version folder may lie: in the dataset, else in the user's cache."""
    key = hashlib.sha256(json.dumps([FORMAT, fingerprint(folder)]).encode()).hexdigest()[:16]
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distillbev"
    return [folder.parent / FOLDER / f"{folder.name}-{key}", cache / FOLDER / f"{place}-{key}"]


def open_tables(folder: Path, use_index: bool | None = None) -> Tables:
    """The tables of a version folder, through the index where there is one or where it pays to build it.

    Args:
        folder: the `v1.0-*` folder.
        use_index: None decides by size, True builds one for any size, False reads JSON.
    """
    if use_index is False:
        return Tables(folder)
    for place in index_folders(folder):
        if _is_whole(place):
            return IndexedTables(folder, place)
    size = sum(size for size, _ in fingerprint(folder).values())
    if not use_index and size < INDEX_FROM_BYTES:
        return Tables(folder)
    try:
        return IndexedTables(folder, build_index(folder))
    except (NotIndexableError, OSError, DataError) as error:
        log.warning("%s: reading the JSON tables at every start, for there is no index: %s", folder, error)
        return Tables(folder)


def _is_whole(place: Path) -> bool:
    """Whether every file of an index is there in the length that its list says."""
    try:
        files: dict[str, int] = json.loads((place / "index.json").read_text())["files"]
        return all((place / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


class IndexTable(RowsByToken[RowT]):
    """One table of an index: rows by token, made when they are asked for."""

    def __init__(self, name: str, place: Path, make: Callable[[IndexTable[RowT], int], RowT]) -> None:
        self.name = name
        self._place = place
        self._make = make
        self._columns: dict[str, NDArray[Any]] = {}

    def __getitem__(self, column: str) -> NDArray[Any]:
        """A column, mapped: its pages are shared by all processes that read them."""
        if column not in self._columns:
            mapped = np.load(self._place / f"{self.name}.{column}.npy", mmap_mode="r", allow_pickle=False)
            self._columns[column] = mapped.view(np.ndarray)
        return self._columns[column]

    def __len__(self) -> int:
        return len(self["token"])

    def __iter__(self) -> Iterator[RowT]:
        return (self.row(number) for number in range(len(self)))

    def row(self, number: int) -> RowT:
        return self._make(self, number)

    def number_of(self, token: str) -> int | None:
        text = token.encode("utf-8", "surrogatepass")
        key = _key_of(text)
        keys = self["sorted_keys"]
        place = int(np.searchsorted(keys, key))
        if place == len(keys) or keys[place] != key:
            return None
        number = int(self["order"][place])
        return number if self["token"][number] == text else None

    def get(self, token: str) -> RowT | None:
        number = self.number_of(token)
        return None if number is None else self.row(number)

    def text(self, column: str, number: int) -> str:
        return self[column][number].decode()

    def coded(self, column: str, number: int) -> str:
        """Of a column that repeats few texts: their vocabulary lies beside the codes."""
        code = self[column][number]
        return "" if code < 0 else self[f"{column}.texts"][code].decode()


class _Groups(Mapping[str, list[str]]):
    """Sample token -> tokens of the rows that belong to it."""

    def __init__(self, samples: IndexTable[SampleRow], rows: IndexTable[Any]) -> None:
        self._samples = samples
        self._rows = rows

    def numbers(self, token: str) -> NDArray[np.int32]:
        number = self._samples.number_of(token)
        if number is None:
            raise KeyError(token)
        starts = self._rows["group_starts"]
        return self._rows["grouped"][starts[number] : starts[number + 1]]

    def __getitem__(self, token: str) -> list[str]:
        return [text.decode() for text in self._rows["token"][self.numbers(token)]]

    def __iter__(self) -> Iterator[str]:
        return (row.token for row in self._samples)

    def __len__(self) -> int:
        return len(self._samples)


class IndexedTables(Tables):
    """The tables of a version folder, the big ones through an index in the folder `place`."""

    def __init__(self, folder: Path, place: Path) -> None:
        super().__init__(folder)
        self.place = place

    def __reduce__(self) -> tuple[type[IndexedTables], tuple[Path, Path]]:
        return IndexedTables, (
            self.folder,
            self.place,
        )  # a worker maps the files itself; a copy would be gigabytes

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
                prev=_link(table, "prev", number),
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
                prev=_link(table, "prev", number),
                next=_link(table, "next", number),
                num_lidar_pts=int(table["num_lidar_pts"][number]),
                num_radar_pts=int(table["num_radar_pts"][number]),
            )

        return IndexTable("sample_annotation", self.place, row)

    @cached_property
    def samples_of_scene(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {scene.token: [] for scene in self.scene}
        codes, texts = self.sample["scene"], self.sample["scene.texts"]
        for number in np.lexsort((self.sample["timestamp"], codes)):
            scene = texts[codes[number]].decode()
            if scene not in found:
                row = self.sample.row(number)
                self.scene.follow(row.scene_token, "sample", row, "scene_token")
            found[scene].append(self.sample.text("token", number))
        return found

    @cached_property
    def key_data_of_sample(self) -> _Groups:
        return _Groups(self.sample, self.sample_data)

    @cached_property
    def annotations_of_sample(self) -> _Groups:
        return _Groups(self.sample, self.sample_annotation)

    def categories_of_sample(self, token: str) -> list[tuple[str, int]]:
        rows = self.annotations_of_sample.numbers(token)
        annotations, instances = self.sample_annotation, self.instance
        points = annotations["num_lidar_pts"][rows] + annotations["num_radar_pts"][rows]
        codes = instances["category"][annotations["instance"][rows]]
        return [
            (self._category_name(code), count)
            for code, count in zip(codes.tolist(), points.tolist(), strict=True)
        ]

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
        prev=_link(table, "prev", number),
        next=_link(table, "next", number),
    )


def _instance_row(table: IndexTable[InstanceRow], number: int) -> InstanceRow:
    return InstanceRow(token=table.text("token", number), category_token=table.coded("category", number))


def _ego_pose_row(table: IndexTable[EgoPoseRow], number: int) -> EgoPoseRow:
    return EgoPoseRow(
        token=table.text("token", number),
        translation=tuple(table["translation"][number].tolist()),
        rotation=tuple(table["rotation"][number].tolist()),
    )


def _link(table: IndexTable[Any], column: str, number: int) -> str:
    """Token of the row of the same table that a column of row numbers leads to; "" for -1."""
    target = table[column][number]
    return "" if target < 0 else table.text("token", target)


# Building -------------------------------------------------------------------------------------------------------


def build_index(folder: Path) -> Path:
    """Builds the index of a version folder, or waits for another process that does; returns its place.

    Raises:
        NotIndexableError: the tables are faulty; reading them as JSON tells how.
        OSError: neither the dataset nor the user's cache can be written.
    """
    refusals: list[OSError] = []
    for place in index_folders(folder):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with _lock(place.parent / f"{folder.name}.lock"):
                if not _is_whole(place):
                    _build_at(folder, place)
            return place
        except OSError as error:
            refusals.append(error)
    raise refusals[0]


def _build_at(folder: Path, place: Path) -> None:
    prefix = place.name.rsplit("-", 1)[0]
    before = fingerprint(folder)
    for leftover in place.parent.glob(
        f".building-{prefix}-*"
    ):  # of a process that was killed: we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    stale = [old for old in place.parent.glob(f"{prefix}-*") if re.fullmatch(r"[0-9a-f]{16}", old.name[-16:])]
    if stale:
        log.info("%s: the tables have changed since they were indexed; indexing them again", folder)
    building = place.parent / f".building-{prefix}-{os.getpid()}"
    building.mkdir()
    try:
        _write_columns(folder, building)
        files = {path.name: path.stat().st_size for path in building.iterdir()}
        if fingerprint(folder) != before:
            raise NotIndexableError("the tables changed while they were read")
        content = {"format": FORMAT, "tables": before, "files": files}
        (building / "index.json").write_text(json.dumps(content, indent=1))
        for path in building.iterdir():  # a rename may reach the disk before the data does
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for old in stale:
            shutil.rmtree(old, ignore_errors=True)  # open maps of other processes live on
        try:
            building.rename(place)
        except OSError:
            if not _is_whole(place):  # another machine, whose lock we do not see, may have been first
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process of this machine at a time; the system frees it when a process dies."""
    with path.open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass  # no locks here: the rename at the end still lets only whole indices appear
        yield


def _write_columns(folder: Path, place: Path) -> None:
    def save(table: str, columns: dict[str, NDArray[Any]]) -> None:
        for name, column in columns.items():
            np.save(place / f"{table}.{name}.npy", column, allow_pickle=False)

    samples = _read_columns(folder / "sample.json", SampleRow, _sample_columns)
    sample_keys = _Keys("sample", samples["token"])
    for link in ("prev", "next"):
        samples[link] = sample_keys.numbers_of(samples[link], f"sample.{link}")
    save("sample", samples | sample_keys.columns)

    instances = _read_columns(folder / "instance.json", InstanceRow, _instance_columns)
    instance_keys = _Keys("instance", instances["token"])
    save("instance", instances | instance_keys.columns)

    poses = _read_columns(folder / "ego_pose.json", EgoPoseRow, _ego_pose_columns)
    pose_keys = _Keys("ego_pose", poses["token"])
    save("ego_pose", poses | pose_keys.columns)
    del poses

    data = _read_columns(folder / "sample_data.json", SampleDataRow, _sample_data_columns)
    data["sample"] = sample_keys.numbers_of(data["sample"], "sample_data.sample_token", may_be_empty=False)
    data["ego_pose"] = pose_keys.numbers_of(
        data["ego_pose"], "sample_data.ego_pose_token", may_be_empty=False
    )
    del pose_keys
    data_keys = _Keys("sample_data", data["token"])
    data["prev"] = data_keys.numbers_of(data["prev"], "sample_data.prev")
    save(
        "sample_data",
        data | data_keys.columns | _grouped(data["sample"], len(sample_keys), data["is_key_frame"]),
    )
    del data, data_keys

    boxes = _read_columns(folder / "sample_annotation.json", AnnotationRow, _annotation_columns)
    boxes["sample"] = sample_keys.numbers_of(boxes["sample"], "sample_annotation.sample_token", False)
    boxes["instance"] = instance_keys.numbers_of(boxes["instance"], "sample_annotation.instance_token", False)
    box_keys = _Keys("sample_annotation", boxes["token"])
    for link in ("prev", "next"):
        boxes[link] = box_keys.numbers_of(boxes[link], f"sample_annotation.{link}")
    save("sample_annotation", boxes | box_keys.columns | _grouped(boxes["sample"], len(sample_keys)))


class _Codes(defaultdict[str, int]):
    """Text -> number in the order of appearance."""

    def __missing__(self, text: str) -> int:
        self[text] = len(self)
        return self[text]


Codes = defaultdict[str, _Codes]  # by column
Columns = dict[str, NDArray[Any]]


def _sample_columns(rows: list[SampleRow], codes: Codes) -> Columns:
    return {
        "token": _texts([row.token for row in rows]),
        "timestamp": np.array([row.timestamp for row in rows], dtype=np.int64),
        "scene": _coded([row.scene_token for row in rows], codes["scene"]),
        "prev": _texts([row.prev for row in rows]),
        "next": _texts([row.next for row in rows]),
    }


def _instance_columns(rows: list[InstanceRow], codes: Codes) -> Columns:
    return {
        "token": _texts([row.token for row in rows]),
        "category": _coded([row.category_token for row in rows], codes["category"]),
    }


def _ego_pose_columns(rows: list[EgoPoseRow], codes: Codes) -> Columns:
    return {
        "token": _texts([row.token for row in rows]),
        "translation": np.array([row.translation for row in rows], dtype=np.float64).reshape(-1, 3),
        "rotation": np.array([row.rotation for row in rows], dtype=np.float64).reshape(-1, 4),
    }


def _sample_data_columns(rows: list[SampleDataRow], codes: Codes) -> Columns:
    return {
        "token": _texts([row.token for row in rows]),
        "sample": _texts([row.sample_token for row in rows]),
        "ego_pose": _texts([row.ego_pose_token for row in rows]),
        "calibrated_sensor": _coded(
            [row.calibrated_sensor_token for row in rows], codes["calibrated_sensor"]
        ),
        "timestamp": np.array([row.timestamp for row in rows], dtype=np.int64),
        "is_key_frame": np.array([row.is_key_frame for row in rows], dtype=np.bool_),
        "filename": _texts([row.filename for row in rows]),
        "prev": _texts([row.prev for row in rows]),
        "width": np.array([row.width for row in rows], dtype=np.int32),
        "height": np.array([row.height for row in rows], dtype=np.int32),
    }


def _annotation_columns(rows: list[AnnotationRow], codes: Codes) -> Columns:
    attributes = [row.attribute_tokens[0] if row.attribute_tokens else "" for row in rows]
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


def _read_columns(path: Path, row_type: type[RowT], split: Callable[[list[RowT], Codes], Columns]) -> Columns:
    """A whole table as columns, read a few thousand rows at a time."""
    codes: Codes = defaultdict(_Codes)
    try:
        try:
            parts = [split(rows, codes) for rows in _chunks(path, row_type)]
        except (msgspec.DecodeError, ValueError):
            codes.clear()
            parts = [split(read_rows(path, row_type), codes)]  # tells errors, takes the NaN of Python's json
    except (DataError, ValueError, OverflowError) as error:
        raise NotIndexableError(str(error)) from None
    # Column by column, giving each part's memory back, for the peak of a table is that of the whole build.
    columns = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
    return columns | {f"{name}.texts": _texts(list(texts)) for name, texts in codes.items()}


def _chunks(path: Path, row_type: type[RowT]) -> Iterator[list[RowT]]:
    """Rows of a table, cut where a row ends; a cut inside a text makes text that is no JSON, which is noticed."""
    decoder = msgspec.json.Decoder(list[row_type])
    if not path.is_file() or path.stat().st_size == 0:
        raise NotIndexableError(f"{path}: no such table, or an empty file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start, head = 0, b""
        while start < len(content):
            border = _ROW_BORDER.search(content, start + _CHUNK_BYTES)
            if border is None:
                yield decoder.decode(head + content[start:])
                return
            yield decoder.decode(head + content[start : border.start() + 1] + b"]")
            start, head = border.end() - 1, b"["


def _texts(texts: list[str]) -> NDArray[np.bytes_]:
    raw = [text.encode() for text in texts]
    if any(b"\0" in text for text in raw) or max(map(len, raw), default=0) > _LONGEST_TEXT_BYTES:
        raise NotIndexableError(
            f"a token or file name with more than {_LONGEST_TEXT_BYTES} bytes or a zero byte"
        )
    return np.array(raw, dtype=np.bytes_) if raw else np.empty(0, dtype="S1")


def _coded(texts: list[str], codes: _Codes) -> NDArray[np.int32]:
    return np.array([codes[text] if text else -1 for text in texts], dtype=np.int32)


def _grouped(owners: NDArray[Any], num_owners: int, chosen: NDArray[np.bool_] | None = None) -> Columns:
    """Rows by owner, in the order of the table within each."""
    rows = np.arange(len(owners)) if chosen is None else np.flatnonzero(chosen)
    order = np.argsort(owners[rows], kind="stable")
    counts = np.bincount(owners[rows], minlength=num_owners)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return {"grouped": rows[order].astype(np.int32), "group_starts": starts}


class _Keys:
    """The tokens of a table, sorted by a 64-bit key."""

    def __init__(self, table: str, tokens: NDArray[np.bytes_]) -> None:
        self.tokens = tokens
        keys = _keys_of(tokens)
        self.order = np.argsort(keys, kind="stable").astype(np.int32)
        self.sorted_keys = keys[self.order]
        same = np.flatnonzero(self.sorted_keys[1:] == self.sorted_keys[:-1])
        if len(same):
            token = tokens[self.order[same[0]]].decode()
            raise NotIndexableError(f"{table}.json has {len(same)} tokens more than once, such as {token!r}")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def columns(self) -> Columns:
        return {"order": self.order, "sorted_keys": self.sorted_keys}

    def numbers_of(
        self, links: NDArray[np.bytes_], field: str, may_be_empty: bool = True
    ) -> NDArray[np.int32]:
        """Row numbers of the tokens that a column links to, -1 where it is empty."""
        if len(self.tokens) == 0:
            found = np.zeros(len(links), dtype=np.int32)
            right = np.zeros(len(links), dtype=bool)
        else:
            places = np.searchsorted(self.sorted_keys, _keys_of(links))
            found = self.order[np.minimum(places, len(self.tokens) - 1)]
            right = self.tokens[found] == links
        empty = links == b""
        broken = ~right & ~empty if may_be_empty else ~right
        if broken.any():
            lost = links[np.argmax(broken)].decode()
            raise NotIndexableError(f"{field} {lost!r} leads nowhere, as do {int(broken.sum()) - 1} more")
        return np.where(empty, np.int32(-1), found).astype(np.int32)


def _key_of(text: bytes) -> np.uint64:
    """The readable twin of `_keys_of`, for one text."""
    key = 0
    for start in range(0, len(text), 8):
        key ^= int.from_bytes(text[start : start + 8], "little")
        key = key * int(_MIX) & 0xFFFFFFFFFFFFFFFF
        key ^= key >> 32
    return np.uint64(key)


def _keys_of(texts: NDArray[np.bytes_]) -> NDArray[np.uint64]:
    """A 64-bit key of every text, the same whatever the width of the array."""
    words_per_text = -(-texts.dtype.itemsize // 8)
    words = (
        np.ascontiguousarray(texts.astype(f"S{8 * words_per_text}")).view("<u8").reshape(-1, words_per_text)
    )
    keys = np.zeros(len(texts), dtype=np.uint64)
    for column in words.T:
        mixed = (keys ^ column) * _MIX
        mixed ^= mixed >> np.uint64(32)
        keys = np.where(column != 0, mixed, keys)  # no text has a zero byte, so a zero word is padding
    return keys
