from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_nuscenes import edit_table

from distillbev.classes import CLASSES
from distillbev.data.augment import BevAugConfig, ImageAugConfig
from distillbev.data.collate import collate
from distillbev.data.frames import Frame, FrameDataset, frames_of_splits, frames_of_tokens
from distillbev.data.loader import make_inference_loader, make_loader, make_training_loader
from distillbev.data.samples import NuScenes
from distillbev.data.sampling import FrameGroup, TrainingBatches, balance_classes, batches_in_order
from distillbev.data.schema import Batch
from distillbev.data.settings import DataConfig
from distillbev.errors import ConfigError, DataError

PLAIN = DataConfig(image_size_px=(96, 48), num_sweeps=1)
AUGMENTED = msgspec.structs.replace(PLAIN, image_aug=ImageAugConfig(), bev_aug=BevAugConfig())


def dataset_of(nuscenes: NuScenes, config: DataConfig = PLAIN, **kwargs) -> FrameDataset:
    frames, _ = frames_of_splits(nuscenes, ["train"], ["val"])
    return FrameDataset(nuscenes, frames, config, **kwargs)


def assert_equal(first: Batch, second: Batch) -> None:
    assert first.tokens == second.tokens
    for name in ("images", "cam2img", "cam2lidar", "image_aug", "bev_aug", "lidar2global"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=0)
    assert first.points is not None
    assert second.points is not None
    for ours, theirs in zip(first.points, second.points, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for ours, theirs in zip(first.boxes, second.boxes, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=0, atol=0, equal_nan=True)
            assert ours.labels.tolist() == theirs.labels.tolist()


def test_a_batch_has_the_shapes_it_promises(tiny: NuScenes):
    dataset = dataset_of(tiny)
    batch = collate([dataset[0, 0], dataset[4, 1]])
    assert batch.tokens == ["scene-b-sample-0", "scene-a-sample-1"]
    assert batch.images is not None
    assert batch.points is not None
    assert (batch.images.shape, batch.images.dtype) == ((2, 3, 3, 48, 96), torch.uint8)
    assert batch.cam2img.shape == batch.cam2lidar.shape == batch.image_aug.shape == (2, 3, 4, 4)
    assert batch.cam2img.dtype == batch.bev_aug.dtype == torch.float32
    assert (batch.bev_aug.shape, batch.lidar2global.shape) == ((2, 4, 4), (2, 4, 4))
    assert batch.lidar2global.dtype == torch.float64
    assert batch.lidar2ego is not None and batch.lidar2ego.shape == (2, 4, 4)
    assert [points.shape[1] for points in batch.points] == [5, 5]
    assert batch.boxes[0] is not None
    assert batch.boxes[1] is None  # "val" was given as unlabelled


def test_targets_are_detection_classes_with_returns_and_keep_an_unknown_velocity(spoilt_root: Path):
    def only_sample_1(rows: list[dict]) -> None:
        for row in rows:
            row["num_lidar_pts"] = 3 if "barrier" in row["token"] else row["num_lidar_pts"]

    tiny = NuScenes(spoilt_root)
    boxes = FrameDataset(tiny, [Frame("scene-a-sample-1")], PLAIN)[0, 0].boxes[0]
    assert boxes is not None
    assert [CLASSES[label] for label in boxes.labels] == [
        "car",
        "pedestrian",
    ]  # no animal, no barrier without returns
    edit_table(spoilt_root, "sample_annotation", only_sample_1)
    boxes = FrameDataset(NuScenes(spoilt_root), [Frame("scene-a-sample-1")], PLAIN)[0, 0].boxes[0]
    assert boxes is not None
    assert [CLASSES[label] for label in boxes.labels] == ["car", "pedestrian", "barrier"]
    assert boxes.boxes[2, 7:9].isnan().all()


def test_targets_beyond_the_distance_asked_for_are_left_out(tiny: NuScenes):
    frames = [Frame("scene-a-sample-1")]
    every = FrameDataset(tiny, frames, PLAIN)[0, 0].boxes[0]
    assert every is not None
    distances = every.boxes[:, :2].abs().amax(dim=1)
    near = msgspec.structs.replace(PLAIN, max_box_distance_m=float(distances.mean()))
    kept = FrameDataset(tiny, frames, near)[0, 0].boxes[0]
    assert kept is not None
    torch.testing.assert_close(kept.boxes, every.boxes[distances < distances.mean()], equal_nan=True)
    assert 0 < len(kept) < len(every)


def test_a_point_of_the_world_keeps_its_pixel_through_all_augmentation(tiny: NuScenes):
    frames = [Frame("scene-a-sample-1")]
    plain = FrameDataset(tiny, frames, PLAIN)[0, 0]
    world = torch.rand(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 20 - 10
    world[:, 3] = 1
    for draw in range(5):
        moved = FrameDataset(tiny, frames, AUGMENTED, train=True)[0, draw]
        assert not torch.equal(moved.bev_aug, plain.bev_aug)
        for camera in range(3):

            def project(batch: Batch, points: torch.Tensor, camera: int = camera) -> torch.Tensor:
                cam2lidar = batch.cam2lidar[0, camera].double()
                return batch.cam2img[0, camera].double() @ torch.linalg.inv(cam2lidar) @ points.T

            before = torch.linalg.inv(plain.image_aug[0, camera].double()) @ project(plain, world)
            in_augmented_frame = world @ moved.bev_aug[0].double().T
            after = torch.linalg.inv(moved.image_aug[0, camera].double()) @ project(moved, in_augmented_frame)
            torch.testing.assert_close(after, before, rtol=0, atol=2e-3)


def test_augmented_points_stay_in_their_augmented_boxes(real: NuScenes):
    token = real.sample_tokens()[0]
    plain = FrameDataset(real, [Frame(token)], DataConfig(load_images=False))[0, 0]
    config = DataConfig(load_images=False, bev_aug=BevAugConfig())
    moved = FrameDataset(real, [Frame(token)], config, seed=5, train=True)[0, 1]

    def points_in_boxes(batch: Batch) -> list[int]:
        assert batch.points is not None
        boxes = batch.boxes[0]
        assert boxes is not None
        counts = []
        for x, y, z, length, width, height, yaw, *_ in boxes.boxes.double():
            offset = batch.points[0][:, :3].double() - torch.stack([x, y, z])
            along = offset[:, 0] * yaw.cos() + offset[:, 1] * yaw.sin()
            across = offset[:, 1] * yaw.cos() - offset[:, 0] * yaw.sin()
            inside = (along.abs() < length / 2 + 1e-3) & (across.abs() < width / 2 + 1e-3)
            counts.append(int((inside & (offset[:, 2].abs() < height / 2 + 1e-3)).sum()))
        return counts

    before, after = np.array(points_in_boxes(plain)), np.array(points_in_boxes(moved))
    assert before.sum() > 500
    assert np.abs(before - after).max() <= 1  # a point on a face may fall either way


def test_a_piece_depends_on_seed_and_draw_alone(tiny: NuScenes):
    first, again = (dataset_of(tiny, AUGMENTED, seed=7, train=True) for _ in range(2))
    again[2, 5]  # what was asked for before does not matter
    assert_equal(first[0, 11], again[0, 11])
    assert not torch.equal(first[0, 11].bev_aug, first[0, 12].bev_aug)
    other = dataset_of(tiny, AUGMENTED, seed=8, train=True)
    assert not torch.equal(first[0, 11].bev_aug, other[0, 11].bev_aug)


def test_augmentation_is_off_outside_training(tiny: NuScenes):
    dataset = dataset_of(tiny, AUGMENTED)
    assert_equal(dataset[1, 3], dataset_of(tiny, PLAIN)[1, 9])


@pytest.mark.parametrize("config", [PLAIN, AUGMENTED, msgspec.structs.replace(AUGMENTED, exact_jpeg=True)])
def test_a_cache_changes_no_bit(tiny: NuScenes, config: DataConfig):
    cached, plain = dataset_of(tiny, config, train=True, cache=True), dataset_of(tiny, config, train=True)
    cached.fill_cache()
    for index, draw in [(0, 1), (3, 2), (0, 3), (0, 1)]:
        assert_equal(cached[index, draw], plain[index, draw])


def test_a_cache_reads_no_file_twice(spoilt_root: Path):
    dataset = dataset_of(NuScenes(spoilt_root), AUGMENTED, train=True, cache=True)
    dataset.fill_cache()
    for path in [*spoilt_root.rglob("*.jpg"), *spoilt_root.rglob("*.bin")]:
        path.unlink()
    dataset[0, 4]


def test_workers_give_the_batches_of_a_single_process(tiny: NuScenes):
    def batches(workers: int, cache: bool = False) -> list[Batch]:
        dataset = dataset_of(tiny, AUGMENTED, seed=1, train=True, cache=cache)
        _, groups = frames_of_splits(tiny, ["train"], ["val"])
        return list(make_training_loader(dataset, groups, (2, 1), steps=3, workers=workers))

    alone = batches(0)
    assert [len(batch) for batch in alone] == [3, 3, 3]
    for others in (batches(1), batches(2), batches(2, cache=True)):
        for first, second in zip(alone, others, strict=True):
            assert_equal(first, second)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_leaves_the_loader_as_it_was_raised(spoilt_root: Path, workers: int):
    path = spoilt_root / "samples" / "CAM_FRONT" / "scene-b-CAM_FRONT-1.jpg"
    path.write_bytes(path.read_bytes()[:500])
    loader = make_inference_loader(dataset_of(NuScenes(spoilt_root)), batch_size=1, workers=workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    message = str(caught.value)
    assert message.startswith(f"{path} (500 bytes): unreadable image")
    assert "\n" not in message
    assert "worker" not in message


def test_inference_takes_every_frame_once_and_reads_no_label(tiny: NuScenes):
    tokens = tiny.sample_tokens()
    loader = make_inference_loader(FrameDataset(tiny, frames_of_tokens(tokens), PLAIN), batch_size=4)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [4, 2]
    assert len(loader) == 2
    assert [token for batch in batches for token in batch.tokens] == tokens
    assert all(boxes is None for batch in batches for boxes in batch.boxes)
    assert batches_in_order(0, 4) == []


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_processes_together_infer_every_frame_once(tiny: NuScenes, world_size: int):
    dataset = dataset_of(tiny, msgspec.structs.replace(PLAIN, load_images=False, load_points=False))
    shares = [
        [token for batch in make_inference_loader(dataset, 2, 0, rank, world_size) for token in batch.tokens]
        for rank in range(world_size)
    ]
    assert Counter(token for share in shares for token in share) == Counter(tiny.sample_tokens())


def test_processes_together_train_on_the_balanced_frames_of_one(tiny: NuScenes):
    dataset = dataset_of(tiny, msgspec.structs.replace(PLAIN, load_images=False, load_points=False), seed=5)
    _, groups = frames_of_splits(tiny, ["train"], ["val"])

    def tokens(rank: int, world_size: int) -> list[list[str]]:
        loader = make_training_loader(
            dataset, groups, (2, 2), 6, rank=rank, world_size=world_size, class_balanced=True
        )
        return [batch.tokens for batch in loader]

    for whole, first, second in zip(tokens(0, 1), tokens(0, 2), tokens(1, 2), strict=True):
        assert sorted(first + second) == sorted(whole)


def test_images_or_points_can_be_left_out(tiny: NuScenes):
    lidar = dataset_of(tiny, msgspec.structs.replace(PLAIN, load_images=False))[0, 0]
    camera = dataset_of(tiny, msgspec.structs.replace(PLAIN, load_points=False))[0, 0]
    assert lidar.images is None
    assert lidar.points is not None
    assert lidar.cam2img.shape == (1, 3, 4, 4)
    assert camera.points is None
    assert camera.images is not None


def test_cameras_come_in_the_order_asked_for(tiny: NuScenes):
    both = dataset_of(tiny, msgspec.structs.replace(PLAIN, cameras=("CAM_SIDE", "CAM_FRONT")))[0, 0]
    every = dataset_of(tiny)[0, 0]  # front, back, side
    torch.testing.assert_close(both.cam2lidar[0], every.cam2lidar[0, [2, 0]])


def test_an_unknown_camera_lists_those_of_the_rig(tiny: NuScenes):
    config = msgspec.structs.replace(PLAIN, cameras=("CAM_FRONT", "CAM_TOP"))
    with pytest.raises(DataError, match=r"no camera CAM_TOP; the rig has CAM_FRONT, CAM_BACK, CAM_SIDE"):
        dataset_of(tiny, config)[0, 0]


def test_samples_of_different_rigs_do_not_make_a_batch(tiny: NuScenes):
    front = dataset_of(tiny, msgspec.structs.replace(PLAIN, cameras=("CAM_FRONT",)))
    with pytest.raises(DataError, match=r"has 1 cameras, sample scene-b-sample-1 has 3.*name the cameras"):
        collate([front[0, 0], dataset_of(tiny)[1, 0]])


def test_an_image_without_a_size_in_the_table_is_named(spoilt_root: Path):
    edit_table(spoilt_root, "sample_data", lambda rows: [row.update(width=0) for row in rows])
    with pytest.raises(DataError, match=r"sample_data\.json gives the size 0x90"):
        dataset_of(NuScenes(spoilt_root))[0, 0]


GROUPS = [FrameGroup(list(range(10)), per_step=2), FrameGroup(list(range(10, 17)), per_step=2)]


def test_every_step_takes_its_share_of_each_group_and_every_pass_sees_each_frame_once():
    steps = list(TrainingBatches(GROUPS, seed=0, steps=35))
    for step in steps:
        assert [frame >= 10 for frame, _ in step] == [False, False, True, True]
    assert Counter(frame for step in steps[:5] for frame, _ in step[:2]) == Counter(range(10))
    assert Counter(frame for step in steps[5:10] for frame, _ in step[:2]) == Counter(range(10))
    assert [step[:2] for step in steps[:5]] != [step[:2] for step in steps[5:10]]
    assert Counter(frame for step in steps[:7] for frame, _ in step[2:]) == Counter(2 * list(range(10, 17)))
    draws = [draw for step in steps for _, draw in step]
    assert len(set(draws)) == len(draws)


def test_a_run_resumed_at_a_step_goes_on_with_the_same_batches():
    whole = list(TrainingBatches(GROUPS, seed=3, steps=20))
    assert list(TrainingBatches(GROUPS, seed=3, steps=20, first_step=13)) == whole[13:]
    assert len(TrainingBatches(GROUPS, seed=3, steps=20, first_step=13)) == 7
    assert list(TrainingBatches(GROUPS, seed=4, steps=20)) != whole


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_and_parts_together_see_the_batch_of_one_process(world_size: int, accumulate: int):
    whole = list(TrainingBatches(GROUPS, seed=3, steps=6))
    shares = [
        list(TrainingBatches(GROUPS, 3, 6, accumulate=accumulate, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for step, expected in enumerate(whole):
        parts = [share[step * accumulate + part] for share in shares for part in range(accumulate)]
        assert sorted(piece for part in parts for piece in part) == sorted(expected)
        assert len({len(part) for part in parts}) == 1


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match="a step of 4 frames cannot be shared evenly by 3 processes"):
        TrainingBatches(GROUPS, 0, 1, world_size=3)
    with pytest.raises(ConfigError, match="2 frames of a group that has none"):
        TrainingBatches([FrameGroup([], 2)], 0, 1)
    with pytest.raises(ConfigError, match="a step of 0 frames"):
        TrainingBatches([FrameGroup([1], 0)], 0, 1)


def test_balanced_classes_are_drawn_through_equally_many_frames():
    labels = [{0}] * 90 + [{0, 1}] * 8 + [{2}] * 2 + [set()] * 5
    frames = balance_classes(labels, seed=0)
    share = 36  # 98 + 8 + 2 pairs of frame and class, three classes
    assert 3 * share - 3 <= len(frames) <= 3 * share  # the reference loses one where it rounds
    assert share - 1 <= sum(2 in labels[frame] for frame in frames) <= share
    assert sum(1 in labels[frame] for frame in frames) >= share
    assert all(labels[frame] for frame in frames)
    assert balance_classes(labels, seed=0) == frames
    with pytest.raises(DataError, match="nothing to balance"):
        balance_classes([set(), set()], seed=0)


def balance_as_the_reference(labels_of_frames: list[set[int]], rng: np.random.Generator) -> list[int]:
    """mmdetection3d's CBGSDataset, retold step by step; every class occurs."""
    num_classes = len(set().union(*labels_of_frames))
    frames_of_class: list[list[int]] = [[] for _ in range(num_classes)]
    for frame in range(len(labels_of_frames)):
        for label in range(num_classes):
            if label in labels_of_frames[frame]:
                frames_of_class[label].append(frame)
    num_pairs = sum(len(frames) for frames in frames_of_class)
    balanced = []
    for label in range(num_classes):
        share_now = len(frames_of_class[label]) / num_pairs
        ratio = (1.0 / num_classes) / share_now
        for frame in rng.choice(frames_of_class[label], int(len(frames_of_class[label]) * ratio)):
            balanced.append(int(frame))
    return balanced


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1))
def test_class_balance_equals_the_rule_of_the_reference(seed: int):
    rng = np.random.default_rng(seed)
    num_classes = int(rng.integers(1, 11))
    frequency = rng.uniform(0.02, 1.0, num_classes)
    labels = [set(np.flatnonzero(rng.random(num_classes) < frequency).tolist()) for _ in range(60)]
    labels.append(set(range(num_classes)))
    expected = balance_as_the_reference(labels, np.random.default_rng(seed))
    assert balance_classes(labels, seed) == expected


def test_class_balance_reaches_the_loader(tiny: NuScenes):
    dataset = dataset_of(tiny)
    _, groups = frames_of_splits(tiny, ["train"], ["val"])
    loader = make_training_loader(dataset, groups, (1, 0), steps=50, class_balanced=True)
    tokens = Counter(token for batch in loader for token in batch.tokens)
    # The car is in all three frames, the pedestrian in the first two: those are drawn more often.
    assert set(tokens) <= {f"scene-b-sample-{i}" for i in range(3)}
    assert tokens["scene-b-sample-2"] < tokens["scene-b-sample-0"] + tokens["scene-b-sample-1"]


@pytest.mark.parametrize(
    "values", [{"image_size_px": (0, 10)}, {"num_sweeps": -1}, {"cameras": ()}, {"cameras": ("A", "A")}]
)
def test_impossible_settings_are_refused(values: dict):
    with pytest.raises(ConfigError, match=next(iter(values))):
        DataConfig(**values)


def test_an_explicit_list_of_batches_is_kept(tiny: NuScenes):
    loader = make_loader(dataset_of(tiny), [[(2, 0), (0, 1)], [(1, 2)]])
    assert [batch.tokens for batch in loader] == [
        ["scene-b-sample-2", "scene-b-sample-0"],
        ["scene-b-sample-1"],
    ]
