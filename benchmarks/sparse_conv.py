"""Sparse convolution by number of voxels: time and memory of CenterPoint's 0.1 m encoder at full width.

    OMP_NUM_THREADS=1 python benchmarks/sparse_conv.py

The clouds are drawn: ground rings of a 32-beam LiDAR among upright pillars, more sweeps for more voxels. With
spconv installed (`pip install spconv`) the same layers run in it as well, in turns with ours, forward only: its
CPU build refuses the way back. Pairs are those of a 3x3x3 kernel on the input; times are CPU microseconds, memory is
kilobytes, all for each voxel of the input. Kept is what autograd holds between forward and backward; the peak is how
far the process grows.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from distillbev.grid import BevGrid
from distillbev.models.pillars import NORM_EPS
from distillbev.models.sparse_conv import Sites, SparseTensor
from distillbev.models.voxels import SparseVoxels, SparseVoxelsConfig

KERNEL = (3, 3, 3)


def lidar_like_points(num_sweeps: int, seed: int = 0) -> Tensor:
    """(P, 5), 34,688 a sweep: 32 beams over flat ground with 60 pillars; the car moves 0.5 m a sweep."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    x_y_radius = torch.stack([uniform(-50, 50, 60), uniform(-50, 50, 60), uniform(0.3, 3, 60)], dim=1)
    clouds = []
    for sweep in range(num_sweeps):
        pitch = torch.linspace(-30.67, 10.67, 32).deg2rad()[:, None]
        yaw = torch.arange(1084)[None] * (2 * torch.pi / 1084) + uniform(0, 0.006, 1, 1)
        direction = torch.stack(
            [pitch.cos() * yaw.cos(), pitch.cos() * yaw.sin(), pitch.sin().expand(-1, 1084)]
        )
        range_m = torch.where(direction[2] < 0, -1.84 / direction[2].clamp(max=-1e-3), 70.0)
        origin = torch.tensor([0.0, 0.5 * sweep])
        for x, y, radius in x_y_radius.tolist():
            toward = torch.tensor([x, y]) - origin
            flat = direction[:2] / pitch.cos()
            along = toward[0] * flat[0] + toward[1] * flat[1]
            missed_by = (toward.square().sum() - along.square()).clamp(min=0)
            hit = (missed_by < radius**2) & (along > radius)
            reach = (along - (radius**2 - missed_by).clamp(min=0).sqrt()) / pitch.cos()
            range_m = torch.where(hit, torch.minimum(range_m, reach), range_m)
        xyz = direction * (range_m + 0.02 * torch.randn(range_m.shape, generator=generator))
        xyz[:2] += origin[:, None, None]
        intensity, seconds = uniform(0, 1, 1, 32, 1084), torch.full((1, 32, 1084), -0.05 * sweep)
        clouds.append(torch.cat([xyz, intensity, seconds]).flatten(1).T)
    return torch.cat(clouds)


def seconds_in_turns(runs: list[Callable[[], object]], turns: int) -> list[list[float]]:
    """CPU seconds of each turn of each run, after one to warm up; what else the machine does meets all alike."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(turns + 1):
        for run, own in zip(runs, times, strict=True):
            start = time.process_time()
            run()
            if turn > 0:
                own.append(time.process_time() - start)
    return times


def peak_growth_bytes(run: Callable[[], object]) -> int:
    """How far the peak of the process lies above where it stood; Linux only."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else freed memory would hide the growth
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    def kilobytes(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) * 1024


def spconv_encoder(encoder: SparseVoxels) -> Any:
    """The same layers in spconv, with index tables shared where ours share them; weights are its own."""
    import spconv.pytorch as spconv
    from torch import nn

    channels = encoder.config.channels

    def norm(width: int) -> list[nn.Module]:
        return [nn.BatchNorm1d(width, eps=NORM_EPS), nn.ReLU()]

    class Block(spconv.SparseModule):
        def __init__(self, width: int, key: str) -> None:
            super().__init__()
            self.conv1 = spconv.SubMConv3d(width, width, 3, padding=1, bias=False, indice_key=key)
            self.conv2 = spconv.SubMConv3d(width, width, 3, padding=1, bias=False, indice_key=key)
            self.bn1, self.bn2 = nn.BatchNorm1d(width, eps=NORM_EPS), nn.BatchNorm1d(width, eps=NORM_EPS)

        def forward(self, tensor: Any) -> Any:
            hidden = self.conv1(tensor)
            hidden = self.conv2(hidden.replace_feature(self.bn1(hidden.features).relu()))
            return hidden.replace_feature((self.bn2(hidden.features) + tensor.features).relu())

    first = spconv.SubMConv3d(5, channels[0], 3, padding=1, bias=False, indice_key="stage0")
    layers: list[Any] = [first, *norm(channels[0])]
    for i, width in enumerate(channels):
        layers += [Block(width, f"stage{i}") for _ in range(encoder.config.blocks_per_stage)]
        if i + 1 < len(channels):
            padding = (0 if encoder.config.z_unpadded[i] else 1, 1, 1)
            layers.append(spconv.SparseConv3d(width, channels[i + 1], 3, 2, padding=padding, bias=False))
            layers += norm(channels[i + 1])
    layers.append(
        spconv.SparseConv3d(channels[-1], encoder.config.out_channels, (3, 1, 1), (2, 1, 1), bias=False)
    )
    return spconv.SparseSequential(*layers, *norm(encoder.config.out_channels), spconv.ToDense())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sweeps", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="run ours under bfloat16 autocast")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = SparseVoxelsConfig(max_points=None, max_voxels=None, max_voxels_eval=None)
    encoder = SparseVoxels(config, BevGrid(cell_m=0.1)).eval()
    theirs = spconv_encoder(encoder).eval() if importlib.util.find_spec("spconv") else None

    print(f"{arguments.threads} thread(s), torch {torch.__version__}, medians of {arguments.turns} turns")
    print()
    print("| voxels | pairs | voxelise | forward | spconv | spconv / ours | with backward | kept | peak |")
    print("|---" * 9 + "|")
    for num_sweeps in arguments.sweeps:
        points = [lidar_like_points(num_sweeps)]
        voxels = encoder.voxelise(points)
        sites = voxels.sites
        num = len(sites)

        def fresh(voxels: SparseTensor = voxels) -> SparseTensor:
            """Without the rulebooks of an earlier run."""
            return SparseTensor(voxels.features, Sites(voxels.sites.cells, voxels.sites.shape))

        def forward(fresh: Callable[[], SparseTensor] = fresh) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
                return encoder.encode(fresh())[1]

        def forward_only(forward: Callable[[], Tensor] = forward) -> Tensor:
            with torch.no_grad():
                return forward()

        def both(forward: Callable[[], Tensor] = forward) -> None:
            encoder.zero_grad()
            forward().float().square().sum().backward()

        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            bev = forward()
        kept_bytes = sum(kept.values())
        del bev
        runs: list[Callable[[], object]] = [
            lambda points=points: encoder.voxelise(points),
            both,
            forward_only,
        ]
        if theirs is not None:
            import spconv.pytorch as spconv

            indices = sites.coordinates().int()

            def run(voxels: SparseTensor = voxels, indices: Tensor = indices) -> None:
                with torch.no_grad():
                    theirs(spconv.SparseConvTensor(voxels.features, indices, list(voxels.sites.shape[1:]), 1))

            runs.append(run)
        voxelise, with_backward, ours, *spconv_times = seconds_in_turns(runs, arguments.turns)
        per_voxel = [f"{median(times) / num * 1e6:.1f}" for times in (voxelise, ours, *spconv_times)]
        if spconv_times:
            ratios = [a / b for a, b in zip(spconv_times[0], ours, strict=True)]
            per_voxel.append(f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        else:
            per_voxel += ["", ""]
        per_voxel.append(f"{median(with_backward) / num * 1e6:.1f}")
        peak = peak_growth_bytes(both)
        memory = [f"{b / num / 1024:.1f}" for b in (kept_bytes, peak)]
        pairs = f"{sites.submanifold(KERNEL).num_pairs / num:.2f}"
        print("| " + " | ".join([f"{num:,}", pairs, *per_voxel, *memory]) + " |", flush=True)


if __name__ == "__main__":
    main()
