from pathlib import Path

import msgspec
import pytest
import torch
from tiny_student import TINY, make_batch

from distillbev.config import read_config, write_config
from distillbev.data.schema import Batch, PastFrames
from distillbev.errors import ConfigError, DataError
from distillbev.grid import BevGrid
from distillbev.models.bev_encoder import BevResNetConfig, LssNeckConfig, TopDownNeckConfig
from distillbev.models.bevdet import BevDet, BevDetConfig
from distillbev.models.depth_net import MegviiDepthNetConfig
from distillbev.models.history import HistoryConfig
from distillbev.models.lift import DepthLossConfig
from distillbev.models.second import SecondFpnConfig

# Built as Megvii's BEVDepth, small.
MEGVII = msgspec.structs.replace(
    TINY,
    frame="ego",
    image_encoder=msgspec.structs.replace(
        TINY.image_encoder,
        out_channels=9,
        neck=SecondFpnConfig(channels=(2, 3, 4), upsample=(0.5, 1, 2)),
    ),
    lift=msgspec.structs.replace(
        TINY.lift, depth_net=MegviiDepthNetConfig(mid_channels=8), aggregate_depth=True
    ),
    history=HistoryConfig(blocks=0, align="rays", velocity="per_second"),
    bev_encoder=BevResNetConfig(channels=(6, 8, 10), blocks=(1, 1, 1)),
    bev_neck=SecondFpnConfig(channels=(2, 3, 4, 5), upsample=(1, 2, 4, 8)),
    depth_loss=DepthLossConfig(),
)


def make_past_batch() -> Batch:
    batch = make_batch()
    batch.lidar2ego = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    batch.past = PastFrames([make_batch()], torch.full((2, 1), 0.5))
    batch.past.frames[0].lidar2ego = batch.lidar2ego
    return batch


def with_depth(config: BevDetConfig) -> BevDetConfig:
    return msgspec.structs.replace(config, depth_loss=DepthLossConfig())


@pytest.mark.parametrize(("extra", "parameters"), [(False, 47_975_297), (True, 47_975_297 + 512)])
def test_the_published_configuration_has_the_published_number_of_parameters(
    extra: bool, parameters: int
) -> None:
    config = BevDetConfig(bev_neck=LssNeckConfig(extra_norm_act=extra))
    with torch.device("meta"):
        detector = BevDet(config)
    assert sum(p.numel() for p in detector.parameters()) == parameters
    assert detector.head.grid.shape == (128, 128)


@pytest.mark.parametrize("neck", [TopDownNeckConfig(out_channels=8), LssNeckConfig(out_channels=8)])
def test_every_map_has_the_channels_and_the_grid_it_says(neck) -> None:
    detector = BevDet(msgspec.structs.replace(TINY, bev_neck=neck))
    output = detector(make_batch())
    assert list(output.bev) == ["lifted", "stage0", "stage1", "stage2", "head"]
    for name, level in output.bev.items():
        assert level.features.shape == (2, detector.bev_channels[name], *level.grid.shape), name
        assert level.grid.covers_same_ground(TINY.grid)
    for task in output.heads:
        for value in task.values():
            assert value.shape[2:] == detector.head.grid.shape
    assert output.depth_logits is not None and output.depth_logits.shape == (2, 3, 12, 4, 8)
    assert len(detector.decode(output)) == 2


def test_mirroring_the_cameras_poses_mirrors_the_lifted_map() -> None:
    detector, batch = BevDet(TINY).eval(), make_batch()
    mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0]))
    lifted = detector(batch).bev["lifted"].features
    batch.cam2lidar = mirror @ batch.cam2lidar
    mirrored = detector(batch).bev["lifted"].features
    torch.testing.assert_close(mirrored, lifted.flip(3), atol=1e-5, rtol=1e-4)
    assert bool(lifted.any())


def test_samples_do_not_see_each_other_in_eval_mode() -> None:
    detector, batch = BevDet(TINY).eval(), make_batch()
    assert batch.images is not None
    together = detector(batch).bev["head"].features[:1]
    batch.images[1] = 0
    torch.testing.assert_close(detector(batch).bev["head"].features[:1], together)


@pytest.mark.parametrize("config", [TINY, with_depth(TINY), MEGVII])
def test_every_weight_is_trained_by_the_loss(config: BevDetConfig) -> None:
    torch.manual_seed(0)
    detector, batch = BevDet(config), make_past_batch()
    terms = detector.loss(detector(batch), batch)
    assert ("depth" in terms) == (config.depth_loss is not None)
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_a_few_steps_on_one_batch_lower_its_loss() -> None:
    torch.manual_seed(0)
    detector, batch = BevDet(with_depth(TINY)), make_batch()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = detector.loss(detector(batch), batch)
        total = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_missing_from_a_batch_is_said() -> None:
    detector, batch = BevDet(with_depth(TINY)), make_batch()
    output = detector(batch)
    batch.boxes[1] = None
    with pytest.raises(DataError, match="no boxes for sample sample 1"):
        detector.loss(output, batch)
    batch.points = None
    with pytest.raises(DataError, match="needs LiDAR points"):
        detector.loss_of_depth(output.depth_logits, batch, DepthLossConfig())
    batch.images = None
    with pytest.raises(DataError, match="no images"):
        detector(batch)


def test_a_grid_that_the_strides_do_not_divide_is_refused() -> None:
    grid = BevGrid(x_range_m=(-10.0, 10.0), y_range_m=(-10.0, 10.0), cell_m=0.8)  # 25 cells
    with pytest.raises(ConfigError, match=r"bev_encoder.strides=\(2, 2, 2\) on this grid"):
        BevDetConfig(grid=grid)


def test_a_configuration_comes_back_from_its_file(tmp_path: Path) -> None:
    for config in (BevDetConfig(), with_depth(TINY), MEGVII):
        write_config(config, tmp_path / "student.yaml")
        assert read_config(tmp_path / "student.yaml", BevDetConfig) == config
