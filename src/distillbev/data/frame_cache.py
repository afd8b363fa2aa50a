"""Decoded images and accumulated sweeps on disk, for those who have more disk than processor.

An entry is named by a hash of all that it depends on: name, size and time of change of its source files, and the
settings it was made with. What is stale is therefore not found, and what is found equals what would be made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from ..config import Config
from ..errors import ConfigError

log = logging.getLogger(__name__)

CACHE_VERSION = 1
COUNT_FILE = "bytes"


class FrameCacheConfig(Config, frozen=True):
    """What is kept below `folder` (relative to the dataset's root, or absolute), up to `max_gib` in all.

    Once full, it takes in nothing more and drops nothing: frames return in rounds, so dropping old ones would drop
    each just before it is needed. It may be deleted at any time. `images` are kept as decoded where training varies
    them and as the network sees them where not; `sweeps` are joined, before augmentation.
    """

    folder: str = "frame_cache"
    max_gib: float = 100.0
    images: bool = True
    sweeps: bool = True

    def __post_init__(self) -> None:
        if not self.max_gib > 0:
            raise ConfigError(
                f"max_gib={self.max_gib} holds nothing; choose a positive size, or frame_cache=null"
            )
        if not (self.images or self.sweeps):
            raise ConfigError("a frame_cache of neither images nor sweeps; choose one, or frame_cache=null")


def pack(array: NDArray[Any]) -> bytes:
    """A line of JSON with type and shape, the values, a checksum of both."""
    head = json.dumps({"dtype": array.dtype.str, "shape": array.shape}).encode() + b"\n"
    content = head + array.tobytes()
    return content + zlib.crc32(content).to_bytes(4, "little")


def unpack(content: bytes) -> NDArray[Any] | None:
    """The array (not to be written to), or None if the content is not what was packed."""
    if zlib.crc32(memoryview(content)[:-4]) != int.from_bytes(content[-4:], "little"):
        return None
    start = content.find(b"\n") + 1
    if start == 0:
        return None  # nothing at all has the right checksum, too
    head = json.loads(content[:start])
    return np.frombuffer(memoryview(content)[start:-4], np.dtype(head["dtype"])).reshape(head["shape"])


def cached(
    cache: FrameCache | None,
    sources: Sequence[Path],
    settings: tuple[Any, ...],
    make: Callable[[], NDArray[Any]],
) -> NDArray[Any]:
    """As `FrameCache.array` where there is a cache."""
    return make() if cache is None else cache.array(sources, settings, make)


class FrameCache:
    """Arrays below `root / config.folder`; processes may share it.

    Nothing here fails a run: what cannot be read is made again, what cannot be written is not kept, and both
    a full and an unwritable cache are told once.
    """

    def __init__(self, root: Path, config: FrameCacheConfig) -> None:
        self.root = root
        self.folder = root / config.folder
        self.max_bytes = int(config.max_gib * 2**30)
        self.accepts = True

    def array(
        self, sources: Sequence[Path], settings: tuple[Any, ...], make: Callable[[], NDArray[Any]]
    ) -> NDArray[Any]:
        """What `make` gives, or gave earlier for the same source files and settings."""
        name = self._name(sources, settings)
        kept = self._read(name) if name else None
        if kept is not None:
            return kept
        array = make()
        if name and self.accepts:
            self._write(name, array)
        return array

    def _name(self, sources: Sequence[Path], settings: tuple[Any, ...]) -> str | None:
        """A hash of all that the entry depends on; None if a source is not there."""
        digest = hashlib.blake2b(repr((CACHE_VERSION, PIL.__version__, settings)).encode(), digest_size=16)
        for source in sources:
            try:
                status = source.stat()
            except (OSError, ValueError):
                return None
            name = os.path.relpath(source, self.root)  # a dataset may move
            digest.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
        return digest.hexdigest()

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name[2:]}.array"

    def _read(self, name: str) -> NDArray[Any] | None:
        try:
            return unpack(self._path(name).read_bytes())
        except OSError:
            return None

    def _write(self, name: str, array: NDArray[Any]) -> None:
        path = self._path(name)
        content = pack(array)
        part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._reserve(len(content)):
                self._stop(f"holds {self.max_bytes / 2**30:.3g} GiB, as many as it may")
                return
            part.write_bytes(content)
            part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            self._stop(f"cannot be written: {error.strerror}")

    def _reserve(self, num_bytes: int) -> bool:
        """Counts the bytes in, for all processes together, if there is room for them."""
        with os.fdopen(os.open(self.folder / COUNT_FILE, os.O_RDWR | os.O_CREAT), "r+b", buffering=0) as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            except (ImportError, OSError):
                pass  # no locks here: each process may then overrun the bound by one entry
            digits = file.read()
            used = int(digits) if digits.isdigit() else self._count()
            if used + num_bytes > self.max_bytes:
                return False
            file.seek(0)
            file.write(b"%020d" % (used + num_bytes))  # always as long, so that it is never half written
        return True

    def _count(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*.array"))

    def _stop(self, reason: str) -> None:
        self.accepts = False
        log.warning("frame cache %s %s; the frames that it lacks are made each time", self.folder, reason)
