"""Times the index of the tables against nuscenes-devkit's loading, on tables of any size without sensor files.

    python benchmarks/index.py --scenes 85           # a tenth of trainval
    python benchmarks/index.py --scenes 850          # trainval: 2 GB of JSON, deleted afterwards; needs 16 GB

Tables about as in nuScenes: 40 key frames a scene, 3,080 recordings and ego poses, 1,360 annotations.
Each measurement runs in a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from distillbev.data.index import build_index
from distillbev.data.samples import NuScenes

KEY_FRAMES = 40
CAMERAS = ("FRONT", "FRONT_RIGHT", "BACK_RIGHT", "BACK", "BACK_LEFT", "FRONT_LEFT")
RADARS = ("FRONT", "FRONT_LEFT", "FRONT_RIGHT", "BACK_LEFT", "BACK_RIGHT")
# Recordings between two key frames, the key frame counted in.
STEPS = (
    {"LIDAR_TOP": 10}
    | {f"CAM_{name}": 6 for name in CAMERAS}
    | {f"RADAR_{name}": 6 for name in RADARS}
    | {"RADAR_FRONT": 7}
)
ANNOTATIONS_PER_FRAME = 34  # each instance is seen in every frame of its scene
POSE = '"rotation":[0.5720320396,-0.0016977771,0.0117983028,-0.8201446642],"translation":[411.3039063,1180.8903791,0.0]'


def token(*parts: object) -> str:
    return hashlib.md5(repr(parts).encode(), usedforsecurity=False).hexdigest()


def write_tables(root: Path, num_scenes: int) -> None:
    """Writes `v1.0-trainval` below `root`, a table at a time, as streams."""
    folder = root / "v1.0-trainval"
    folder.mkdir(parents=True)
    files = {}

    def row(table: str, fields: str) -> None:
        if table not in files:
            files[table] = (folder / f"{table}.json").open("w")
            files[table].write("[\n{" + fields + "}")
        else:
            files[table].write(",\n{" + fields + "}")

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
        samples = [token(scene, key) for key in range(KEY_FRAMES)] + [""]
        row(
            "scene",
            f'"token":"{token("scene", scene)}","name":"scene-{scene:04d}","description":"",'
            f'"log_token":"{token("log")}","nbr_samples":{KEY_FRAMES},"first_sample_token":"{samples[0]}",'
            f'"last_sample_token":"{samples[-2]}"',
        )
        for key in range(KEY_FRAMES):
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
                f'"token":"{calibration}","sensor_token":"{token(channel)}",{POSE},"camera_intrinsic":{matrix}',
            )
            tokens = [token(scene, channel, i) for i in range(KEY_FRAMES * steps)] + [""]
            for i in range(KEY_FRAMES * steps):
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
        for number in range(ANNOTATIONS_PER_FRAME):
            instance = token("instance", scene, number)
            boxes = [token("box", scene, number, key) for key in range(KEY_FRAMES)] + [""]
            row(
                "instance",
                f'"token":"{instance}","category_token":"{token("category")}","nbr_annotations":{KEY_FRAMES},'
                f'"first_annotation_token":"{boxes[0]}","last_annotation_token":"{boxes[-2]}"',
            )
            for key in range(KEY_FRAMES):
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


def open_and_read(root: Path) -> None:
    NuScenes(root).sample_tokens()


def own_memory_mb() -> float:
    """What this process alone holds, shared pages left out."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


def worker(root: Path, barrier: object, answers: object) -> None:
    nuscenes = NuScenes(root)
    tokens = nuscenes.sample_tokens()
    for sample in tokens[os.getpid() % 7 :: max(len(tokens) // 300, 1)]:
        nuscenes.sample(sample, 9)
    barrier.wait()  # type: ignore[attr-defined]
    answers.put(own_memory_mb())  # type: ignore[attr-defined]
    barrier.wait()  # type: ignore[attr-defined]


def measured(name: str, function: Callable[[Path], object], root: Path) -> None:
    """Runs in a fresh process; prints its time and peak memory (private and mapped pages together)."""

    def run(answers: object) -> None:
        start = time.perf_counter()
        function(root)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        answers.put((seconds, peak))  # type: ignore[attr-defined]

    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    process = fork.Process(target=run, args=(answers,))
    process.start()
    process.join()
    seconds, peak_gb = answers.get() if process.exitcode == 0 else (float("nan"), float("nan"))
    print(f"{name:<34} {seconds:8.2f} s   peak {peak_gb:6.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=85)
    parser.add_argument("--no-devkit", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_tables(root, arguments.scenes)
        size = sum(path.stat().st_size for path in (root / "v1.0-trainval").iterdir())
        print(f"{arguments.scenes} scenes, {size / 1e6:.0f} MB of JSON")
        measured("build the index", lambda root: build_index(root / "v1.0-trainval"), root)
        measured("open with index, list key frames", open_and_read, root)
        fork = multiprocessing.get_context("fork")
        barrier, answers = fork.Barrier(8), fork.SimpleQueue()
        workers = [fork.Process(target=worker, args=(root, barrier, answers)) for _ in range(8)]
        for process in workers:
            process.start()
        for process in workers:
            process.join()
        print(f"8 workers, own memory each: {max(answers.get() for _ in workers):.0f} MB at most")
        if not arguments.no_devkit:
            measured("nuscenes-devkit, load", devkit, root)


if __name__ == "__main__":
    main()
