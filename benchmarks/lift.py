"""CPU milliseconds of the lift, fast and by volume, and of a training step of the tiny student.

Run: OMP_NUM_THREADS=1 python benchmarks/lift.py
"""

import statistics
from collections.abc import Callable

import torch
from sparse_conv import seconds_in_turns
from torch import Tensor

from distillbev.boxes import Boxes3D
from distillbev.data.schema import Batch
from distillbev.grid import BevGrid
from distillbev.models.bevdet import BevDet
from distillbev.models.lift import (
    DepthBins,
    cell_indices,
    feature_pixels,
    frustum_points,
    lift_splat,
    lift_splat_by_volume,
)
from distillbev.recipes import tiny_bevdet


def median_ms(works: list[Callable[[], object]], turns: int = 10) -> list[float]:
    """CPU milliseconds of each, all taking turns: what else the machine does meets all alike."""
    return [1000 * statistics.median(own) for own in seconds_in_turns(works, turns)]


def ring_of_cameras(samples: int, image_hw_px: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Six cameras of 70 degrees that look around from the LiDAR's place: cam2img, cam2lidar."""
    height, width = image_hw_px
    cam2img = torch.eye(4).repeat(samples, 6, 1, 1)
    cam2img[..., 0, 0] = cam2img[..., 1, 1] = 0.71 * width
    cam2img[..., 0, 2], cam2img[..., 1, 2] = width / 2, height / 2
    heading = torch.arange(6) * torch.pi / 3
    forward = torch.stack([heading.cos(), heading.sin(), torch.zeros(6)], dim=1)
    down = torch.tensor([0.0, 0.0, -1.0]).expand(6, 3)
    cam2lidar = torch.eye(4).repeat(samples, 6, 1, 1)
    cam2lidar[..., :3, :3] = torch.stack([torch.linalg.cross(down, forward), down, forward], dim=2)
    return cam2img, cam2lidar


def time_lift(
    name: str,
    samples: int,
    image_hw_px: tuple[int, int],
    stride_px: int,
    channels: int,
    bins: DepthBins,
    grid: BevGrid,
) -> None:
    cam2img, cam2lidar = ring_of_cameras(samples, image_hw_px)
    H, W = image_hw_px[0] // stride_px, image_hw_px[1] // stride_px

    def geometry() -> Tensor:
        points = frustum_points(feature_pixels((H, W), stride_px), bins, cam2img, cam2lidar)
        return cell_indices(points, grid, (-10.0, 10.0))

    cells = geometry()
    probs = torch.rand(samples, 6, bins.count, H, W).requires_grad_()
    context = torch.randn(samples, 6, channels, H, W).requires_grad_()
    grad = torch.randn(samples, channels, *grid.shape)
    splats = (lift_splat, lift_splat_by_volume)
    forward = [lambda splat=splat: splat(probs, context, cells, grid) for splat in splats]
    both = [lambda work=work: work().backward(grad) for work in forward]
    (geometry_ms,) = median_ms([geometry])
    for splat, *figures in zip(splats, median_ms(forward), median_ms(both), strict=True):
        row = [
            name,
            f"{cells.numel():,}",
            f"`{splat.__name__}`",
            *(f"{ms:.1f}" for ms in (geometry_ms, *figures)),
        ]
        print("| " + " | ".join(row) + " |", flush=True)


def time_student() -> None:
    student = tiny_bevdet().student
    assert student is not None
    detector = BevDet(student)
    cam2img, cam2lidar = ring_of_cameras(2, (96, 256))
    boxes = torch.rand(2, 12, 9) + 0.5
    boxes[..., :2] = boxes[..., :2] * 40 - 40
    batch = Batch(
        tokens=["a", "b"],
        images=torch.randint(0, 256, (2, 6, 3, 96, 256), dtype=torch.uint8),
        cam2img=cam2img,
        cam2lidar=cam2lidar,
        image_aug=torch.eye(4).repeat(2, 6, 1, 1),
        bev_aug=torch.eye(4).repeat(2, 1, 1),
        lidar2global=torch.eye(4, dtype=torch.float64).repeat(2, 1, 1),
        points=[(torch.rand(20_000, 5) - 0.5) * torch.tensor([50.0, 50.0, 4.0, 1.0, 0.0]) for _ in range(2)],
        boxes=[Boxes3D(rows, torch.zeros(12, dtype=torch.int64)) for rows in boxes],
    )

    def step(half: bool) -> None:
        detector.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            terms = detector.loss(detector(batch), batch)
        torch.stack(list(terms.values())).sum().backward()

    parameters = sum(p.numel() for p in detector.parameters())
    half_ms, full_ms = median_ms([lambda: step(True), lambda: step(False)], turns=5)
    print(f"\nA training step of the tiny student, {parameters:,} parameters, 2 samples: ", end="")
    print(f"{half_ms:.0f} ms in bfloat16, {full_ms:.0f} ms in float32.")


if __name__ == "__main__":
    torch.manual_seed(0)
    print("| size | points | way | geometry ms | forward ms | with backward ms |")
    print("|---" * 6 + "|")
    small = BevGrid(x_range_m=(-25.6, 25.6), y_range_m=(-25.6, 25.6), cell_m=0.8)
    bins = DepthBins(start_m=1.0, stop_m=37.0, step_m=0.9)
    time_lift("demo, 2 samples", 2, (96, 256), 8, 48, bins, small)
    time_lift("full size, 1 sample", 1, (256, 704), 16, 64, DepthBins(), BevGrid())
    time_student()
