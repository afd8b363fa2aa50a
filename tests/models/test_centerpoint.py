import math

import msgspec
import pytest
import torch
from torch import Tensor

from distillbev.boxes import Boxes3D
from distillbev.classes import CLASSES
from distillbev.config import read_config, write_config
from distillbev.data.schema import Batch
from distillbev.errors import ConfigError, DataError
from distillbev.grid import BevGrid
from distillbev.models.bev_encoder import TopDownNeckConfig
from distillbev.models.center_head import CenterHeadConfig
from distillbev.models.centerpoint import CenterPoint, CenterPointConfig
from distillbev.models.pillars import DynamicPillarsConfig, HardPillarsConfig
from distillbev.models.second import SecondConfig, SecondFpnConfig

TINY = CenterPointConfig(
    grid=BevGrid(x_range_m=(-12.8, 12.8), y_range_m=(-9.6, 9.6), cell_m=0.4),
    pillars=DynamicPillarsConfig(channels=(8,), intensity_scale=1 / 255),
    backbone=SecondConfig(channels=(16, 24), layers=(1, 1), strides=(2, 2)),
    neck=TopDownNeckConfig(out_channels=24),
    head=CenterHeadConfig(shared_channels=16, branch_channels=None),
    norm_momentum=0.1,
)
WITH_FPN = msgspec.structs.replace(
    TINY, pillars=HardPillarsConfig(channels=(8,)), neck=SecondFpnConfig(channels=(8, 8), upsample=(0.5, 1.0))
)


def batch_of(points: list[Tensor], boxes: list[Boxes3D | None]) -> Batch:
    n = len(points)
    eye = torch.eye(4)
    return Batch(
        tokens=[f"sample{i}" for i in range(n)],
        images=None,
        cam2img=eye.expand(n, 0, 4, 4),
        cam2lidar=eye.expand(n, 0, 4, 4),
        image_aug=eye.expand(n, 0, 4, 4),
        bev_aug=eye.expand(n, 4, 4),
        lidar2global=eye.double().expand(n, 4, 4),
        points=points,
        boxes=boxes,
    )


def scene(seed: int) -> tuple[Tensor, Boxes3D]:
    """Two cars and two pedestrians as clouds of points, on some scattered ground."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[-8.0, -5.0], [6.0, 4.0], [-5.0, 6.0], [8.0, -6.0]])
    centres = centres + torch.rand(4, 2, generator=generator) * 2
    sizes = torch.tensor([[4.5, 1.9, 1.6], [4.5, 1.9, 1.6], [0.7, 0.7, 1.8], [0.7, 0.7, 1.8]])
    yaw = torch.rand(4, generator=generator) * 2 * math.pi - math.pi
    boxes = torch.cat([centres, -sizes[:, 2:] / 2, sizes, yaw[:, None], torch.zeros(4, 2)], dim=1)
    clouds = [torch.rand(2000, 5, generator=generator) * torch.tensor([25, 19, 0.1, 50, 0.0])]
    clouds[0] -= torch.tensor([12.5, 9.5, 1.6, 0, 0])
    for box in boxes:
        inside = (torch.rand(200, 3, generator=generator) - 0.5) * box[3:6]
        cos, sin = box[6].cos(), box[6].sin()
        turned = inside @ torch.tensor([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        clouds.append(torch.cat([turned + box[:3], torch.full((200, 1), 200.0), torch.zeros(200, 1)], dim=1))
    labels = torch.tensor([CLASSES.index(n) for n in ("car", "car", "pedestrian", "pedestrian")])
    return torch.cat(clouds), Boxes3D(boxes, labels)


@pytest.mark.parametrize("config", [TINY, WITH_FPN])
def test_every_map_has_the_channels_and_the_grid_it_claims(config: CenterPointConfig) -> None:
    detector = CenterPoint(config)
    points, boxes = scene(0)
    output = detector(batch_of([points, points[:10]], [boxes, boxes]))
    assert list(output.bev) == ["stage0", "stage1", "head"]
    assert {name: bev.features.shape[1] for name, bev in output.bev.items()} == detector.bev_channels
    for bev in output.bev.values():
        assert bev.features.shape[2:] == bev.grid.shape
        assert bev.grid.covers_same_ground(config.grid)
    assert output.bev["head"].grid == detector.head.grid == config.head_grid
    assert output.heads[0]["heatmap"].shape[2:] == config.head_grid.shape


def test_a_hundred_steps_teach_a_tiny_teacher_one_scene() -> None:
    torch.manual_seed(0)
    points, boxes = scene(0)
    batch = batch_of([points], [boxes])
    detector = CenterPoint(TINY)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=150)
    for _ in range(150):
        loss = torch.stack(list(detector.loss(detector(batch), batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    (detections,) = detector.decode(detector.eval()(batch))
    assert detections.scores is not None
    sure = detections[detections.scores > 0.5]
    assert sorted(sure.labels.tolist()) == sorted(boxes.labels.tolist())
    for box, label in zip(boxes.boxes, boxes.labels, strict=True):
        same = sure[sure.labels == label].boxes
        nearest = same[(same[:, :2] - box[:2]).norm(dim=1).argmin()]
        assert float((nearest[:3] - box[:3]).norm()) < 0.2
        assert float((nearest[3:6] / box[3:6]).log().abs().max()) < 0.1
        assert math.cos(float(nearest[6] - box[6])) > 0.95


@pytest.mark.parametrize("config", [TINY, WITH_FPN])
def test_bfloat16_trains_with_finite_losses_and_gradients(config: CenterPointConfig) -> None:
    torch.manual_seed(0)
    detector = CenterPoint(config)
    points, boxes = scene(1)
    batch = batch_of([points, torch.zeros(0, 5)], [boxes, Boxes3D.empty()])
    with torch.autocast("cpu", torch.bfloat16):
        output = detector(batch)
        terms = detector.loss(output, batch)
    assert output.bev["head"].features.dtype == torch.bfloat16
    assert all(bool(term.isfinite()) for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in detector.parameters())


@pytest.mark.parametrize("config", [TINY, WITH_FPN])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_without_any_point_or_box_passes(config: CenterPointConfig, training: bool) -> None:
    detector = CenterPoint(config).train(training)
    batch = batch_of([torch.zeros(0, 5)] * 2, [Boxes3D.empty()] * 2)
    output = detector(batch)
    assert all(bool(term.isfinite()) for term in detector.loss(output, batch).values())
    assert len(detector.decode(output)) == 2


def test_missing_points_or_labels_are_named() -> None:
    detector = CenterPoint(TINY)
    points, boxes = scene(0)
    batch = batch_of([points, points], [boxes, None])
    output = detector(batch)
    with pytest.raises(DataError, match="sample1"):
        detector.loss(output, batch)
    batch.points = None
    with pytest.raises(DataError, match="no LiDAR points"):
        detector(batch)


def test_strides_that_do_not_fit_the_neck_or_the_ground_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"undo backbone\.strides"):
        CenterPointConfig(neck=SecondFpnConfig(upsample=(1.0, 1.0, 1.0)))
    with pytest.raises(ConfigError, match="one factor per stage"):
        CenterPointConfig(neck=SecondFpnConfig(channels=(64,), upsample=(1.0,)))
    with pytest.raises(ConfigError, match="whole, positive number of cells"):
        CenterPointConfig(grid=BevGrid(x_range_m=(-1.0, 1.0), y_range_m=(-1.0, 1.0), cell_m=0.2))


def test_a_configuration_survives_its_file(tmp_path) -> None:
    for config in (CenterPointConfig(), TINY, WITH_FPN):
        write_config(config, tmp_path / "model.yaml")
        assert read_config(tmp_path / "model.yaml", CenterPointConfig) == config


def test_a_teacher_for_the_demo_stays_small() -> None:
    """0.4 m pillars on +-25.6 m: about ten times fewer parameters than the published detector."""
    config = CenterPointConfig(
        grid=BevGrid(x_range_m=(-25.6, 25.6), y_range_m=(-25.6, 25.6), cell_m=0.4),
        pillars=DynamicPillarsConfig(channels=(32,)),
        backbone=SecondConfig(channels=(48, 96, 96), layers=(1, 2, 2)),
        neck=TopDownNeckConfig(out_channels=64),
        head=CenterHeadConfig(branch_channels=None),
    )
    detector = CenterPoint(config)
    assert 0.5e6 < sum(p.numel() for p in detector.parameters()) < 0.7e6
    assert detector.head.grid.shape == (64, 64)
