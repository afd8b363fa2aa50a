"""An index of the big tables: columns in .npy files, mapped into memory, in place of gigabytes of JSON.

An index lies in a folder named after its format and the size and time of change of every table. So a stale one
is never opened, a finished one appears by a single rename, and whoever loses a race finds the winner's.
The small tables (scenes, sensors, calibrations, names) are read from JSON in any case. `index_writer.py` says
what is in the files; the JSON path stays as the readable twin.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from .index_reader import HEAD_BYTES, LIST, FileFacts, IndexedTables, IndexList, is_whole, read_list
from .index_writer import write_columns
from .table_columns import LAYOUTS, NotIndexableError
from .tables import Tables

log = logging.getLogger(__name__)

FORMAT = 3  # of the files; a change makes every index stale
FOLDER = "table_index"
# Tables that together are smaller are read from JSON in under a second, which is not worth a folder in somebody's
# dataset; v1.0-mini has 50 MB, v1.0-trainval 2 GB. `distillbev prepare` indexes whatever it is given.
INDEX_FROM_BYTES = 128 * 2**20


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Size (bytes) and time of change (ns) of every indexed table of a version folder."""
    stats = {path.stem: path.stat() for name in LAYOUTS if (path := folder / f"{name}.json").is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def index_folders(folder: Path) -> list[Path]:
    """Where the index of a version folder may lie: in the dataset, else in the user's cache."""
    key = hashlib.sha256(json.dumps([FORMAT, fingerprint(folder)]).encode()).hexdigest()[:16]
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distillbev"
    return [folder.parent / FOLDER / f"{folder.name}-{key}", cache / FOLDER / f"{place}-{key}"]


def find_index(folder: Path) -> Path | None:
    """The index of a version folder that is whole and up to date; None where there is none."""
    return next((place for place in index_folders(folder) if is_whole(place)), None)


def damaged_files(place: Path) -> list[str]:
    """Files of an index that have changed since it was built. Opening looks at their lengths alone, which is fast."""
    listed = read_list(place)
    try:
        files = {} if listed is None else listed.files
        return [name for name, facts in files.items() if _facts(place / name) != facts]
    except OSError:
        return [LIST]


def _facts(path: Path) -> FileFacts:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        checksum = zlib.crc32(head)
        while part := file.read(2**20):
            checksum = zlib.crc32(part, checksum)
        return FileFacts(file.tell(), zlib.crc32(head), checksum)


def changed_tables(folder: Path) -> list[str]:
    """Names of the tables that have changed since they were indexed; none where there is no stale index."""
    now = fingerprint(folder)
    for stale in (old for place in index_folders(folder) for old in _stale_at(place)):
        listed = read_list(stale)
        if listed is not None:
            return [name for name in LAYOUTS if now.get(name) != listed.tables.get(name)]
    return []


def open_tables(folder: Path, use_index: bool | None = None) -> Tables:
    """The tables of a version folder, through the index where there is one or where it pays to build it.

    Args:
        folder: the `v1.0-*` folder.
        use_index: None decides by size, True builds one for any size, False reads JSON.

    Raises:
        DataError: an index is damaged, which its list of files does not show.
    """
    if use_index is False:
        return Tables(folder)
    place = find_index(folder)
    if place is not None:
        return IndexedTables(folder, place)
    changed = " and ".join(f"{name}.json" for name in changed_tables(folder))
    if not use_index and sum(size for size, _ in fingerprint(folder).values()) < INDEX_FROM_BYTES:
        if changed:
            log.warning(
                "%s: %s changed since the tables were indexed, so JSON is read; `distillbev prepare` indexes anew",
                folder,
                changed,
            )
        return Tables(folder)
    if changed:
        log.warning("%s: %s changed since the tables were indexed; indexing them again", folder, changed)
    try:
        return IndexedTables(folder, build_index(folder))
    except (NotIndexableError, OSError) as error:
        log.warning("%s: reading the JSON tables at every start, for there is no index: %s", folder, error)
        return Tables(folder)


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
            with _lock(place.parent / f"{_prefix(place)}.lock"):
                if not is_whole(place):
                    _build_at(folder, place)
            return place
        except OSError as error:
            refusals.append(error)
    raise refusals[0]


def _build_at(folder: Path, place: Path) -> None:
    """Builds an index; the caller holds the lock."""
    # A warning, since it takes a while and a folder appears: seen without any setting.
    log.warning("%s: indexing the tables, once; the index is kept in %s", folder, place)
    for killed in _named(place, rf"\.building-{re.escape(_prefix(place))}-[0-9]+"):
        shutil.rmtree(killed, ignore_errors=True)
    before = fingerprint(folder)
    building = place.with_name(f".building-{_prefix(place)}-{os.getpid()}")
    building.mkdir()
    try:
        write_columns(folder, building)
        files = {path.name: _facts(path) for path in building.iterdir()}
        if fingerprint(folder) != before:
            raise NotIndexableError("the tables changed while they were read")
        (building / LIST).write_bytes(msgspec.json.encode(IndexList(FORMAT, before, files)))
        for path in building.iterdir():  # a rename may reach the disk before the data does
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for old in (place, *_stale_at(place)):
            shutil.rmtree(old, ignore_errors=True)  # open maps of other processes live on
        try:
            building.rename(place)
        except OSError:
            if not is_whole(place):  # another machine, whose lock we do not see, may have been first
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _prefix(place: Path) -> str:
    """What all indices of the same version folder begin with."""
    return place.name.rsplit("-", 1)[0]


def _stale_at(place: Path) -> list[Path]:
    """Indices of the same version folder beside `place`, of other tables."""
    return [old for old in _named(place, rf"{re.escape(_prefix(place))}-[0-9a-f]{{16}}") if old != place]


def _named(place: Path, pattern: str) -> list[Path]:
    """Folders beside `place` whose whole name fits a regular expression."""
    if not place.parent.is_dir():
        return []
    return [path for path in place.parent.iterdir() if re.fullmatch(pattern, path.name)]


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
