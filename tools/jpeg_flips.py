"""Flips one bit in each of many JPEGs and counts who notices: `.venv/bin/python tools/jpeg_flips.py > jpeg_flips.md`.

The images are a simulated world's, 160x90; image, byte and bit are drawn anew each time, seed 0.
"""

import argparse
import collections
import tempfile
from pathlib import Path

import numpy as np

from distillbev.data.images import has_hidden_damage, load_image
from distillbev.data.samples import NuScenes
from distillbev.errors import DataError
from distillbev.world import SplitConfig, WorldConfig, simulate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    counts = collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "world"
        config = WorldConfig(
            splits=(SplitConfig(name="train", scenes=1),), key_frames_per_scene=4, image_size_px=(160, 90)
        )
        simulate(config, root, progress=False)
        nuscenes = NuScenes(root)
        cameras = [c for token in nuscenes.sample_tokens() for c in nuscenes.sample(token).cameras]
        sound = [(camera.path.read_bytes(), np.asarray(load_image(camera).image)) for camera in cameras]
        for _ in range(arguments.count):
            number = int(rng.integers(len(cameras)))
            camera, (content, pixels) = cameras[number], sound[number]
            flipped = bytearray(content)
            flipped[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
            camera.path.write_bytes(bytes(flipped))
            try:
                same = np.array_equal(np.asarray(load_image(camera).image), pixels)
            except DataError:
                counts["refused when read"] += 1
            else:
                told = has_hidden_damage(camera.path)
                counts["the same pixels" if same else "told by --check" if told else "silent"] += 1
            camera.path.write_bytes(content)
    print("| one bit flipped | images |\n|---|---|")
    for outcome in ("refused when read", "the same pixels", "told by --check", "silent"):
        print(f"| {outcome} | {counts[outcome]:,} |")


if __name__ == "__main__":
    main()
