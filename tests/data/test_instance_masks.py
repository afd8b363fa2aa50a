import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from distillbev.classes import CLASSES
from distillbev.data.instance_masks import (
    InstanceMasks,
    MaskErrors,
    MaskFiles,
    WorldMasks,
    degrade_masks,
    grow_mask,
)
from distillbev.data.samples import NuScenes
from distillbev.data.schema import Sample
from distillbev.data.virtual_points import VirtualPointsConfig, make_virtual_points
from distillbev.errors import DataError
from distillbev.geometry import invert_rigid, transform_points
from distillbev.world.settings import SplitConfig, WorldConfig
from distillbev.world.simulate import simulate

CAR, PEDESTRIAN = CLASSES.index("car"), CLASSES.index("pedestrian")
WIDTH, HEIGHT = 40, 20


def rectangle(rows: slice, columns: slice) -> NDArray[np.bool_]:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[rows, columns] = True
    return mask


def test_a_mask_grows_and_shrinks_by_pixels() -> None:
    mask = rectangle(slice(5, 9), slice(10, 16))
    grown = grow_mask(mask, 1)
    assert grown.sum() == 4 * 6 + 2 * (4 + 6)
    assert np.array_equal(grow_mask(mask, -1), rectangle(slice(6, 8), slice(11, 15)))
    assert np.array_equal(grow_mask(mask, 0), mask)


def test_a_detector_s_errors_have_the_rates_asked_for() -> None:
    mask = rectangle(slice(5, 15), slice(10, 30))
    many = InstanceMasks(np.tile(mask, (2000, 1, 1)), np.full(2000, PEDESTRIAN), np.ones(2000, np.float32))
    errors = MaskErrors(miss_rate=0.2, confusion_rate=0.3, outline_px=2, mean_score=0.8)
    worse = degrade_masks(many, errors, np.random.default_rng(1))
    assert abs(len(worse) / 2000 - 0.8) < 0.03
    wrong = worse.labels != PEDESTRIAN
    assert abs(wrong.mean() - 0.3) < 0.04
    assert set(worse.labels) == set(range(len(CLASSES)))
    assert worse.scores[wrong].mean() < 0.5 < 0.7 < worse.scores[~wrong].mean()
    assert len({int(m.sum()) for m in worse.masks}) == 5  # outlines by -2 to 2 pixels


def test_without_errors_a_detector_s_masks_are_the_true_ones() -> None:
    errors = MaskErrors(miss_rate=0, confusion_rate=0, outline_px=0, min_pixels=5)
    large, small = rectangle(slice(5, 15), slice(10, 30)), rectangle(slice(0, 2), slice(0, 2))
    two = InstanceMasks(np.array([large, small]), np.array([CAR, PEDESTRIAN]), np.ones(2, np.float32))
    same = degrade_masks(two, errors, np.random.default_rng(0))
    assert np.array_equal(same.masks, [large])
    assert same.labels.tolist() == [CAR]


@pytest.fixture
def sample(tiny: NuScenes) -> Sample:
    return tiny.sample(tiny.sample_tokens()[1])


@pytest.fixture
def masks(sample: Sample, tmp_path: Path) -> Path:
    """In every image a car on the left."""
    for camera in sample.cameras:
        numbers = np.zeros(camera.size_wh_px[::-1], dtype=np.uint8)
        numbers[:, :50] = 1
        stem = tmp_path / camera.channel / camera.path.stem
        stem.parent.mkdir()
        Image.fromarray(numbers).save(f"{stem}.png")
        listing = {"instances": [{"id": 1, "class": "car", "score": 0.9}]}
        Path(f"{stem}.json").write_text(json.dumps(listing))
    return tmp_path


def test_mask_files_give_masks_classes_and_scores(sample: Sample, masks: Path) -> None:
    found = MaskFiles(masks)(sample)
    assert len(found) == len(sample.cameras)
    for camera, instances in zip(sample.cameras, found, strict=True):
        width, height = camera.size_wh_px
        assert instances.masks.shape == (1, height, width)
        assert instances.masks[0, :, :50].all() and not instances.masks[0, :, 50:].any()
        assert instances.labels.tolist() == [CAR]
        assert instances.scores.tolist() == pytest.approx([0.9])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda png, listing: png.unlink(), "no such mask image"),
        (lambda png, listing: png.write_bytes(b"none"), "unreadable mask image"),
        (lambda png, listing: Image.new("L", (3, 2)).save(png), r"shape \(2, 3\).*90 rows by 160 columns"),
        (lambda png, listing: Image.new("RGB", (160, 90)).save(png), "one channel"),
        (lambda png, listing: listing.unlink(), "no such list of instances"),
        (lambda png, listing: listing.write_text("{}"), "not a list of instances"),
        (lambda png, listing: listing.write_text('{"instances": []}'), "no instance 1"),
        (
            lambda png, listing: listing.write_text(listing.read_text().replace("car", "care")),
            "class 'care'; expected one of car",
        ),
        (lambda png, listing: listing.write_text(listing.read_text().replace("0.9", "9")), "score 9"),
    ],
)
def test_mask_files_at_odds_with_their_format_are_refused(
    sample: Sample, masks: Path, spoil, message: str
) -> None:
    camera = sample.cameras[0]
    stem = masks / camera.channel / camera.path.stem
    spoil(stem.with_suffix(".png"), stem.with_suffix(".json"))
    with pytest.raises(DataError, match=message):
        MaskFiles(masks)(sample)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> NuScenes:
    root = tmp_path_factory.mktemp("world") / "world"
    config = WorldConfig(
        splits=(SplitConfig(name="train", scenes=1),),
        key_frames_per_scene=1,
        image_size_px=(176, 99),
        lidar_sweeps=0,
        lidar_azimuth_steps=360,
    )
    simulate(config, root, processes=1, progress=False)
    return NuScenes(root)


def test_true_masks_of_a_simulated_world_cover_their_objects_points(world: NuScenes) -> None:
    sample = world.sample(world.sample_tokens()[0])
    added = make_virtual_points(
        sample, WorldMasks(world.root), VirtualPointsConfig(), np.random.default_rng(0)
    )
    assert len(added.copies) > 20 and len(added.virtual) >= 50
    assert (added.copies[:, -1] == 1).all()
    # A copied point lies in the box of an object of its class, or nearly: pixels are coarse, sensors apart.
    box2global, sizes = world.annotation_poses(sample.token)
    assert sample.annotations is not None
    points = transform_points(sample.lidar2global, added.copies[:, :3].astype(np.float64))
    explained = np.zeros(len(points), dtype=bool)
    for pose, size, label in zip(box2global, sizes, sample.annotations.labels, strict=True):
        if label >= 0:
            inside = (np.abs(transform_points(invert_rigid(pose), points)) <= size / 2 + 0.3).all(axis=1)
            explained |= inside & (added.copies[:, 4 + label] == 1)
    assert explained.mean() > 0.6


def test_a_world_without_masks_and_a_frame_without_labels_are_refused(
    world: NuScenes, tiny: NuScenes
) -> None:
    with pytest.raises(DataError, match="simulated with masks"):
        WorldMasks(tiny.root)(tiny.sample(tiny.sample_tokens()[0]))
    with pytest.raises(DataError, match="came without annotations"):
        WorldMasks(world.root)(world.sample(world.sample_tokens()[0], read_annotations=False))
