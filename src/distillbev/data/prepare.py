"""What `distillbev prepare` does before training: the index of the tables, and a line about it."""

from __future__ import annotations

import time
from pathlib import Path

from ..errors import DataError
from .index import build_index, changed_tables, find_index, index_folders
from .table_columns import NotIndexableError
from .tables import find_version_folder


def prepare(root: Path, version: str | None = None) -> str:
    """Indexes the tables of a dataset, unless that has been done; returns a line that tells what was done.

    Raises:
        DataError: the tables are faulty, or there is no place to write to.
    """
    folder = find_version_folder(root, version)
    there, changed = find_index(folder), changed_tables(folder)
    start = time.perf_counter()
    try:
        place = build_index(folder)
    except NotIndexableError as error:
        raise DataError(
            f"{folder}: no index, for {error}; `distillbev prepare {root} --check` lists what is wrong"
        ) from None
    except OSError as error:
        raise DataError(
            f"{folder}: no index, for neither {' nor '.join(str(place.parent) for place in index_folders(folder))} "
            f"can be written: {error}; make room there, or set XDG_CACHE_HOME to another place"
        ) from None
    size_mb = sum(path.stat().st_size for path in place.iterdir()) / 1e6
    told = f"built in {time.perf_counter() - start:.1f} s" if there is None else "up to date"
    if there is None and changed:
        told += f", for {' and '.join(f'{name}.json' for name in changed)} changed"
    return f"{place}: {told}, {size_mb:.1f} MB"
