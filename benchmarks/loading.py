"""Times the loading of six-camera samples, 704x256 from JPEGs of 1600x900, beside the straightforward way.

    python benchmarks/loading.py                  # two worker processes, a minute
    python benchmarks/loading.py --no-train       # without the training steps at the end

On a busy machine the processor time (all processes, the start of the workers included) says more than the rate.

The straightforward way is that of the devkit's tutorials and of most code bases: devkit tables, Pillow decodes in full
and resizes the whole image, crop, mirror, turn, normalise to float32. The images are made here: noise with the
spectrum of photographs, 100 to 200 kB each, on the frames of a simulated drive.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from distillbev.data import images
from distillbev.data.augment import BevAugConfig, ImageAugConfig
from distillbev.data.frame_cache import FrameCacheConfig
from distillbev.data.frames import FrameDataset, frames_of_tokens
from distillbev.data.loader import make_loader
from distillbev.data.samples import NuScenes
from distillbev.data.settings import DataConfig
from distillbev.recipes import tiny_bevdet
from distillbev.train.loop import train
from distillbev.world import SplitConfig, WorldConfig, simulate

SOURCE_WH, NETWORK_WH = (1600, 900), (704, 256)
KEY_FRAMES = 8
TEST = DataConfig(image_size_px=NETWORK_WH, load_points=False)
TRAIN = msgspec.structs.replace(TEST, image_aug=ImageAugConfig())
SWEEPS = DataConfig(load_images=False, num_sweeps=9, bev_aug=BevAugConfig())
MEAN, STANDARD_DEVIATION = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
BATCH = 2
Way = tuple[
    Callable[[int], object], Iterable[object]
]  # loads one sample; and the batches of worker processes


def photo(seed: int) -> Image.Image:
    """Colour noise with the falling spectrum of photographs: large shapes, edges and grain."""
    rng = np.random.default_rng(seed)
    width, height = SOURCE_WH
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1

    def noise(slope: float) -> np.ndarray:
        spectrum = rng.normal(size=(2, *frequency.shape)) / frequency**slope
        field = np.fft.irfft2(spectrum[0] + 1j * spectrum[1], s=(height, width))
        return field / field.std()

    brightness = 110 + 45 * noise(1.5)
    shades = np.stack([brightness + 15 * noise(1.8) for _ in range(3)], axis=-1)
    return Image.fromarray(np.clip(shades, 0, 255).astype(np.uint8))


def write_dataset(root: Path) -> None:
    """A simulated drive whose small images are replaced by large ones; the tables are told."""
    world = WorldConfig(
        splits=(SplitConfig(name="train", scenes=1),),
        key_frames_per_scene=KEY_FRAMES,
        image_size_px=(64, 36),
        write_masks=False,
    )
    simulate(world, root, processes=1, progress=False)
    photos = [photo(seed) for seed in range(6)]
    sizes = []
    for number, path in enumerate(sorted((root / "samples").rglob("*.jpg"))):
        photos[number % len(photos)].save(path, quality=80)
        sizes.append(path.stat().st_size / 1e3)
    for table, factor in (("sample_data", None), ("calibrated_sensor", SOURCE_WH[0] / 64)):
        path = root / world.version / f"{table}.json"
        rows = json.loads(path.read_text())
        for row in rows:
            if factor is None and row["width"]:
                row |= {"width": SOURCE_WH[0], "height": SOURCE_WH[1]}
            elif factor and row["camera_intrinsic"]:
                matrix = np.array(row["camera_intrinsic"]) * [[factor], [factor], [1]]
                row["camera_intrinsic"] = matrix.tolist()
        path.write_text(json.dumps(rows))
    print(f"{len(sizes)} images of {min(sizes):.0f} to {max(sizes):.0f} kB")


class Straightforward(Dataset[torch.Tensor]):
    """Six normalised images, or ten sweeps, per sample, as code that grew out of the devkit's tutorial loads them."""

    def __init__(self, root: Path, samples: int, augment: bool, sweeps: bool) -> None:
        from nuscenes.nuscenes import NuScenes as Devkit

        self.devkit = Devkit("v1.0-sim", str(root), verbose=False)
        self.samples, self.augment, self.sweeps = samples, augment, sweeps

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        sample = self.devkit.sample[index % KEY_FRAMES]
        return self.points(sample) if self.sweeps else self.images(sample, np.random.default_rng(index))

    def points(self, sample: dict[str, Any]) -> torch.Tensor:
        from nuscenes.utils.data_classes import LidarPointCloud

        cloud, times = LidarPointCloud.from_file_multisweep(
            self.devkit, sample, "LIDAR_TOP", "LIDAR_TOP", nsweeps=10
        )
        return torch.tensor(np.concatenate([cloud.points, times]).T).float()

    def images(self, sample: dict[str, Any], rng: np.random.Generator) -> torch.Tensor:
        network_images = []
        for channel in [name for name in sample["data"] if name.startswith("CAM")]:
            image = Image.open(self.devkit.get_sample_data_path(sample["data"][channel]))
            scale = NETWORK_WH[0] / SOURCE_WH[0] + (rng.uniform(-0.06, 0.11) if self.augment else 0)
            width, height = int(SOURCE_WH[0] * scale), int(SOURCE_WH[1] * scale)
            image = image.resize((width, height))
            left, top = int(rng.uniform(0, max(0, width - NETWORK_WH[0]))), height - NETWORK_WH[1]
            image = image.crop((left, top, left + NETWORK_WH[0], top + NETWORK_WH[1]))
            if self.augment:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
                image = image.rotate(rng.uniform(-5.4, 5.4))
            pixels = (np.float32(image) - MEAN) / STANDARD_DEVIATION
            network_images.append(torch.tensor(pixels.transpose(2, 0, 1)))
        return torch.stack(network_images)


def straightforward(root: Path, samples: int, workers: int, augment: bool, sweeps: bool) -> Way:
    dataset = Straightforward(root, samples, augment, sweeps)
    return dataset.__getitem__, DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=list)


def ours(root: Path, samples: int, workers: int, config: DataConfig) -> Way:
    nuscenes = NuScenes(root)
    dataset = FrameDataset(nuscenes, frames_of_tokens(nuscenes.sample_tokens()), config, train=True)
    pieces = [(i % KEY_FRAMES, i) for i in range(samples)]
    batches = [pieces[i : i + BATCH] for i in range(0, samples, BATCH)]
    return lambda index: dataset[index % KEY_FRAMES, index], make_loader(dataset, batches, workers)


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def measured(name: str, samples: int, make: Callable[[int], Way]) -> None:
    """Prints the samples per second of the worker processes, and the processor time of each in all processes."""
    load, loader = make(samples + BATCH)
    for index in range(KEY_FRAMES):  # the files into memory, and what is cached into the cache
        load(index)
    cpu = processor_seconds()
    iterator = iter(loader)
    next(iterator)
    start = time.perf_counter()
    for _ in iterator:
        pass
    rate = samples / (time.perf_counter() - start)
    del iterator  # ends the workers
    cpu_ms = 1e3 * (processor_seconds() - cpu) / (samples + BATCH)
    print(
        f"{name:<50} {rate:6.1f} samples/s {cpu_ms:6.1f} ms of processor time: "
        f"{2e3 / cpu_ms:6.1f} samples/s on two cores of their own",
        flush=True,
    )


def train_a_student(root: Path, folder: Path, workers: int) -> None:
    """A few steps of a small student at the full image size: how long a step waits for its data."""
    tiny = tiny_bevdet()
    replace = msgspec.structs.replace
    experiment = replace(
        tiny,
        data_root=str(root),
        data=replace(TRAIN, load_points=True),
        optim=replace(tiny.optim, steps=6, precision="fp32"),
        log=replace(tiny.log, log_every=3),
        cache=False,
        workers=workers,
    )
    train(experiment, folder, show_progress=False)
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])  # the last three steps
    print(
        f"training {tiny.name} at {NETWORK_WH[0]}x{NETWORK_WH[1]}: {line['seconds_per_step']:.2f} s per step of "
        f"{tiny.optim.labelled_per_step}, of which {line['data_seconds_per_step']:.3f} s waiting for data"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=80)
    parser.add_argument("--no-train", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    samples = arguments.samples
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        write_dataset(root)

        def devkit(augment: bool = False, sweeps: bool = False) -> Callable[[int], Way]:
            return lambda samples: straightforward(root, samples, arguments.workers, augment, sweeps)

        def variant(config: DataConfig, **changes: Any) -> Callable[[int], Way]:
            changed = msgspec.structs.replace(config, **changes)
            return lambda samples: ours(root, samples, arguments.workers, changed)

        for title, config in (("test setting", TEST), ("training's augmentation", TRAIN)):
            measured(f"{title}: devkit + Pillow, to float32", samples // 2, devkit(augment=config is TRAIN))
            measured(f"{title}: exact", samples, variant(config, exact_jpeg=True))
            decoder, images.simplejpeg = images.simplejpeg, None
            measured(f"{title}: half decode by Pillow", samples, variant(config))
            images.simplejpeg = decoder
            measured(f"{title}: half decode by simplejpeg", samples, variant(config))
            measured(f"{title}: frame cache", samples, variant(config, frame_cache=FrameCacheConfig()))
        measured("ten LiDAR sweeps: devkit", samples // 2, devkit(sweeps=True))
        measured("ten LiDAR sweeps", samples, variant(SWEEPS))
        measured("ten LiDAR sweeps: frame cache", samples, variant(SWEEPS, frame_cache=FrameCacheConfig()))
        if not arguments.no_train:
            train_a_student(root, Path(folder) / "run", arguments.workers)


if __name__ == "__main__":
    main()
