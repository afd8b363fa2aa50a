"""Files that others wrote: read whole or refused in one line, never waited for, never beyond a bound."""

from __future__ import annotations

import re
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

import msgspec

from ..errors import DataError

LONGEST_NAME = 255  # characters
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# What msgspec raises where JSON is damaged, of another form than asked for, no UTF-8, or nested by the thousand.
NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def read_whole(path: Path, what: str, most_bytes: int, absent: str) -> bytes:
    """The content of a regular file.

    Args:
        path: symbolic links are followed: whoever owns the folder laid them.
        what: names the file in errors, as in "LiDAR file".
        most_bytes: a larger file is refused before it is read.
        absent: what to say and do where there is no such file.

    Raises:
        DataError: absent, too large, not to be read, or a folder, pipe or device.
    """
    try:
        status = path.stat()
        # Opening a pipe waits for a writer, and a device may never end.
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: no regular file, expected a {what}; copy it again")
        if status.st_size > most_bytes:
            raise DataError(
                f"{path}: {status.st_size} bytes, expected a {what} of at most {most_bytes}; copy it again"
            )
        with path.open("rb") as file:
            return file.read(status.st_size)
    except FileNotFoundError:
        raise DataError(f"{path}: no such {what}{absent}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path}: the {what} cannot be read: {reason}; mend the file or its permissions"
        ) from None


def stays_inside(filename: str) -> bool:
    """Whether a name out of a table leads to a file below the folder it is relative to, on every system."""
    windows = PureWindowsPath(filename)
    return bool(
        PurePosixPath(filename).name
        and not filename.startswith("/")
        and not (windows.drive or windows.root or ".." in windows.parts)
        and _is_clean(filename)
    )


def is_plain_name(name: str) -> bool:
    """Whether a name out of a table may become a part of a file name: no separators, nothing hidden."""
    return (
        name == PureWindowsPath(name).name
        and not name.startswith(".")
        and 0 < len(name) <= LONGEST_NAME
        and _is_clean(name)
    )


def _is_clean(text: str) -> bool:
    """No control characters, which no file needs and terminals obey."""
    return _CONTROL.search(text) is None
