"""One training step of every full-size recipe: parameters, FLOPs, seconds and peak memory, as a table.

Run: python benchmarks/full_size.py ROOT [--recipes bevdet_r50,...] [--batch 1] [--set KEY=VALUE ...]

ROOT is any nuScenes folder; one real key frame is enough. Every recipe runs in a process of its own. Teachers have
fresh weights, MVP's masks are the rectangles around the annotated boxes: neither changes what a step costs much.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from distillbev.boxes import box_corners
from distillbev.classes import CLASSES
from distillbev.config import with_overrides
from distillbev.data.samples import NuScenes
from distillbev.data.schema import Batch
from distillbev.data.virtual_points import VirtualPointsConfig, prepare_folder
from distillbev.geometry import invert_rigid, project_to_image, transform_points
from distillbev.models.detectors import build_teacher
from distillbev.published import PUBLISHED
from distillbev.train.checkpoint import save_weights
from distillbev.train.experiment import Experiment
from distillbev.train.feed import Feed
from distillbev.train.loop import autocast, build_detector, build_objective
from distillbev.train.step_log import peak_memory_bytes

# Counted in the reference implementations, one process, no adapters.
REFERENCE_PARAMETERS = {
    "centerpoint_pillar02": 5_982_790,
    "centerpoint_voxel01": 8_938_262,
    "mvp_pillar02": 5_983_558,
    "lidarformer": 27_642_251,
    "mvpformer": 27_650_027,
    "bevdet_r50": 47_975_297,
    "bevdet4d_r50": 48_307_649,
    "bevdepth_r50": 53_217_566,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--recipes", default=",".join(recipe.__name__ for recipe in PUBLISHED))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--set", action="append", default=[], help="change of every recipe, as in `distillbev train`"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.recipes, arguments.root, arguments.batch, arguments.set)))
        return
    unit = "GPU" if torch.cuda.is_available() else "CPU"
    print(
        f"batch {arguments.batch}, {device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print(f"| recipe | parameters | reference | forward GFLOPs | step {unit} s | peak GB | loss |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.recipes.split(","):
        command = [sys.executable, __file__, str(arguments.root), "--recipes", name, "--one"]
        command += [
            "--batch",
            str(arguments.batch),
            *(part for change in arguments.set for part in ("--set", change)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = (
                done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}; out of memory?"]
            )[-1]
            print(f"| `{name}` | failed: {why} |", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        reference = REFERENCE_PARAMETERS.get(name)
        print(
            f"| `{name}` | {row['parameters']:,} | {f'{reference:,}' if reference else ''} | "
            f"{row['gflops']:.0f} | {row['seconds']:.1f} | {row['gigabytes']:.1f} | {row['loss']:.1f} |",
            flush=True,
        )


def measure(name: str, root: Path, batch_size: int, changes: Sequence[str]) -> dict[str, float]:
    """One forward and backward pass of a recipe's whole objective on the dataset's first frames."""
    recipe = {recipe.__name__: recipe for recipe in PUBLISHED}[name]
    with tempfile.TemporaryDirectory() as folder:
        experiment = on_one_batch(with_overrides(recipe(), changes), root, batch_size, Path(folder))
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build_detector(experiment).parameters())

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        objective = build_objective(experiment).to(device).train()
        batch = next(iter(Feed(experiment, NuScenes(root)))).to(device)
        flops = forward_flops(objective.student, batch)
        seconds, loss = 0.0, 0.0
        for step in range(3 if device.type == "cuda" else 1):  # a GPU's first step also chooses its kernels
            started = clock(device)
            with autocast("auto", device):
                losses = objective(batch, step)
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
            total.backward()
            loss = float(total)
            seconds = clock(device) - started
        assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())
        return {
            "parameters": parameters,
            "gflops": flops / 1e9 / batch_size,
            "seconds": seconds,
            "gigabytes": peak_memory_bytes() / 1e9,
            "loss": loss,
        }


def on_one_batch(experiment: Experiment, root: Path, batch_size: int, folder: Path) -> Experiment:
    """The experiment on every frame of the dataset, with a fresh teacher and virtual points in `folder`."""
    data = replace(experiment.data, object_pasting=None)  # what is pasted would depend on the dataset
    if data.virtual_points is not None:
        masks = mask_rectangles(NuScenes(root), folder / "masks")
        points = prepare_folder(root, VirtualPointsConfig(), masks, out=folder / "points", processes=1)
        data = replace(data, virtual_points=replace(data.virtual_points, folder=str(points)))
    if experiment.needs_teacher:
        assert experiment.teacher is not None
        save_weights(build_teacher(experiment.teacher).state_dict(), folder / "teacher.safetensors")
        experiment = replace(experiment, teacher_weights=str(folder / "teacher.safetensors"))
    return replace(
        experiment,
        data_root=str(root),
        data=data,
        labelled_splits=("all",),
        optim=replace(experiment.optim, steps=1, labelled_per_step=batch_size, class_balanced=False),
        workers=0,
    )


def mask_rectangles(nuscenes: NuScenes, folder: Path) -> Path:
    """Mask files that hold the rectangle around each annotated box (docs/data.md has the format)."""
    for token in nuscenes.sample_tokens():
        sample = nuscenes.sample(token)
        assert sample.annotations is not None
        for camera in sample.cameras:
            lidar2cam = invert_rigid(camera.ego2global @ camera.cam2ego) @ sample.lidar2global
            width, height = camera.size_wh_px
            numbers = np.zeros((height, width), dtype=np.uint16)
            instances = []
            for number, (box, label) in enumerate(
                zip(sample.annotations.boxes, sample.annotations.labels, strict=True), start=1
            ):
                pixels, depth_m = project_to_image(
                    camera.cam2img, transform_points(lidar2cam, box_corners(box[None])[0])
                )
                if label < 0 or depth_m.min() < 1:
                    continue
                left, top = np.clip(pixels.min(axis=0), 0, camera.size_wh_px).astype(int)
                right, bottom = np.clip(pixels.max(axis=0), 0, camera.size_wh_px).astype(int)
                numbers[top:bottom, left:right] = number
                instances.append({"id": number, "class": CLASSES[label], "score": 0.9})
            stem = folder / camera.channel / camera.path.stem
            stem.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(numbers).save(stem.with_suffix(".png"))
            stem.with_suffix(".json").write_text(json.dumps({"instances": instances}))
    return folder


def forward_flops(detector: torch.nn.Module, batch: Batch) -> int:
    """Of convolutions and matrix products, two for each multiplication."""
    with FlopCounterMode(display=False) as counter:  # fails without gradients: it hooks them
        detector(batch)
    return counter.get_total_flops()


def clock(device: torch.device) -> float:
    """Seconds: of all threads' work on a CPU, which others' load does not change; of the wall on a GPU."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    main()
