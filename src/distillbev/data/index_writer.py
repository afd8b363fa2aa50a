"""Writes the big JSON tables as columns in .npy files, one file per column, with links as row numbers.

Only a copy of what `tables.py` reads, row for row: faulty tables (broken links, tokens that occur twice) are
refused, so that their errors are always told by the JSON path.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .table_columns import LAYOUTS, Columns, NotIndexableError, read_columns
from .tables import MAX_VELOCITY_GAP_S
from .token_keys import TokenOrder

# The biggest table goes to a second process, unless the start of one (0.2 s) would be longer than the work.
SECOND_PROCESS_FROM_BYTES = 32 * 2**20


def write_columns(folder: Path, place: Path) -> None:
    """Writes the columns of all indexed tables of a version folder into the folder `place`.

    Raises:
        NotIndexableError: a table is absent or faulty.
        OSError: no room, or no right to write.
    """
    with _written_beside(folder, place, "sample_data"):
        for name in LAYOUTS:
            if name != "sample_data":
                _write_table(folder, place, name)
    for name in LAYOUTS:
        _link_table(place, name)


@contextlib.contextmanager
def _written_beside(folder: Path, place: Path, name: str) -> Iterator[None]:
    """Writes a table in a second process while the body runs; in this one where that fails, to hear its error."""
    path = folder / f"{name}.json"
    process = None
    if path.is_file() and path.stat().st_size >= SECOND_PROCESS_FROM_BYTES:
        command = [sys.executable, "-P", "-m", __name__, str(folder), str(place), name]
        quiet = subprocess.DEVNULL
        with contextlib.suppress(OSError):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)
    try:
        yield
        if process is None or process.wait() != 0:
            _write_table(folder, place, name)
    finally:
        if process is not None:
            process.kill()
            process.communicate()  # closes its input


def _write_table(folder: Path, place: Path, name: str) -> None:
    """Writes the columns of one table; its links to other tables are texts until `_link_table`."""
    layout = LAYOUTS[name]
    columns = read_columns(folder / f"{name}.json", layout)
    tokens = TokenOrder.of(columns["token"])
    repeated = tokens.repeated()
    if repeated:
        raise NotIndexableError(
            f"{name}.json has {len(repeated)} tokens more than once, such as {repeated[0]!r}"
        )
    for column, target in layout.links.items():
        if target == name:
            columns[column] = _followed(columns[column], tokens, f"{name}.{column}", may_be_empty=True)
    _save(place, name, columns | {"order": tokens.order, "sorted_keys": tokens.sorted_keys})


def _link_table(place: Path, name: str) -> None:
    """Turns the links of a table to others into row numbers, and lists its rows sample by sample."""

    def column(table: str, name: str) -> NDArray[Any]:
        return np.load(place / f"{table}.{name}.npy", allow_pickle=False)

    for link, target in LAYOUTS[name].links.items():
        if target == name:
            continue
        tokens = TokenOrder(*(column(target, part) for part in ("token", "order", "sorted_keys")))
        rows = _followed(column(name, link), tokens, f"{name}.{link}_token", may_be_empty=False)
        columns = {link: rows}
        if target == "sample":
            chosen = column(name, "is_key_frame") if name == "sample_data" else None
            columns |= _grouped(rows, len(tokens.tokens), chosen)
        _save(place, name, columns)
    if name == "sample_annotation":
        parts = ("sample", "instance", "prev", "next", "translation")
        times = column("sample", "timestamp")
        velocities = _velocities(times, *(column(name, part) for part in parts))
        _save(place, name, {"velocity": velocities})


def _velocities(
    timestamps_us: NDArray[np.int64],
    sample: NDArray[np.int32],
    instance: NDArray[np.int32],
    prev: NDArray[np.int32],
    next: NDArray[np.int32],
    translation: NDArray[np.float64],
) -> NDArray[np.float64]:
    """`Tables.velocities_of_sample` of all annotations at once, (n, 2); its readable twin is there."""
    itself = np.arange(len(sample), dtype=np.int32)
    first, last = np.where(prev < 0, itself, prev), np.where(next < 0, itself, next)
    times = timestamps_us[sample]
    seconds = 1e-6 * (times[last] - times[first])
    wrong = ((prev >= 0) & (times[first] >= times)) | ((next >= 0) & (times[last] <= times))
    wrong |= (instance[first] != instance) | (instance[last] != instance)
    if wrong.any():
        raise NotIndexableError(
            f"prev or next of {int(wrong.sum())} annotations leads to a wrong time or instance"
        )
    longest = np.where((first != itself) & (last != itself), 2 * MAX_VELOCITY_GAP_S, MAX_VELOCITY_GAP_S)
    defined = (seconds > 0) & (seconds <= longest)
    way_m = translation[last, :2] - translation[first, :2]
    return np.where(defined[:, None], way_m / np.where(defined, seconds, 1)[:, None], np.nan)


def _save(place: Path, table: str, columns: Columns) -> None:
    for name, column in columns.items():
        column = np.ascontiguousarray(column)
        with (place / f"{table}.{name}.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(column))
            file.write(column.data)  # np.save loses the end on a full disk, and says nothing


def _followed(
    links: NDArray[np.bytes_], tokens: TokenOrder, field: str, may_be_empty: bool
) -> NDArray[np.int32]:
    """Row numbers of the tokens that a column links to, -1 where it is empty."""
    rows = tokens.rows_of(links)
    broken = (rows < 0) & (links != b"") if may_be_empty else rows < 0
    if broken.any():
        lost = links[np.argmax(broken)].decode()
        raise NotIndexableError(f"{field} {lost!r} leads nowhere, as do {int(broken.sum()) - 1} more")
    return rows


def _grouped(owners: NDArray[Any], num_owners: int, chosen: NDArray[np.bool_] | None) -> Columns:
    """Rows by owner, in the order of the table within each."""
    rows = np.arange(len(owners)) if chosen is None else np.flatnonzero(chosen)
    order = np.argsort(owners[rows], kind="stable")
    counts = np.bincount(owners[rows], minlength=num_owners)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return {"grouped": rows[order].astype(np.int32), "group_starts": starts}


def _end_with_parent() -> None:
    sys.stdin.read()  # returns when the other end closes, however the parent died
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _write_table(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
