"""Times the index of the tables against nuscenes-devkit's loading, on tables of any size without sensor files.

    python benchmarks/index.py --scenes 85           # a tenth of trainval
    python benchmarks/index.py --scenes 850          # trainval: 2.6 GB of JSON, deleted afterwards; needs 16 GB

850 scenes are as many rows as v1.0-trainval has: 34,149 key frames, 2.63 M recordings and ego poses, 1.17 M
annotations. Each measurement runs in a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distillbev.data.index import FOLDER, build_index
from distillbev.data.samples import NuScenes

CAMERAS = ("FRONT", "FRONT_RIGHT", "BACK_RIGHT", "BACK", "BACK_LEFT", "FRONT_LEFT")
RADARS = ("FRONT", "FRONT_LEFT", "FRONT_RIGHT", "BACK_LEFT", "BACK_RIGHT")
# Recordings between two key frames, the key frame counted in.
STEPS = (
    {"LIDAR_TOP": 10}
    | {f"CAM_{name}": 6 for name in CAMERAS}
    | {f"RADAR_{name}": 6 for name in RADARS}
    | {"RADAR_FRONT": 7}
)
POSE = (
    '"rotation":[\n0.5720320396729045,\n-0.0016977771610471074,\n0.011798001930183783,\n-0.8201446642457809\n],'
    '"translation":[\n411.3039349319818,\n1180.8903791765097,\n0.0\n]'
)
PLACE_ON_CAR = '"rotation":[\n0.5,\n-0.5,\n0.5,\n-0.5\n],"translation":[\n1.722,\n0.005,\n1.495\n]'


def token(*parts: object) -> str:
    return hashlib.md5(repr(parts).encode(), usedforsecurity=False).hexdigest()


def write_tables(root: Path, num_scenes: int) -> None:
    """Writes `v1.0-trainval` below `root`, a table at a time, as streams."""
    folder = root / "v1.0-trainval"
    folder.mkdir(parents=True)
    (root / "m.png").touch()  # the devkit wants a map to be there
    files = {}

    def row(table: str, fields: str) -> None:
        start = "[\n" if table not in files else ",\n"
        if table not in files:
            files[table] = (folder / f"{table}.json").open("w")
        # Spaced as the tables of nuScenes are.
        files[table].write(start + "{\n" + fields.replace(',"', ',\n"').replace('":', '": ') + "\n}")

    row("category", f'"token":"{token("category")}","name":"vehicle.car","description":""')
    row("attribute", f'"token":"{token("attribute")}","name":"vehicle.moving","description":""')
    row("visibility", '"token":"4","level":"v80-100","description":""')
    row(
        "log",
        f'"token":"{token("log")}","logfile":"l","vehicle":"v","date_captured":"d","location":"boston-seaport"',
    )
    row("map", f'"token":"{token("map")}","category":"c","filename":"m.png","log_tokens":["{token("log")}"]')
    for channel in STEPS:
        modality = {"L": "lidar", "C": "camera", "R": "radar"}[channel[0]]
        row("sensor", f'"token":"{token(channel)}","channel":"{channel}","modality":"{modality}"')
    for scene in range(num_scenes):
        num_keys = 41 if scene * 149 % 850 < 149 else 40  # 34,149 in 850 scenes
        num_objects = 35 if scene % 7 == 0 else 34  # each is seen in every frame of its scene
        samples = [token(scene, key) for key in range(num_keys)] + [""]
        row(
            "scene",
            f'"token":"{token("scene", scene)}","name":"scene-{scene:04d}","description":"",'
            f'"log_token":"{token("log")}","nbr_samples":{num_keys},"first_sample_token":"{samples[0]}",'
            f'"last_sample_token":"{samples[-2]}"',
        )
        for key in range(num_keys):
            row(
                "sample",
                f'"token":"{samples[key]}","timestamp":{10**15 + scene * 10**8 + key * 500_000},'
                f'"prev":"{samples[key - 1]}","next":"{samples[key + 1]}","scene_token":"{token("scene", scene)}"',
            )
        for channel, steps in STEPS.items():
            calibration = token("calibration", scene, channel)
            matrix = "[[1266.4,0.0,816.3],[0.0,1266.4,491.5],[0.0,0.0,1.0]]" if channel[0] == "C" else "[]"
            row(
                "calibrated_sensor",
                f'"token":"{calibration}","sensor_token":"{token(channel)}",{PLACE_ON_CAR},"camera_intrinsic":{matrix}',
            )
            tokens = [token(scene, channel, i) for i in range(num_keys * steps)] + [""]
            for i in range(num_keys * steps):
                time_us = 10**15 + scene * 10**8 + i * 500_000 // steps
                is_key = i % steps == 0
                size = '"height":900,"width":1600' if channel[0] == "C" else '"height":0,"width":0'
                name = f"{'samples' if is_key else 'sweeps'}/{channel}/n015-2018-07-18-11-07+0800__{channel}__{time_us}"
                row(
                    "sample_data",
                    f'"token":"{tokens[i]}","sample_token":"{samples[i // steps]}","ego_pose_token":"{tokens[i]}",'
                    f'"calibrated_sensor_token":"{calibration}","timestamp":{time_us},"fileformat":"jpg",'
                    f'"is_key_frame":{"true" if is_key else "false"},{size},"filename":"{name}.jpg",'
                    f'"prev":"{tokens[i - 1]}","next":"{tokens[i + 1]}"',
                )
                row("ego_pose", f'"token":"{tokens[i]}","timestamp":{time_us},{POSE}')
        for number in range(num_objects):
            instance = token("instance", scene, number)
            boxes = [token("box", scene, number, key) for key in range(num_keys)] + [""]
            row(
                "instance",
                f'"token":"{instance}","category_token":"{token("category")}","nbr_annotations":{num_keys},'
                f'"first_annotation_token":"{boxes[0]}","last_annotation_token":"{boxes[-2]}"',
            )
            for key in range(num_keys):
                row(
                    "sample_annotation",
                    f'"token":"{boxes[key]}","sample_token":"{samples[key]}","instance_token":"{instance}",'
                    f'"visibility_token":"4","attribute_tokens":["{token("attribute")}"],{POSE},'
                    f'"size":[1.9,4.5,1.6],"prev":"{boxes[key - 1]}","next":"{boxes[key + 1]}",'
                    '"num_lidar_pts":5,"num_radar_pts":1',
                )
    for file in files.values():
        file.write("\n]")
        file.close()


def devkit(root: Path) -> None:
    from nuscenes.nuscenes import NuScenes as Devkit

    Devkit("v1.0-trainval", str(root), verbose=False)


def by_index(root: Path) -> None:
    NuScenes(root).sample_tokens()


def by_json(root: Path) -> None:
    nuscenes = NuScenes(root, use_index=False)
    nuscenes.sample(nuscenes.sample_tokens()[0], 9)


def memory_mb(field: str) -> float:
    """Of this process: "Private_Dirty" what it made for itself, "Pss" with its share of pages of files and others."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3


def worker(root: Path, number: int, barrier: Any, answers: Any) -> None:
    """Reads samples all over the dataset, then measures while the other workers still hold theirs."""
    gc.collect()  # which writes to the pages inherited from the parent, and so makes them this process's own
    before = memory_mb("Private_Dirty:")
    nuscenes = NuScenes(root)
    tokens = nuscenes.sample_tokens()
    chosen = tokens[number :: max(len(tokens) // 500, 1)]
    start = time.perf_counter()
    for sample in chosen:
        nuscenes.sample(sample, 9)
    seconds = (time.perf_counter() - start) / len(chosen)
    barrier.wait()
    answers.put((memory_mb("Private_Dirty:") - before, memory_mb("Pss:"), seconds))
    barrier.wait()


def measure_workers(root: Path, num_workers: int = 8) -> None:
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(num_workers), fork.SimpleQueue()
    workers = [fork.Process(target=worker, args=(root, i, barrier, answers)) for i in range(num_workers)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    own, shared, seconds = zip(*(answers.get() for _ in workers), strict=True)
    print(
        f"{num_workers} workers: {max(own):.0f} MB of its own each at most, {sum(shared):.0f} MB (PSS) all "
        f"together; {1e3 * min(seconds):.1f} ms per sample with 9 sweeps"
    )


def measure(name: str, function: Callable[[Path], object], root: Path) -> None:
    """Runs in a fresh process; prints its time and peak memory, with that of its own second process."""

    def run(answers: Any) -> None:
        start = time.perf_counter()
        function(root)
        seconds = time.perf_counter() - start
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu = sum(usage.ru_utime + usage.ru_stime for usage in used)
        answers.put((seconds, cpu, sum(usage.ru_maxrss for usage in used) / 1e6))

    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    process = fork.Process(target=run, args=(answers,))
    process.start()
    process.join()
    seconds, cpu, peak_gb = answers.get() if process.exitcode == 0 else [float("nan")] * 3
    print(f"{name:<34} {seconds:8.2f} s   CPU {cpu:7.2f} s   peak {peak_gb:6.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=85)
    parser.add_argument("--no-devkit", action="store_true")
    parser.add_argument("--keep", type=Path, help="Write the tables here and leave them, or use those there.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary)
        folder = root / "v1.0-trainval"
        if not folder.is_dir():
            write_tables(root, arguments.scenes)
        shutil.rmtree(root / FOLDER, ignore_errors=True)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{arguments.scenes} scenes, {size / 1e6:.0f} MB of JSON, {os.cpu_count()} cores", flush=True)
        measure("build the index", lambda _: build_index(folder), root)
        place = build_index(folder)
        print(f"the index: {sum(path.stat().st_size for path in place.iterdir()) / 1e6:.0f} MB")
        measure("open by index, list key frames", by_index, root)
        measure_workers(root)
        measure("open by JSON, one sample", by_json, root)
        if not arguments.no_devkit:
            measure("nuscenes-devkit, load", devkit, root)


if __name__ == "__main__":
    main()
