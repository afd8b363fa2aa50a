"""A camera student of a few thousand weights, and noise for it to look at."""

import math

import torch

from distillbev.boxes import Boxes3D
from distillbev.data.schema import Batch
from distillbev.grid import BevGrid
from distillbev.models.bev_encoder import BevEncoderConfig, TopDownNeckConfig
from distillbev.models.bevdet import BevDetConfig
from distillbev.models.center_head import CenterHeadConfig
from distillbev.models.image_encoder import ImageEncoderConfig, PlainCnnConfig
from distillbev.models.lift import DepthBins, LiftConfig

TINY = BevDetConfig(
    grid=BevGrid(x_range_m=(-12.8, 12.8), y_range_m=(-12.8, 12.8)),
    image_encoder=ImageEncoderConfig(
        backbone=PlainCnnConfig(widths=(4, 8, 8, 8), convs=(1, 1, 1, 1)), out_channels=8, output_stride=8
    ),
    lift=LiftConfig(channels=6, depth=DepthBins(start_m=1, stop_m=13, step_m=1)),
    bev_encoder=BevEncoderConfig(channels=(6, 8, 10), blocks=(1, 1, 1), strides=(1, 2, 2)),
    bev_neck=TopDownNeckConfig(out_channels=8),
    head=CenterHeadConfig(shared_channels=8, branch_channels=None),
)


def make_batch(samples: int = 2, cameras: int = 3) -> Batch:
    """Noise seen by cameras that look around from the LiDAR's place."""
    generator = torch.Generator().manual_seed(0)
    cam2img, cam2lidar = (
        torch.eye(4).repeat(samples, cameras, 1, 1),
        torch.eye(4).repeat(samples, cameras, 1, 1),
    )
    cam2img[..., :3, :3] = torch.tensor([[40.0, 0, 32], [0, 40, 16], [0, 0, 1]])
    for camera in range(cameras):
        heading = 0.3 + 2 * math.pi * camera / cameras
        forward = torch.tensor([math.cos(heading), math.sin(heading), 0.0])
        down = torch.tensor([0.0, 0.0, -1.0])
        axes = torch.stack([torch.linalg.cross(down, forward), down, forward], dim=1)
        cam2lidar[:, camera, :3, :3] = axes
    boxes = torch.rand(samples, 4, 9, generator=generator)
    boxes[..., :2] = boxes[..., :2] * 20 - 10
    points = torch.cat(
        [torch.randn(samples, 500, 3, generator=generator) * 5, torch.zeros(samples, 500, 2)], dim=2
    )
    return Batch(
        tokens=[f"sample {i}" for i in range(samples)],
        images=torch.randint(0, 256, (samples, cameras, 3, 32, 64), dtype=torch.uint8, generator=generator),
        cam2img=cam2img,
        cam2lidar=cam2lidar,
        image_aug=torch.eye(4).repeat(samples, cameras, 1, 1),
        bev_aug=torch.eye(4).repeat(samples, 1, 1),
        lidar2global=torch.eye(4, dtype=torch.float64).repeat(samples, 1, 1),
        points=list(points),
        boxes=[Boxes3D(rows, torch.tensor([0, 1, 5, 9])) for rows in boxes],
    )
