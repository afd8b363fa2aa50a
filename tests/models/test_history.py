import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from tiny_nuscenes import KEYS_PER_SCENE, LANDMARK, edit_table
from tiny_student import TINY, make_batch
from torch import Tensor

from distillbev.boxes import Boxes3D
from distillbev.config import read_config, write_config
from distillbev.data.augment import BevAugConfig, ImageAugConfig
from distillbev.data.collate import collate
from distillbev.data.frames import Frame, FrameDataset, frames_of_tokens
from distillbev.data.samples import NuScenes
from distillbev.data.schema import Batch, PastFrames
from distillbev.data.settings import DataConfig, PastConfig
from distillbev.distill.teacher import take_from_batch
from distillbev.errors import ConfigError, DataError
from distillbev.geometry import pose_matrix, rotation_about_z
from distillbev.grid import BevGrid
from distillbev.models.bev_encoder import LssNeckConfig
from distillbev.models.bevdet import BevDet, BevDetConfig, BevDetStream
from distillbev.models.history import (
    HistoryConfig,
    PastMap,
    correlate,
    correlate_by_shifts,
    motion_to_past,
    scale_velocities,
    source_cells,
    warp_map,
    warp_map_by_loop,
)

GRID = BevGrid(x_range_m=(-12.8, 12.8), y_range_m=(-9.6, 9.6), cell_m=0.4)
DATA = DataConfig(image_size_px=(64, 32), past=PastConfig())
AUGMENTED = msgspec.structs.replace(
    DATA, image_aug=ImageAugConfig(), bev_aug=BevAugConfig(), past=PastConfig(training_steps=(1, 2))
)
# A turning, climbing drive far from the map's origin, and a mirrored, turned and scaled bird's-eye view.
LIDAR2EGO = pose_matrix(np.array([0.9, 0.0, 1.8]), rotation_about_z(-np.pi / 2))
BEV_AUG = torch.eye(4)
BEV_AUG[:3, :3] = torch.from_numpy(
    np.diag([-1.0, 1.0, 1.0]) @ (1.04 * rotation_about_z(0.3))
)  # flips x after turning


def lidar2global_at(seconds: float) -> Tensor:
    position = np.array([1400 + 6 * seconds, 900 + 2.5 * seconds, 0.0])
    return torch.from_numpy(pose_matrix(position, rotation_about_z(0.4 + 0.5 * seconds)) @ LIDAR2EGO)


def with_history(**settings) -> BevDetConfig:
    return msgspec.structs.replace(TINY, history=HistoryConfig(**settings))


def blob(lidar2global: Tensor, place: Tensor, radius_m: float = 1.6) -> Tensor:
    """(1, 1, Y, X): a soft spot on the augmented map of that moment, at a place (3,) of the world."""
    in_lidar = torch.linalg.inv(lidar2global) @ torch.cat([place.double(), torch.ones(1).double()])
    centre = (BEV_AUG.double() @ in_lidar)[:2].float()
    distance = (GRID.cell_centres() - centre).square().sum(dim=-1)
    return torch.exp(-distance / (2 * radius_m**2))[None, None]


def peak_m(bev: Tensor) -> Tensor:
    """(2,) where a single blob lies, by its centre of mass."""
    weight = bev[0, 0, ..., None]
    return (weight * GRID.cell_centres()).sum(dim=(0, 1)) / weight.sum()


def batch_at(seconds: float) -> Batch:
    batch = make_batch(samples=1, cameras=1)
    batch.lidar2global, batch.bev_aug = lidar2global_at(seconds)[None], BEV_AUG[None]
    return batch


def past_at(seconds: float, bev: Tensor) -> PastMap:
    return PastMap(bev, lidar2global_at(seconds)[None], BEV_AUG[None])


def moved_to_present(bev: Tensor, then_s: float, now_s: float) -> Tensor:
    return warp_map(bev, motion_to_past(past_at(then_s, bev), batch_at(now_s)), GRID)


# The world stands, the car moves.


def test_the_earlier_map_of_a_static_world_coincides_with_the_present_one() -> None:
    """Trees, seen from two places and headings, with the same augmentation of both maps."""
    trees = [torch.tensor([1404.0, 903.0, 0.0]), torch.tensor([1398.0, 899.0, 0.0])]
    for tree in trees:
        then, now = (blob(lidar2global_at(seconds), tree) for seconds in (0.0, 0.5))
        assert float((peak_m(then) - peak_m(now)).norm()) > 2.5  # the car has come far
        moved = moved_to_present(then, 0.0, 0.5)
        torch.testing.assert_close(moved, now, atol=0.02, rtol=0)
        assert float((peak_m(moved) - peak_m(now)).norm()) < 0.02


def test_what_the_earlier_map_did_not_cover_is_zero() -> None:
    ones = torch.ones(1, 1, *GRID.shape)
    moved = moved_to_present(ones, 0.0, 0.5)
    assert float(moved.max()) <= 1 + 1e-5
    assert 0.05 < float((moved == 0).float().mean()) < 0.5


def test_a_moving_object_is_displaced_by_its_velocity_times_the_gap() -> None:
    """As the head is asked to say: the displacement target of its velocity, in the augmented frame."""
    gap_s, velocity = 0.5, torch.tensor([4.0, -3.0, 0.0])  # over ground, global axes
    start = torch.tensor([1403.0, 903.0, 0.0])
    then, now = blob(lidar2global_at(0.0), start), blob(lidar2global_at(gap_s), start + gap_s * velocity)
    seen = peak_m(now) - peak_m(moved_to_present(then, 0.0, gap_s))

    global2augmented = BEV_AUG.double() @ torch.linalg.inv(lidar2global_at(gap_s))
    in_augmented = (global2augmented[:2, :3] @ velocity.double()).float()
    box = Boxes3D(torch.cat([torch.zeros(7), in_augmented])[None], torch.zeros(1, dtype=torch.int64))
    (target,) = scale_velocities([box], torch.tensor([gap_s]))
    torch.testing.assert_close(seen, target.boxes[0, 7:], atol=0.03, rtol=0)
    assert float(seen.norm()) > 2  # 2.5 m, scaled


def test_a_landmark_of_loaded_frames_falls_on_itself(tiny: NuScenes) -> None:
    """From the files: both frames' matrices, through the augmentation, lead to one place."""
    frames = [Frame("scene-a-sample-2")]
    dataset = FrameDataset(tiny, frames, AUGMENTED, train=True)
    for draw in range(4):
        batch = dataset[0, draw]
        assert batch.past is not None
        (past,) = batch.past.frames
        assert torch.equal(past.bev_aug, batch.bev_aug)
        assert torch.equal(past.image_aug, batch.image_aug)
        world = torch.cat([torch.from_numpy(LANDMARK), torch.ones(1)]).double()
        now, then = (
            frame.bev_aug[0].double() @ torch.linalg.inv(frame.lidar2global[0]) @ world
            for frame in (batch, past)
        )
        kept = PastMap(torch.zeros(1), past.lidar2global, past.bev_aug)
        moved = motion_to_past(kept, batch)[0].double() @ now
        torch.testing.assert_close(moved, then, atol=1e-4, rtol=0)
        assert float((now - then)[:2].norm()) > 1


# The warp.


@pytest.mark.parametrize("lower_corners", [False, True])
def test_the_warp_is_its_slow_twin_gradients_too(lower_corners: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    grid = BevGrid(x_range_m=(-4.0, 4.0), y_range_m=(-2.4, 3.2), cell_m=0.8)
    motion = torch.eye(4).repeat(2, 1, 1)
    motion[:, :2, :2] = torch.tensor([[[0.8, -0.6], [0.6, 0.8]], [[0.1, 1.0], [-1.0, 0.1]]])
    motion[:, :2, 3] = torch.tensor([[1.3, -0.7], [0.0, 0.4]])
    results = []
    for warp in (warp_map, warp_map_by_loop):
        bev = torch.randn(2, 3, *grid.shape, generator=generator.manual_seed(1)).requires_grad_()
        moved = warp(bev, motion, grid, lower_corners)
        (moved * torch.arange(moved.numel()).view_as(moved)).sum().backward()
        results.append((moved, bev.grad))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(("radius", "shape"), [(1, (5, 7)), (3, (9, 4)), (6, (4, 4))])
def test_the_correlation_is_its_slow_twin_gradients_too(radius: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(radius)
    maps = [torch.randn(2, 8, *shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    upstream = torch.randn(2, (2 * radius + 1) ** 2, *shape, generator=generator, dtype=torch.float64)
    results = []
    for function in (correlate, correlate_by_shifts):
        present, past = (bev.clone().requires_grad_() for bev in maps)
        likeness = function(present, past, radius)
        likeness.backward(upstream)
        results.append((likeness.detach(), present.grad, past.grad))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow)


def test_the_correlation_says_where_an_object_came_from() -> None:
    present, past = torch.zeros(1, 4, 12, 12), torch.zeros(1, 4, 12, 12)
    look = torch.tensor([0.3, -2.0, 0.1, 1.0])
    present[0, :, 6, 5], past[0, :, 4, 8] = look, 3 * look  # it came from two rows down, three columns right
    likeness = correlate(present, past, radius=3)[0].unflatten(0, (7, 7))
    torch.testing.assert_close(likeness[3 - 2, 3 + 3, 6, 5], torch.tensor(1.0))
    assert likeness.count_nonzero() == 1


def test_a_car_that_stands_leaves_the_map_as_it_is() -> None:
    bev = torch.randn(2, 3, *GRID.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(warp_map(bev, torch.eye(4).repeat(2, 1, 1), GRID), bev, atol=1e-4, rtol=0)


def test_a_turn_goes_about_the_car_unless_corners_stand_for_cells() -> None:
    """A half turn takes the map's centre onto itself; with corners it is off by a cell."""
    motion = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0]))[None]
    rows, columns = GRID.shape
    for lower_corners, sum_of_both in ((False, columns - 1), (True, columns)):
        cells = source_cells(motion, GRID, lower_corners)
        assert float(cells[0, 0, 3, 0]) == pytest.approx(sum_of_both - 3, abs=1e-4)
    assert rows != columns


# The detector.


def past_of(batch: Batch, count: int = 1) -> PastFrames:
    """Earlier frames with noise of their own, half a second apart, the car having come 1 m each time."""
    frames = []
    for k in range(count):
        generator = torch.Generator().manual_seed(k + 1)
        poses = batch.lidar2global.clone()
        poses[:, 1, 3] -= k + 1
        assert batch.images is not None
        images = torch.randint(0, 256, batch.images.shape, dtype=torch.uint8, generator=generator)
        frames.append(replace(batch, images=images, lidar2global=poses, boxes=[None] * len(batch)))
    gaps = 0.5 * torch.arange(1, count + 1).repeat(len(batch), 1)
    return PastFrames(frames, gaps)


@pytest.mark.parametrize(("extra", "added"), [(False, 0), (True, 512)])
def test_the_published_configuration_has_the_published_number_of_parameters(extra: bool, added: int) -> None:
    config = BevDetConfig(history=HistoryConfig(), bev_neck=LssNeckConfig(extra_norm_act=extra))
    with torch.device("meta"):
        detector = BevDet(config)
    assert sum(p.numel() for p in detector.parameters()) == 48_307_649 + added


@pytest.mark.parametrize("count", [1, 3])
def test_the_present_map_stands_before_the_earlier_ones(count: int) -> None:
    torch.manual_seed(0)
    detector, batch = BevDet(with_history(num_frames=count)).eval(), make_batch()
    batch.past = past_of(batch, count)
    joined = detector(batch).bev["lifted"].features
    assert joined.shape[1] == 6 * (1 + count) == detector.bev_channels["lifted"]
    assert torch.equal(joined[:, :6], detector.see(batch)[0])
    for k, frame in enumerate(batch.past.frames):
        alone = detector.see(frame)[0]
        kept = PastMap(alone, frame.lidar2global, frame.bev_aug)
        expected = warp_map(alone, motion_to_past(kept, batch), TINY.grid)
        torch.testing.assert_close(joined[:, 6 * (k + 1) : 6 * (k + 2)], expected)


@pytest.mark.parametrize("through", [False, True])
def test_gradients_reach_earlier_frames_only_where_asked(through: bool) -> None:
    torch.manual_seed(0)
    detector, batch = BevDet(with_history(train_through_past=through)), make_batch()
    batch.past = past_of(batch)
    (past,) = batch.past.frames
    assert past.images is not None
    past.images = past.images.float().requires_grad_()
    torch.stack(list(detector.loss(detector(batch), batch).values())).sum().backward()
    assert (past.images.grad is not None) == through
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_gradients_do_not_depend_on_bfloat16_s_kept_weights() -> None:
    """Autocast keeps cast weights; kept without gradient they would train nothing."""
    torch.manual_seed(0)
    detector, batch = BevDet(with_history()), make_batch()
    batch.past = past_of(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = detector.loss(detector(batch), batch)
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_velocities_are_displacements_inside_and_metres_per_second_outside() -> None:
    torch.manual_seed(0)
    detector, batch = BevDet(with_history()).eval(), make_batch()
    batch.past = past_of(batch)
    batch.past.gaps_s[:] = torch.tensor([[0.5], [0.0]])  # the second sample's scene has only begun
    output = detector(batch)
    torch.testing.assert_close(output.displacement_s, torch.tensor([0.5, 1 / 12]))
    in_seconds, raw = detector.decode(output), detector.head.decode(output.heads)
    for boxes, plain, gap in zip(in_seconds, raw, (0.5, 1 / 12), strict=True):
        assert len(boxes) > 0
        torch.testing.assert_close(boxes.boxes[:, 7:] * gap, plain.boxes[:, 7:])
        torch.testing.assert_close(boxes.boxes[:, :7], plain.boxes[:, :7])

    boxes = [sample for sample in batch.boxes if sample is not None]
    metres = scale_velocities(boxes, torch.tensor([0.5, 1 / 12]))
    expected = detector.head.loss(output.heads, detector.head.targets(metres))
    assert detector.loss(output, batch) == expected
    plain = BevDet(with_history(velocity="per_second")).eval()
    assert plain(batch).displacement_s is None


def test_an_unknown_velocity_stays_unknown() -> None:
    rows = torch.zeros(2, 9)
    rows[0, 7:] = math.nan
    rows[1, 7:] = 2.0
    (scaled,) = scale_velocities([Boxes3D(rows, torch.tensor([0, 1]))], torch.tensor([0.5]))
    assert scaled.boxes[0, 7:].isnan().all()
    assert scaled.boxes[1, 7:].tolist() == [1.0, 1.0]


def test_a_speed_that_only_two_frames_show_is_learned() -> None:
    """One spot at a random place, its speed independent of the place: one frame cannot beat a guess of zero."""
    torch.manual_seed(0)
    detector, batch = BevDet(with_history()), make_batch(samples=8, cameras=1)
    assert detector.fusion is not None
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-2)
    gaps_s, no_depth = torch.full((8, 1), 0.5), torch.zeros(0)
    shares = []  # of the error of a guess of zero
    for _ in range(160):
        place, velocity = torch.rand(8, 2) * 10 - 5, torch.rand(8, 2) * 12 - 6
        now, then = (detector.fusion.refine(spots(place - gap * velocity)) for gap in (0.0, 0.5))
        past = detector.past_map(then.detach(), batch)
        output = detector.detect_with_past(now, no_depth, batch, [past], gaps_s)
        boxes = torch.zeros(8, 9)
        boxes[:, :2], boxes[:, 3:6], boxes[:, 7:] = place, 2.0, velocity
        batch.boxes = [Boxes3D(box[None], torch.zeros(1, dtype=torch.int64)) for box in boxes]
        loss = detector.loss(output, batch)["velocity"]
        guess = 0.25 * 0.2 * 0.5 * velocity.abs().sum(dim=1).mean()  # weights of box and velocity, gap
        shares.append(float(loss.detach() / guess))
        optimizer.zero_grad()
        (20 * loss).backward()
        optimizer.step()
    assert np.mean(shares[-20:]) < 0.5, shares[-20:]


def spots(place: Tensor) -> Tensor:
    """(8, 2) metres -> (8, 6, Y, X): a soft spot in every channel."""
    distance = (TINY.grid.cell_centres() - place[:, None, None]).square().sum(dim=-1)
    return torch.exp(-distance / 2)[:, None].expand(-1, 6, -1, -1)


# Frame by frame.


def drive(tiny: NuScenes, config: DataConfig) -> Iterator[Batch]:
    """Both scenes, one after the other."""
    tokens = tiny.sample_tokens()
    dataset = FrameDataset(tiny, frames_of_tokens(tokens), config)
    for index in range(len(tokens)):
        yield dataset[index, index]


@pytest.mark.parametrize(("num_frames", "step"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_stream_gives_what_batches_with_their_past_give(tiny: NuScenes, num_frames: int, step: int) -> None:
    torch.manual_seed(0)
    detector = BevDet(with_history(num_frames=num_frames)).eval()
    stream = BevDetStream(detector, step)
    past = PastConfig(num_frames=num_frames, step=step)
    gaps = []
    for batch in drive(tiny, msgspec.structs.replace(DATA, past=past)):
        streamed = stream(replace(batch, past=None))
        with torch.no_grad():
            whole = detector(batch)
        torch.testing.assert_close(streamed.displacement_s, whole.displacement_s)
        for name, level in whole.bev.items():
            torch.testing.assert_close(streamed.bev[name].features, level.features, atol=1e-5, rtol=1e-5)
        assert batch.past is not None
        gaps.append(batch.past.gaps_s[0].tolist())
    first_step = [0.0, *[min(i, step) * 0.5 for i in range(1, KEYS_PER_SCENE)]]
    assert [gap[0] for gap in gaps] == pytest.approx(2 * first_step)  # each scene begins anew


def test_drives_side_by_side_are_as_each_alone(tiny: NuScenes) -> None:
    torch.manual_seed(0)
    detector = BevDet(with_history()).eval()
    batches = list(drive(tiny, msgspec.structs.replace(DATA, past=None)))
    first, second = batches[:KEYS_PER_SCENE], batches[KEYS_PER_SCENE:]
    alone, together = BevDetStream(detector), BevDetStream(detector)
    for ours, theirs in zip(first, second, strict=True):
        expected = alone(ours).bev["head"].features
        both = together(collate([theirs, ours])).bev["head"].features
        torch.testing.assert_close(both[1:], expected, atol=1e-5, rtol=1e-5)


def test_a_stream_refuses_what_does_not_follow(tiny: NuScenes) -> None:
    detector = BevDet(with_history()).eval()
    first, second, *_ = drive(tiny, msgspec.structs.replace(DATA, past=None))
    stream = BevDetStream(detector)
    stream(second)
    with pytest.raises(DataError, match=f"sample {first.tokens[0]} comes 0.50 s before"):
        stream(first)
    with pytest.raises(DataError, match="follows 1 drives, the batch has 2 samples"):
        stream(collate([first, second]))
    with pytest.raises(DataError, match="without scenes and timestamps_us"):
        stream(replace(second, scenes=None))
    with pytest.raises(ConfigError, match="no history"):
        BevDetStream(BevDet(TINY))
    with pytest.raises(ConfigError, match="correlation_cells=0"):
        HistoryConfig(correlation_cells=0)
    with pytest.raises(ConfigError, match="step=0"):
        BevDetStream(detector, step=0)


# The loader.


def test_without_a_past_a_batch_is_as_ever_and_with_one_the_present_is_the_same(tiny: NuScenes) -> None:
    frames = [Frame("scene-a-sample-2")]
    without = FrameDataset(tiny, frames, msgspec.structs.replace(AUGMENTED, past=None), train=True)[0, 7]
    assert without.past is None
    present = FrameDataset(tiny, frames, AUGMENTED, train=True)[0, 7]
    for name in ("images", "cam2img", "cam2lidar", "image_aug", "bev_aug", "lidar2global"):
        assert torch.equal(getattr(without, name), getattr(present, name)), name


def test_earlier_frames_are_those_frames_as_they_would_come_by_themselves(tiny: NuScenes) -> None:
    config = msgspec.structs.replace(DATA, past=PastConfig(num_frames=2))
    dataset = FrameDataset(tiny, frames_of_tokens(tiny.sample_tokens()), config)
    tokens = tiny.sample_tokens()
    index = tokens.index("scene-b-sample-2")
    batch = dataset[index, 0]
    assert batch.past is not None
    assert [frame.tokens for frame in batch.past.frames] == [["scene-b-sample-1"], ["scene-b-sample-0"]]
    torch.testing.assert_close(batch.past.gaps_s, torch.tensor([[0.5, 1.0]]))
    for frame in batch.past.frames:
        alone = dataset[tokens.index(frame.tokens[0]), 0]
        for name in ("images", "cam2img", "cam2lidar", "lidar2global", "scenes", "timestamps_us"):
            ours, theirs = getattr(frame, name), getattr(alone, name)
            assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs, name
        assert frame.points is None and frame.boxes == [None] and frame.past is None


def test_the_past_ends_where_its_scene_begins(tiny: NuScenes) -> None:
    """The oldest frame stands in, and the present one at the very start."""
    config = msgspec.structs.replace(DATA, past=PastConfig(num_frames=3))
    for scene in ("scene-a", "scene-b"):
        for i in range(KEYS_PER_SCENE):
            batch = FrameDataset(tiny, [Frame(f"{scene}-sample-{i}")], config)[0, 0]
            assert batch.past is not None
            expected = [max(i - back, 0) for back in (1, 2, 3)]
            assert [f.tokens[0] for f in batch.past.frames] == [f"{scene}-sample-{k}" for k in expected]
            torch.testing.assert_close(batch.past.gaps_s[0], torch.tensor([0.5 * (i - k) for k in expected]))
            assert {name for frame in batch.past.frames for name in frame.scenes or []} == {scene}


def test_a_table_that_leads_into_another_scene_is_refused(spoilt_root: Path) -> None:
    def cross(rows: list[dict]) -> None:
        for row in rows:
            if row["token"] == "scene-b-sample-0":
                row["prev"] = "scene-a-sample-2"

    edit_table(spoilt_root, "sample", cross)
    dataset = FrameDataset(
        NuScenes(spoilt_root), [Frame("scene-b-sample-1"), Frame("scene-b-sample-0")], DATA
    )
    assert dataset[0, 0].past is not None
    with pytest.raises(DataError, match=r"'scene-b-sample-0'.*of scene 'scene-a'.*expected an earlier"):
        dataset[1, 0]


def test_steps_back_are_drawn_in_training_only_and_with_the_draw(tiny: NuScenes) -> None:
    frames = [Frame("scene-a-sample-2")]
    training = FrameDataset(tiny, frames, AUGMENTED, train=True)

    def gap(dataset: FrameDataset, draw: int) -> float:
        past = dataset[0, draw].past
        assert past is not None
        return round(float(past.gaps_s[0, 0]), 3)

    drawn = [gap(training, draw) for draw in range(12)]
    assert set(drawn) == {0.5, 1.0}
    assert drawn == [gap(training, draw) for draw in range(12)]
    assert {gap(FrameDataset(tiny, frames, AUGMENTED), draw) for draw in range(12)} == {0.5}


def test_the_past_is_the_same_from_memory(tiny: NuScenes) -> None:
    tokens = tiny.sample_tokens()
    for config in (DATA, AUGMENTED):
        kept, fresh = (
            FrameDataset(tiny, frames_of_tokens(tokens), config, train=True, cache=cache)
            for cache in (True, False)
        )
        kept.fill_cache()
        for index in range(len(tokens)):
            ours, theirs = kept[index, 3].past, fresh[index, 3].past
            assert ours is not None and theirs is not None
            first, second = ours.frames[0].images, theirs.frames[0].images
            assert first is not None and second is not None and torch.equal(first, second)


def test_batches_with_a_past_are_joined_taken_apart_and_moved(tiny: NuScenes) -> None:
    dataset = FrameDataset(tiny, frames_of_tokens(tiny.sample_tokens()), DATA)
    pieces = [dataset[i, i] for i in range(4)]
    batch = collate(pieces)
    assert batch.past is not None
    assert [len(frame) for frame in batch.past.frames] == [4]
    assert batch.past.gaps_s.shape == (4, 1)
    chosen = batch.take([2, 1]).to("cpu")
    assert chosen.past is not None
    for place, index in enumerate((2, 1)):
        piece = pieces[index]
        assert piece.past is not None and chosen.tokens[place] == piece.tokens[0]
        past, own = chosen.past.frames[0], piece.past.frames[0]
        assert past.images is not None and own.images is not None
        assert torch.equal(past.images[place], own.images[0])
        assert torch.equal(chosen.past.gaps_s[place], piece.past.gaps_s[0])
        assert chosen.scenes is not None and piece.scenes is not None
        assert chosen.scenes[place] == piece.scenes[0]
    by_distiller = take_from_batch(batch, [2, 1])
    assert by_distiller.past is not None
    assert torch.equal(by_distiller.past.gaps_s, chosen.past.gaps_s)
    assert by_distiller.past.frames[0].tokens == chosen.past.frames[0].tokens
    with pytest.raises(DataError, match="earlier frames; a batch needs as many"):
        collate([pieces[0], replace(pieces[1], past=None)])


# Bad input.


def test_what_is_missing_is_said() -> None:
    detector, batch = BevDet(with_history(num_frames=2)), make_batch()
    with pytest.raises(DataError, match=r"joins 2 earlier frames, this batch has 0; set data\.past"):
        detector(batch)
    batch.past = past_of(batch, 1)
    with pytest.raises(DataError, match="joins 2 earlier frames, this batch has 1"):
        detector(batch)
    with pytest.raises(ConfigError, match="num_frames=0"):
        HistoryConfig(num_frames=0)
    with pytest.raises(ConfigError, match="gap_at_start_s=0"):
        HistoryConfig(gap_at_start_s=0.0)
    with pytest.raises(ConfigError, match="correlation_cells=0"):
        HistoryConfig(correlation_cells=0)
    with pytest.raises(ConfigError, match="step=0"):
        PastConfig(step=0)
    with pytest.raises(ConfigError, match=r"training_steps=\(3, 2\)"):
        PastConfig(training_steps=(3, 2))


def test_a_configuration_comes_back_from_its_file(tmp_path: Path) -> None:
    for config in (with_history(num_frames=2), AUGMENTED):
        write_config(config, tmp_path / "config.yaml")
        assert read_config(tmp_path / "config.yaml", type(config)) == config
