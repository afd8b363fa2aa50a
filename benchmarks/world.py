"""How fast a world is simulated: CPU seconds per key frame in one process, key frames per second with all cores.

Run: OMP_NUM_THREADS=1 python benchmarks/world.py [--size 352x198] [--scenes 6] [--key-frames 8] [--processes 2]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from distillbev.world import SplitConfig, WorldConfig, simulate


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
            f"({frames} key frames)"
        )
        start = time.perf_counter()
        simulate(config, Path(folder) / "several", processes=arguments.processes, progress=False)
        wall = time.perf_counter() - start
        print(
            f"{width}x{height}, {arguments.processes} processes: {frames / wall:.2f} key frames per second, "
            "start-up included"
        )


if __name__ == "__main__":
    main()
