"""How fast a world is simulated: CPU seconds per key frame in one process, key frames per second with all cores.

Run: OMP_NUM_THREADS=1 python benchmarks/world.py [--size 352x198] [--scenes 6] [--key-frames 8] [--processes 2]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from pathlib import Path

from distillbev.world import SplitConfig, WorldConfig, simulate

PARTS = {
    "rays: what they hit": ("casting.py", "cast"),
    "rays: shadows": ("casting.py", "blocked"),
    "light and surfaces": ("shading.py", "radiance"),
    "whole pictures": ("cameras.py", "take_picture"),
    "noise and exposure": ("cameras.py", "develop"),
    "whole LiDAR sweeps": ("lidar.py", "take_sweep"),
    "visibility": ("visibility.py", "visible_pixels"),
    "writing image files": ("Image.py", "save"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="352x198", help="WIDTHxHEIGHT of the images")
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--key-frames", type=int, default=8)
    parser.add_argument("--sweeps", type=int, default=0, help="LiDAR sweeps before each key frame")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    config = WorldConfig(
        splits=(SplitConfig(name="train", scenes=arguments.scenes),),
        key_frames_per_scene=arguments.key_frames,
        image_size_px=(width, height),
        lidar_sweeps=arguments.sweeps,
    )
    frames = config.num_scenes * config.key_frames_per_scene
    with tempfile.TemporaryDirectory() as folder:
        start, start_cpu = time.perf_counter(), time.process_time()
        simulate(config, Path(folder) / "one", processes=1, progress=False)
        wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        print(
            f"{width}x{height}, 1 process: {cpu / frames:.3f} CPU s, {wall / frames:.3f} s per key frame "
            f"({frames} key frames)\n"
        )
        start = time.perf_counter()
        simulate(config, Path(folder) / "several", processes=arguments.processes, progress=False)
        wall = time.perf_counter() - start
        print(
            f"{width}x{height}, {arguments.processes} processes: {frames / wall:.2f} key frames per second, "
            "start-up included\n"
        )
        print("Where the time of one process goes; parts lie inside one another.\n")
        print("| part | share |\n|---|---|")
        profile = cProfile.Profile()
        profile.runcall(simulate, config, Path(folder) / "profiled", processes=1, progress=False)
        for part, share in shares(profile).items():
            print(f"| {part} | {share:.0%} |")


def shares(profile: cProfile.Profile) -> dict[str, float]:
    """Of the whole time, what was spent in the parts and what they call."""
    stats = pstats.Stats(profile)
    seconds = {
        (Path(file).name, function): row[3]
        for (file, _, function), row in stats.stats.items()  # pyright: ignore
    }
    return {part: seconds.get(place, 0.0) / stats.total_tt for part, place in PARTS.items()}  # pyright: ignore


if __name__ == "__main__":
    main()
