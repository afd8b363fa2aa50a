"""Simulates all scenes of a world in several processes, and joins their rows to the tables of a dataset."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

from ..config import read_config, write_config
from ..data.table_writer import constant_tables, write_tables
from ..errors import ConfigError, DataError, RunError
from .settings import WorldConfig

WORLD_FILE = "world.yaml"
SHARDS = ".scenes"  # rows of finished scenes, until the tables are written


def simulate(config: WorldConfig, out: Path, processes: int | None = None, progress: bool = True) -> None:
    """Writes a simulated world as a nuScenes dataset.

    Finished scenes are kept when the work is cut off: the same call goes on. A folder that already holds this
    world, whole, is left as it is. With more than one process, call it below `if __name__ == "__main__"`.

    Args:
        config: of the world; written to `world.yaml` in the folder.
        out: folder, made if need be.
        processes: that share the scenes; one per core if not given. The files do not depend on it.
        progress: show a bar with the time left.

    Raises:
        DataError: the folder holds another world or other files.
    """
    out = Path(out)
    _claim(config, out)
    tables = out / config.version
    if tables.exists():
        return
    shards = out / SHARDS
    shards.mkdir(exist_ok=True)
    (out / "instance_masks").mkdir(exist_ok=True) if config.write_masks else None
    _simulate_scenes(config, out, processes or _cores(), progress)
    _write_tables(config, out, tables)
    shutil.rmtree(shards)


def _claim(config: WorldConfig, out: Path) -> None:
    """Makes the folder this world's own, or refuses it."""
    out.mkdir(parents=True, exist_ok=True)
    marker = out / WORLD_FILE
    if marker.exists():
        try:
            found = read_config(marker, WorldConfig)
        except ConfigError as error:
            raise DataError(f"{error}; choose another folder, or delete {out}") from None
        if found != config:
            fields = [
                name for name in config.__struct_fields__ if getattr(found, name) != getattr(config, name)
            ]
            differences = ", ".join(
                f"{name} {getattr(found, name)!r} there, {getattr(config, name)!r} asked for"
                for name in fields
            )
            raise DataError(
                f"{out} holds another world ({differences}); choose another folder, or delete that one"
            )
        return
    if any(out.iterdir()):
        raise DataError(f"{out} holds files that no simulation wrote; choose an empty or new folder")
    write_config(config, marker.with_suffix(".partial"))
    marker.with_suffix(".partial").replace(marker)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shard(out: Path, number: int) -> Path:
    return out / SHARDS / f"{number:05d}.json"


def _simulate_scenes(config: WorldConfig, out: Path, processes: int, progress: bool) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    pending = [number for number in range(config.num_scenes) if not _shard(out, number).exists()]
    columns = (
        TextColumn("simulating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("scenes, time left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("", total=config.num_scenes, completed=config.num_scenes - len(pending))
        if processes == 1 or len(pending) <= 1:
            for number in pending:
                _work(config, out, [number])
                bar.advance(task)
            return
        # Each worker has its own share of the scenes; how they are shared does not change what is written.
        context = multiprocessing.get_context("spawn")
        shares = [pending[k::processes] for k in range(processes) if pending[k::processes]]
        workers = [context.Process(target=_work, args=(config, out, share), daemon=True) for share in shares]
        for worker in workers:
            worker.start()
        try:
            while any(worker.is_alive() for worker in workers):
                failed = [worker for worker in workers if worker.exitcode not in (None, 0)]
                if failed:
                    break
                done = sum(_shard(out, number).exists() for number in range(config.num_scenes))
                bar.update(task, completed=done)
                time.sleep(0.1)
        finally:
            for worker in workers:
                if worker.is_alive() and any(other.exitcode not in (None, 0) for other in workers):
                    worker.terminate()
        for worker in workers:
            worker.join()
        bar.update(task, completed=sum(_shard(out, number).exists() for number in range(config.num_scenes)))
    missing = [number for number in pending if not _shard(out, number).exists()]
    if missing:
        raise RunError(
            f"{len(missing)} of {config.num_scenes} scenes were not simulated (a worker process ended early; "
            "its message stands above); run the same command again to go on"
        )


def _work(config: WorldConfig, out: Path, numbers: list[int]) -> None:
    """Simulates scenes one after the other; stops when the process that asked for them is gone."""
    from .scenes import write_scene

    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells the user, and takes its workers along
    for number in numbers:
        if parent is not None and not parent.is_alive():
            return
        write_scene(config, number, out, _shard(out, number))


def _write_tables(config: WorldConfig, out: Path, tables: Path) -> None:
    """Joins the scenes' rows; the folder of tables is the last thing written."""
    from .rig import rig
    from .scenes import scene_name

    splits, first = {}, 0
    for split in config.splits:
        splits[split.name] = [scene_name(number) for number in range(first, first + split.scenes)]
        first += split.scenes
    (out / "splits.json").write_text(json.dumps(splits, indent=1))
    constant = constant_tables(
        {sensor.channel: "lidar" if sensor.intrinsic is None else "camera" for sensor in rig(config)}
    )
    shards = (json.loads(_shard(out, number).read_text()) for number in range(config.num_scenes))
    write_tables(tables, constant, shards)
