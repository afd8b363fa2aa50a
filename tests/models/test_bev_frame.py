from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from tiny_student import TINY, make_batch
from torch import Tensor

from distillbev.boxes import Boxes3D, transform_boxes
from distillbev.config import with_overrides
from distillbev.data.augment import BevAugConfig, ImageAugConfig
from distillbev.data.frames import FrameDataset, frames_of_tokens
from distillbev.data.samples import NuScenes
from distillbev.data.schema import Batch, PastFrames
from distillbev.data.settings import DataConfig, PastConfig
from distillbev.errors import ConfigError, DataError
from distillbev.geometry import pose_matrix, rotation_about_z
from distillbev.models.bev_frame import in_ego_frame, move_boxes
from distillbev.models.bevdet import BevDet, BevDetConfig, BevDetStream
from distillbev.models.depth_net import MegviiDepthNetConfig
from distillbev.models.history import HistoryConfig, motion_to_past
from distillbev.recipes import RECIPES

TILT = np.array([[np.cos(0.03), 0, np.sin(0.03)], [0, 1, 0], [-np.sin(0.03), 0, np.cos(0.03)]])
LIDAR2EGO = torch.from_numpy(pose_matrix(np.array([0.9, 0.1, 1.8]), rotation_about_z(-1.5) @ TILT))
# Flips x after turning and stretching.
BEV_AUG = torch.from_numpy(
    pose_matrix(np.zeros(3), np.diag([-1.0, 1.0, 1.0]) @ (1.04 * rotation_about_z(0.3)))
)
NET = msgspec.structs.replace(TINY.lift, depth_net=MegviiDepthNetConfig(mid_channels=8))
KINDS = [
    {},
    {"lift": NET},
    {"history": HistoryConfig()},
    {"history": HistoryConfig(blocks=0, align="rays", velocity="per_second")},
]


def frame_at(seconds: float, ego: bool) -> Batch:
    """The same noise, cameras and drive, described in the LiDAR or in the ego frame; without boxes."""
    batch = make_batch(samples=1)
    cam2ego = batch.cam2lidar.double()
    cam2ego[..., 2, 3] = 1.5
    turn = rotation_about_z(0.4 + 0.5 * seconds)
    ego2global = torch.from_numpy(pose_matrix(np.array([1400 + 6 * seconds, 900.0, 0.5 * seconds]), turn))
    frame2ego = torch.eye(4, dtype=torch.float64) if ego else LIDAR2EGO
    return replace(
        batch,
        cam2lidar=(BEV_AUG @ torch.linalg.inv(frame2ego) @ cam2ego).float(),
        bev_aug=BEV_AUG.float()[None],
        lidar2global=(ego2global @ frame2ego)[None],
        lidar2ego=frame2ego[None],
        boxes=[None],
    )


def described(ego: bool) -> Batch:
    """A batch with an earlier frame, and boxes whose velocity is partly unknown."""
    rows = torch.tensor([[4.0, -3, 0.2, 4, 2, 1.5, 0.4, 3, -1], [-2.0, 6, 0, 1, 1, 2, -3, np.nan, np.nan]])
    if ego:
        lidar2ego = BEV_AUG @ LIDAR2EGO @ torch.linalg.inv(BEV_AUG)
        rows = torch.from_numpy(transform_boxes(lidar2ego.numpy(), rows.numpy())).float()
    past = PastFrames([frame_at(0.0, ego)], torch.tensor([[0.5]]))
    return replace(frame_at(0.5, ego), past=past, boxes=[Boxes3D(rows, torch.tensor([0, 8]))])


def detectors(**parts) -> tuple[BevDet, BevDet]:
    """With the same weights; the map of the first lies in the ego frame, that of the second in the LiDAR frame."""
    torch.manual_seed(0)
    config = msgspec.structs.replace(TINY, **parts)
    ego, lidar = BevDet(msgspec.structs.replace(config, frame="ego")), BevDet(config)
    lidar.load_state_dict(ego.state_dict())
    return ego.eval(), lidar.eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("parts", KINDS)
@torch.no_grad()
def test_a_map_in_the_ego_frame_is_that_of_the_same_world_described_in_the_ego_frame(parts) -> None:
    ego, lidar = detectors(**parts)
    found, expected = ego(described(ego=False)), lidar(described(ego=True))
    for name, level in expected.bev.items():
        close(found.bev[name].features, level.features)
    assert bool(expected.bev["lifted"].features.any())
    assert expected.lidar2bev is None
    (lidar2ego,) = found.lidar2bev
    (ours,), (theirs,) = ego.decode(found), lidar.decode(expected)
    assert len(ours) == len(theirs) > 10
    in_lidar = transform_boxes(np.linalg.inv(lidar2ego.double().numpy()), theirs.boxes.numpy())
    turn = (ours.boxes[:, 6] - torch.from_numpy(in_lidar[:, 6])).sin()  # either end of the circle
    close(turn, torch.zeros_like(turn))
    rest = [0, 1, 2, 3, 4, 5, 7, 8]
    close(ours.boxes[:, rest], torch.from_numpy(in_lidar[:, rest]).float())
    for name, term in lidar.loss(expected, described(ego=True)).items():
        close(ego.loss(found, described(ego=False))[name], term)


def test_boxes_move_as_their_slow_twin_moves_them() -> None:
    rows = torch.randn(20, 9)
    rows[3, 7:] = torch.nan
    motions = torch.stack([LIDAR2EGO, torch.linalg.inv(LIDAR2EGO)]).float()
    samples = [Boxes3D(rows, torch.zeros(20, dtype=torch.int64)), Boxes3D.empty()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moved, none = move_boxes(samples, motions)
    expected = torch.from_numpy(transform_boxes(LIDAR2EGO.numpy(), rows.numpy())).float()
    torch.testing.assert_close(moved.boxes, expected, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert len(none) == 0


@pytest.mark.parametrize("align", ["map", "rays"])
@torch.no_grad()
def test_batches_of_the_loader_tell_all_that_the_ego_frame_needs(tiny: NuScenes, align) -> None:
    data = DataConfig(
        image_size_px=(64, 32), past=PastConfig(), image_aug=ImageAugConfig(), bev_aug=BevAugConfig()
    )
    dataset = FrameDataset(tiny, frames_of_tokens(tiny.sample_tokens()[1:2]), data, train=True)
    ego, lidar = detectors(history=HistoryConfig(align=align))
    batch = dataset[0, 0]
    turned, lidar2ego = in_ego_frame(batch)
    sample = tiny.sample(batch.tokens[0])
    ego2global = torch.from_numpy(sample.ego2global)
    torch.testing.assert_close(turned.lidar2global[0], ego2global, atol=1e-9, rtol=1e-12)
    cam2ego = torch.linalg.inv(turned.bev_aug.double())[:, None] @ turned.cam2lidar.double()
    camera = sample.cameras[0]
    expected = np.linalg.inv(sample.ego2global) @ camera.ego2global @ camera.cam2ego
    torch.testing.assert_close(cam2ego[0, 0], torch.from_numpy(expected), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # matrices keep full precision
        again, motion = in_ego_frame(batch)
    assert torch.equal(again.cam2lidar, turned.cam2lidar) and torch.equal(motion, lidar2ego)
    for name, level in lidar(turned).bev.items():
        close(ego(batch).bev[name].features, level.features)
    with pytest.raises(DataError, match="come without lidar2ego"):
        ego(replace(batch, lidar2ego=None))


# Rays of earlier images on the present ground.


@torch.no_grad()
def test_rays_of_an_earlier_frame_fall_where_the_car_now_sees_them() -> None:
    _, detector = detectors(history=HistoryConfig(blocks=0, align="rays"))
    batch = described(ego=False)
    assert batch.past is not None
    (earlier,) = batch.past.frames
    moved = (torch.linalg.inv(motion_to_past(earlier, batch)) @ earlier.cam2lidar[0])[None]
    alone = detector.see(replace(earlier, cam2lidar=moved))[0]
    lifted = detector(batch).bev["lifted"].features
    close(lifted[:, 6:], alone)
    close(lifted[:, :6], detector.see(batch)[0])
    assert not torch.allclose(alone, detector.see(earlier)[0])


@torch.no_grad()
def test_a_car_that_stands_still_needs_no_choice_of_alignment() -> None:
    batch = described(ego=False)
    batch = replace(batch, past=PastFrames([frame_at(0.5, ego=False)], torch.tensor([[0.5]])))
    rays, maps = (
        detectors(history=HistoryConfig(align=align, correlation_cells=1))[1] for align in ("rays", "map")
    )
    close(rays(batch).bev["head"].features, maps(batch).bev["head"].features)


def test_a_stream_in_the_ego_frame_follows_batches_and_refuses_rays(tiny: NuScenes) -> None:
    dataset = FrameDataset(
        tiny, frames_of_tokens(tiny.sample_tokens()), DataConfig(image_size_px=(64, 32), past=PastConfig())
    )
    ego, _ = detectors(history=HistoryConfig())
    stream = BevDetStream(ego)
    for index in range(3):
        batch = dataset[index, index]
        with torch.no_grad():
            whole = ego(batch)
        streamed = stream(replace(batch, past=None))
        close(streamed.bev["head"].features, whole.bev["head"].features)
        assert streamed.lidar2bev is not None and torch.equal(streamed.lidar2bev, whole.lidar2bev)
    rays: BevDetConfig = msgspec.structs.replace(TINY, history=HistoryConfig(align="rays"))
    with pytest.raises(ConfigError, match="a stream keeps maps"):
        BevDetStream(BevDet(rays))


def test_a_student_whose_map_lies_in_the_ego_frame_has_no_teacher() -> None:
    pair = RECIPES["bevdet_r50_from_centerpoint"]()
    with pytest.raises(ConfigError, match=r"in the ego frame, every teacher's in the LiDAR frame"):
        with_overrides(pair, ["student.frame=ego"])
    assert with_overrides(RECIPES["bevdet_r50"](), ["student.frame=ego"]).student is not None
