"""BEVFormer as a detector: sizes, history handed over, motion from poses, refused input."""

import math
from dataclasses import replace
from pathlib import Path

import msgspec.structs
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distillbev.boxes import Boxes3D
from distillbev.config import read_config, write_config
from distillbev.data.schema import Batch, PastFrames
from distillbev.errors import ConfigError, DataError
from distillbev.grid import BevGrid
from distillbev.models.attention import cell_reference
from distillbev.models.bevformer import (
    BevFormer,
    BevFormerConfig,
    EncoderConfig,
    bevformer_base,
    bevformer_small,
    bevformer_tiny,
    first_own_frame,
    project_anchors,
)
from distillbev.models.image_encoder import PlainCnnConfig, ResNetConfig, normalise_images
from distillbev.models.image_pyramid import ImagePyramid, ImagePyramidConfig
from distillbev.models.planar_motion import motion_between, planar_motion, rotate_map
from distillbev.models.query_head import QueryHeadConfig

GRID = BevGrid(x_range_m=(-16.0, 16.0), y_range_m=(-12.0, 12.0), cell_m=2.0)
CONFIG = BevFormerConfig(
    grid=GRID,
    image_encoder=ImagePyramidConfig(
        backbone=PlainCnnConfig(widths=(4, 8, 8), convs=(1, 1, 1)), strides=(4, 8)
    ),
    num_cameras=2,
    channels=16,
    encoder=EncoderConfig(layers=2, heads=2, ffn_channels=16, dropout=0.0),
    head=QueryHeadConfig(num_queries=6, layers=2, heads=2, ffn_channels=16, max_detections=10, dropout=0.0),
)


def model(config: BevFormerConfig = CONFIG) -> BevFormer:
    torch.manual_seed(0)
    return BevFormer(config)


def pose(yaw_rad: float, x_m: float, y_m: float) -> Tensor:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[0, :2] = torch.tensor([math.cos(yaw_rad), -math.sin(yaw_rad)])
    matrix[1, :2] = torch.tensor([math.sin(yaw_rad), math.cos(yaw_rad)])
    matrix[:2, 3] = torch.tensor([x_m, y_m])
    return matrix


def batch(seed: int = 0, poses: list[Tensor] | None = None) -> Batch:
    """Two cameras of 32 x 48 pixels, one looking forward (y of the LiDAR), one to the right (x)."""
    poses = poses or [pose(0.0, 0.0, 0.0), pose(0.5, 900.0, -300.0)]
    B = len(poses)
    generator = torch.Generator().manual_seed(seed)
    forward = torch.eye(4)
    forward[:3, :3] = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    right = torch.eye(4)
    right[:3, :3] = torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    cam2img = torch.eye(4)
    cam2img[0, 0] = cam2img[1, 1] = 30.0
    cam2img[0, 2], cam2img[1, 2] = 24.0, 16.0
    boxes = Boxes3D(torch.tensor([[2.0, 6.0, -0.5, 4.5, 1.9, 1.6, 0.3, 2.0, 1.0]]), torch.tensor([0]))
    return Batch(
        tokens=[f"sample{b}" for b in range(B)],
        images=torch.randint(0, 256, (B, 2, 3, 32, 48), generator=generator, dtype=torch.uint8),
        cam2img=cam2img.expand(B, 2, 4, 4),
        cam2lidar=torch.stack([forward, right]).expand(B, 2, 4, 4),
        image_aug=torch.eye(4).expand(B, 2, 4, 4),
        bev_aug=torch.eye(4).expand(B, 4, 4),
        lidar2global=torch.stack(poses),
        points=None,
        boxes=[boxes] * B,
    )


def sequence() -> list[Batch]:
    """Three frames of two scenes, the cars driving on and turning."""
    return [
        batch(i, [pose(0.1 * i, 0.5 * i, 1.5 * i), pose(0.5 - 0.2 * i, 900.0 + i, -300.0)]) for i in range(3)
    ]


@pytest.mark.parametrize(
    ("config", "published", "without_effect"),
    [
        # The reference counts ten loss weights, and embeddings of levels that the small models do not have.
        (bevformer_tiny(), 33_521_157, 10 + 3 * 256),
        (bevformer_small(), 59_463_619, 10 + 3 * 256),
        (bevformer_base(), 69_034_947, 10),
    ],
)
def test_sizes_are_the_published_ones_but_for_what_has_no_effect(
    config: BevFormerConfig, published: int, without_effect: int
) -> None:
    with torch.device("meta"):
        detector = BevFormer(config)
    assert sum(p.numel() for p in detector.parameters()) + without_effect == published


def test_a_step_reaches_every_parameter() -> None:
    detector, frames = model().train(), sequence()
    output = detector(frames[1], detector.remember_past(frames[:1]))
    assert {name: m.features.shape[1] for name, m in output.bev.items()} == detector.bev_channels
    assert output.bev["head"].features.shape == (2, 16, *GRID.shape)
    loss = torch.stack(list(detector.loss(output, frames[1]).values())).sum()
    loss.backward()
    assert loss.isfinite()
    without = [n for n, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    assert all(isinstance(found, Boxes3D) for found in detector.decode(output))


def test_nothing_is_remembered_inside_the_model() -> None:
    detector, frames = model().eval(), sequence()
    first = detector(frames[0]).bev["head"].features
    detector(frames[1], detector.remember(detector(frames[0]), frames[0]))
    assert torch.equal(detector(frames[0]).bev["head"].features, first)


def test_frames_one_by_one_give_what_the_past_given_at_once_gives() -> None:
    detector, frames = model().eval(), sequence()
    history = None
    for frame in frames[:2]:
        output = detector(frame, history)
        history = detector.remember(output, frame)
    streamed = detector(frames[2], history).bev["head"].features
    at_once = detector(frames[2], detector.remember_past(frames[:2])).bev["head"].features
    assert torch.equal(streamed, at_once)
    assert not torch.equal(streamed, detector(frames[2]).bev["head"].features)


def test_past_frames_take_no_gradient_and_leave_the_modes_as_they_were() -> None:
    detector, frames = model().train(), sequence()
    detector.image_encoder.eval()
    statistics = {n: b.clone() for n, b in detector.named_buffers()}
    history = detector.remember_past(frames[:2])
    assert history is not None and not history.bev.requires_grad
    assert detector.training and not detector.image_encoder.backbone.training
    assert all(torch.equal(b, statistics[n]) for n, b in detector.named_buffers())


def test_a_scene_that_begins_later_is_as_if_it_stood_alone() -> None:
    detector, frames = model().eval(), sequence()
    late = detector.remember_past(frames[:2], first=torch.tensor([0, 2]))
    both = detector(frames[2], late).bev["head"].features
    alone = detector(frames[2]).bev["head"].features
    torch.testing.assert_close(both[1], alone[1])
    assert not torch.allclose(both[0], alone[0])
    one = detector.remember_past(frames[:2], first=torch.tensor([1, 0]))
    again = detector(frames[2], detector.remember_past(frames[1:2])).bev["head"].features
    torch.testing.assert_close(detector(frames[2], one).bev["head"].features[0], again[0])


def test_a_batch_with_its_earlier_frames_is_as_if_they_came_one_by_one() -> None:
    detector, frames = model().eval(), sequence()
    streamed = detector(frames[2], detector.remember_past(frames[:2], torch.tensor([0, 1])))
    gaps_s = torch.tensor(
        [[0.5, 1.0], [0.5, 0.5]]
    )  # the second scene begins with the newer of the two frames
    joined = detector(replace(frames[2], past=PastFrames([frames[1], frames[0]], gaps_s)))
    assert torch.equal(joined.bev["head"].features, streamed.bev["head"].features)


def test_frames_that_stand_in_for_those_before_a_scene_are_passed_by() -> None:
    gaps_s = torch.tensor([[0.5, 1.0, 1.0], [0.0, 0.0, 0.0], [0.5, 1.0, 1.5]])
    assert first_own_frame(gaps_s).tolist() == [1, 3, 0]


def test_samples_do_not_touch_each_other() -> None:
    detector, frames = model().eval(), sequence()
    swapped = [batch(i, [frame.lidar2global[1], frame.lidar2global[0]]) for i, frame in enumerate(frames[:2])]
    for frame, other in zip(frames[:2], swapped, strict=True):
        assert frame.images is not None
        other.images = frame.images.flip(0)
    first = detector(frames[1], detector.remember_past(frames[:1])).bev["head"].features
    second = detector(swapped[1], detector.remember_past(swapped[:1])).bev["head"].features
    torch.testing.assert_close(first, second.flip(0), rtol=1e-4, atol=1e-5)


def test_a_small_model_learns_to_place_what_it_sees() -> None:
    """Red squares, of a size that tells how far they are, left or right in one of two cameras."""
    torch.manual_seed(0)
    detector = model().train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    for step in range(180):
        frame = squares(4, seed=step)
        optimizer.zero_grad()
        torch.stack(list(detector.loss(detector(frame), frame).values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 35.0)
        optimizer.step()
    frame = squares(32, seed=-1)
    places = torch.stack([boxes.boxes[0, :2] for boxes in frame.boxes if boxes is not None])
    found = torch.stack([best.boxes[0, :2] for best in detector.eval().decode(detector(frame))])
    guess = (places - places.mean(dim=0)).norm(dim=1).mean()
    assert (found - places).norm(dim=1).mean() < guess / 2


def squares(samples: int, seed: int) -> Batch:
    """Frames with one square of 2 m each, 5 to 11 m away in front or to the right."""
    rng = np.random.default_rng(seed + 1)
    frame = batch(0, [pose(0.0, 0.0, 0.0)] * samples)
    images = torch.full((samples, 2, 3, 32, 48), 60, dtype=torch.uint8)
    for i in range(samples):
        camera, away = int(rng.integers(2)), rng.uniform(5, 11)
        beside = rng.uniform(-0.4, 0.4) * away
        column, half = int(24 + 30 * beside / away), int(30 / away)
        red = torch.tensor([255, 30, 30], dtype=torch.uint8)[:, None, None]
        images[i, camera, :, 16 - half : 16 + half, max(column - half, 0) : column + half] = red
        place = [beside, away] if camera == 0 else [away, -beside]
        row = torch.tensor([[*place, 0.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0]])
        frame.boxes[i] = Boxes3D(row, torch.tensor([0]))
    return replace(frame, images=images)


def test_settings_are_read_as_they_were_written(tmp_path: Path) -> None:
    for config in (CONFIG, bevformer_base()):
        write_config(config, tmp_path / "model.yaml")
        assert read_config(tmp_path / "model.yaml", BevFormerConfig) == config


def test_weights_of_a_plain_backbone_start_a_deformable_one(tmp_path: Path) -> None:
    path = tmp_path / "resnet.safetensors"
    backbone = ResNetConfig(depth=50, base_width=2)
    plain = ImagePyramid(ImagePyramidConfig(backbone=backbone), 4)
    save_file({n: t.contiguous() for n, t in plain.backbone.state_dict().items()}, path)
    config = ImagePyramidConfig(backbone=backbone, deformable_stages=(3,), weights=str(path))
    deformable = ImagePyramid(config, 4)
    assert "tensors loaded" in str(deformable.load_backbone_weights())
    state = deformable.backbone.state_dict()
    for name, tensor in plain.backbone.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert plain.load_backbone_weights() is None


def test_recomputing_layers_changes_no_gradient() -> None:
    saving = msgspec.structs.replace(
        CONFIG, encoder=msgspec.structs.replace(CONFIG.encoder, checkpoint_layers=True)
    )
    gradients = []
    for config in (CONFIG, saving):
        detector = model(config).train()
        output = detector(batch())
        torch.stack(list(detector.loss(output, batch()).values())).sum().backward()
        gradients.append([p.grad for p in detector.parameters()])
    for plain, saved in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, saved)


@pytest.mark.parametrize("seed", range(5))
def test_a_standing_thing_is_found_in_the_history_where_it_was(seed: int) -> None:
    """Mark a cell before, move the car, and look from the cell that now covers the same ground."""
    rng = np.random.default_rng(seed)
    fine = BevGrid(x_range_m=(-16.0, 16.0), y_range_m=(-12.0, 12.0), cell_m=0.1)
    before, now = pose(2.0, 50.0, 7.0), pose(2.0 + rng.uniform(-0.6, 0.6), 50.0 + rng.uniform(-3, 3), 8.0)
    before2now = torch.linalg.inv(now) @ before
    motion = planar_motion(before2now[None])
    place = torch.tensor([*rng.uniform(-5, 5, size=2), 0.0, 1.0])
    column, row = fine.cell_coordinates(place[:2]).long().tolist()
    bev = torch.zeros(1, 1, *fine.shape)
    bev[0, 0, row - 2 : row + 3, column - 2 : column + 3] = 1.0  # half a metre
    turned = rotate_map(bev, motion.turn_rad, (160.0, 120.0))
    column, row = fine.cell_coordinates((before2now @ place)[:2]).long().tolist()
    seen_from = cell_reference(fine.shape).unflatten(0, fine.shape)[row, column]
    looked_at = seen_from + motion.forward_m[0] / torch.tensor([32.0, 24.0])
    column, row = (looked_at * torch.tensor([320, 240])).long().tolist()
    assert turned[0, 0, row, column] == 1.0


def test_motion_is_told_as_the_car_feels_it_whatever_the_place_in_the_world() -> None:
    driven = pose(0.1, 0.0, 2.0)  # two metres along y, forward, and a turn to the left
    here = planar_motion(torch.linalg.inv(driven)[None])
    somewhere = pose(2.5, 700.0, -80.0)
    there = planar_motion((torch.linalg.inv(somewhere @ driven) @ somewhere)[None])
    torch.testing.assert_close(here.signals, there.signals, rtol=1e-4, atol=1e-5)
    assert here.turn_rad.item() == pytest.approx(0.1)
    assert here.forward_m[0].tolist() == pytest.approx([2 * math.sin(0.1), 2 * math.cos(0.1)])
    assert here.signals[0, 0].item() == pytest.approx(2 * math.cos(0.1))
    assert here.signals[0, 17].item() == pytest.approx(math.degrees(0.1), rel=1e-5)


def test_a_mirrored_world_has_the_mirrored_motion() -> None:
    detector, frames = model(), sequence()[:2]
    history = detector.remember_past(frames[:1])
    assert history is not None
    plain = motion_between(history, frames[1], GRID)
    mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0])).expand(2, 4, 4)
    flipped = motion_between(replace(history, bev_aug=mirror), replace(frames[1], bev_aug=mirror), GRID)
    torch.testing.assert_close(flipped.turn_rad, -plain.turn_rad)
    torch.testing.assert_close(flipped.forward_m, plain.forward_m * torch.tensor([-1.0, 1.0]))


def test_a_pillar_is_seen_by_the_camera_that_looks_its_way() -> None:
    frame = batch()
    lidar2img = frame.cam2img @ torch.linalg.inv(frame.cam2lidar)
    anchors = torch.tensor([[[0.0, 8.0, 0.0]], [[8.0, 0.0, 0.0]], [[0.0, -8.0, 0.0]]])
    uv, visible = project_anchors(anchors, lidar2img, (32, 48))
    assert visible[0, :, :, 0].tolist() == [[True, False, False], [False, True, False]]
    torch.testing.assert_close(uv[0, 0, 0, 0], torch.tensor([0.5, 0.5]))


def test_bad_input_is_told_in_one_line() -> None:
    detector, frames = model().eval(), sequence()
    with pytest.raises(DataError, match="no images"):
        detector(replace(frames[0], images=None))
    many = replace(frames[0], images=frames[0].images.repeat(1, 2, 1, 1, 1))
    with pytest.raises(DataError, match="4 cameras, the model 2"):
        detector(many)
    unlabelled = replace(frames[0], boxes=[frames[0].boxes[0], None])
    with pytest.raises(DataError, match="sample1"):
        detector.loss(detector(frames[0]), unlabelled)
    history = detector.remember_past(frames[:1])
    assert history is not None
    elsewhere = batch(1, [pose(0.0, 0.0, 1.0), pose(0.0, 0.0, 0.0)])
    with pytest.raises(DataError, match="sample1: its history lies 949 m away"):
        detector(elsewhere, history)
    mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0])).expand(2, 4, 4)
    with pytest.raises(DataError, match="augment"):
        detector(replace(frames[1], bev_aug=mirror), history)
    with pytest.raises(DataError, match="1 maps"):
        detector(frames[1], replace(history, bev=history.bev[:1], present=history.present[:1]))


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="strides"):
        ImagePyramidConfig(strides=(8, 32))
    with pytest.raises(ConfigError, match="deformable_stages"):
        ImagePyramidConfig(backbone=ResNetConfig(depth=18), deformable_stages=(3,))
    with pytest.raises(ConfigError, match="start with one"):
        model(msgspec.structs.replace(CONFIG, image_encoder=ImagePyramidConfig(strides=(64,))))
    with pytest.raises(ConfigError, match="spatial_points"):
        EncoderConfig(spatial_points=6)
    with pytest.raises(ConfigError, match="channels"):
        msgspec.structs.replace(CONFIG, channels=18, head=QueryHeadConfig(heads=4))


def test_images_of_odd_sizes_are_seen_as_if_padded_with_the_mean_below_and_to_the_right() -> None:
    """32 x 48 pixels are whole cells of 8; of 29 x 43 nothing may shift, and the levels are as large."""
    detector, whole = model().eval(), batch()
    assert whole.images is not None
    cut = replace(whole, images=whole.images[..., :29, :43])
    floats = normalise_images(whole.images)
    floats[..., 29:, :] = 0
    floats[..., 43:] = 0
    with torch.no_grad():
        assert detector.image_encoder.padded_size(29, 43) == (32, 48)
        found, expected = detector(cut), detector(replace(whole, images=floats))
    torch.testing.assert_close(found.bev["head"].features, expected.bev["head"].features)
