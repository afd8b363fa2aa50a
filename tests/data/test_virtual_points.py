import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from distillbev.classes import CLASSES
from distillbev.data.instance_masks import InstanceMasks, MaskErrors, MaskFiles
from distillbev.data.samples import NuScenes
from distillbev.data.schema import Sample
from distillbev.data.virtual_points import (
    FLAG_COLUMN,
    TIME_COLUMN,
    VirtualPoints,
    VirtualPointsConfig,
    lift_masks,
    load_mvp_points,
    make_virtual_points,
    prepare_virtual_points,
    read_virtual_points,
    sample_pixels,
    virtual_points_path,
    write_virtual_points,
)
from distillbev.errors import ConfigError, DataError
from distillbev.geometry import invert_rigid, project_to_image, transform_points

CAR, PEDESTRIAN = CLASSES.index("car"), CLASSES.index("pedestrian")
# A camera at the LiDAR that looks along y: its x is LiDAR x, its y is LiDAR -z.
LIDAR2CAM = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
CAM2IMG = np.array([[10.0, 0, 20, 0], [0, 10, 10, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
WIDTH, HEIGHT = 40, 20


def rectangle(rows: slice, columns: slice) -> NDArray[np.bool_]:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[rows, columns] = True
    return mask


def found(*masks: NDArray[np.bool_], labels: tuple[int, ...] = (CAR, PEDESTRIAN)) -> InstanceMasks:
    num = len(masks)
    return InstanceMasks(
        np.array(masks).reshape(num, HEIGHT, WIDTH),
        np.array(labels[:num], dtype=np.int64),
        np.linspace(0.9, 0.6, num, dtype=np.float32),
    )


def lift(points: list[list[float]], instances: InstanceMasks, pixels: list[list[list[int]]]) -> VirtualPoints:
    drawn = np.array(pixels, dtype=np.int64)
    return lift_masks(np.array(points), CAM2IMG[None], LIDAR2CAM[None], [instances], [drawn])


def test_a_drawn_pixel_takes_the_depth_of_the_nearest_point_of_its_instance() -> None:
    # At 10 m and 20 m ahead, in columns 20 and 25; a pixel 24 lies nearer the second, a pixel 21 the first.
    points = [[0.05, 10.0, -0.05, 7.0], [11.0, 20.0, -0.1, 8.0]]
    lifted = lift(points, found(rectangle(slice(5, 15), slice(15, 30))), [[[21, 10], [24, 12]]])
    expected = [[10 * 1.5 / 10, 10.0, -10 * 0.5 / 10], [20 * 4.5 / 10, 20.0, -20 * 2.5 / 10]]
    assert np.allclose(lifted.virtual[:, :3], expected)
    assert (lifted.virtual[:, 3:].argmax(axis=1) == CAR).all()
    assert np.allclose(lifted.virtual[:, -1], 0.9)
    assert np.allclose(lifted.copies[:, :4], points)


def test_where_masks_overlap_a_point_belongs_to_the_first() -> None:
    both = rectangle(slice(5, 15), slice(15, 30))
    lifted = lift([[0.0, 10.0, 0.0, 1.0]], found(both, both), [[[20, 10]], [[20, 10]]])
    assert len(lifted.virtual) == 1
    assert lifted.copies[0, 4 + CAR] == 1 and lifted.copies[0, 4 + PEDESTRIAN] == 0


def test_points_behind_outside_and_in_no_mask_give_nothing() -> None:
    points = [[0.0, -10.0, 0.0, 1.0], [100.0, 10.0, 0.0, 1.0], [-18.0, 10.0, 0.0, 1.0]]
    lifted = lift(points, found(rectangle(slice(5, 15), slice(15, 30))), [[[20, 10]]])
    assert lifted.virtual.shape == (0, 14)
    assert lifted.copies.shape == (0, 15)


def test_pixels_are_distinct_ones_of_the_mask_and_a_small_mask_repeats_its_first() -> None:
    mask = rectangle(slice(2, 6), slice(3, 8))
    drawn = sample_pixels(mask, 20, np.random.default_rng(0))
    assert len(np.unique(drawn, axis=0)) == 20 == mask.sum()
    assert mask[drawn[:, 1], drawn[:, 0]].all()
    few = sample_pixels(rectangle(slice(2, 3), slice(3, 6)), 8, np.random.default_rng(0))
    assert len(np.unique(few[:3], axis=0)) == 3
    assert (few[3:] == few[0]).all()


# Files of a dataset


def write_mask_files(nuscenes: NuScenes, folder: Path) -> None:
    """In every image a car on the left and a pedestrian on the right."""
    for token in nuscenes.sample_tokens():
        for camera in nuscenes.sample(token).cameras:
            width, height = camera.size_wh_px
            numbers = np.zeros((height, width), dtype=np.uint16)
            numbers[height // 4 :, : width // 3] = 1
            numbers[height // 4 :, width // 2 :] = 300
            stem = folder / camera.channel / camera.path.stem
            stem.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(numbers).save(f"{stem}.png")
            rows = [
                {"id": 1, "class": "car", "score": 0.9},
                {"id": 300, "class": "pedestrian", "score": 0.4},
            ]
            Path(f"{stem}.json").write_text(json.dumps({"instances": rows}))


@pytest.fixture
def masks(tiny: NuScenes, tmp_path: Path) -> Path:
    write_mask_files(tiny, tmp_path / "masks")
    return tmp_path / "masks"


@pytest.fixture
def sample(tiny: NuScenes) -> Sample:
    return tiny.sample(tiny.sample_tokens()[1], num_sweeps=3)


def test_virtual_points_project_into_their_masks_and_copies_are_measured(sample: Sample, masks: Path) -> None:
    read_masks = MaskFiles(masks)
    added = make_virtual_points(sample, read_masks, VirtualPointsConfig(), np.random.default_rng(0))
    assert len(added.virtual) and len(added.virtual) % 50 == 0
    landed = np.zeros(len(added.virtual), dtype=bool)
    for camera, instances in zip(sample.cameras, read_masks(sample), strict=True):
        lidar2cam = invert_rigid(camera.ego2global @ camera.cam2ego) @ sample.lidar2global
        pixels, depth = project_to_image(
            camera.cam2img, transform_points(lidar2cam, added.virtual[:, :3].astype(np.float64))
        )
        inside = (depth > 0) & ((pixels >= 0) & (pixels < camera.size_wh_px)).all(axis=1)
        column, row = np.floor(np.where(inside[:, None], pixels, 0)).astype(int).T
        for mask, label in zip(instances.masks, instances.labels, strict=True):
            landed |= inside & mask[row, column] & (added.virtual[:, 3 + label] == 1)
    assert landed.all()
    assert len(added.copies)


def test_a_score_threshold_drops_instances(sample: Sample, masks: Path) -> None:
    config = VirtualPointsConfig(min_score=0.5)
    added = make_virtual_points(sample, MaskFiles(masks), config, np.random.default_rng(0))
    assert added.virtual[:, 3 + CAR].any() and not added.virtual[:, 3 + PEDESTRIAN].any()


def test_preparing_writes_every_key_frame_once_and_goes_on_where_it_stopped(
    tiny: NuScenes, masks: Path, tmp_path: Path
) -> None:
    config, folder = VirtualPointsConfig(points_per_instance=5), tmp_path / "virtual"
    written = list(prepare_virtual_points(tiny, MaskFiles(masks), folder, config))
    assert len(written) == len(tiny.sample_tokens()) and None not in written
    first, second = (path for path in written[:2] if path is not None)
    whole = read_virtual_points(first)
    first.write_bytes(first.read_bytes()[:100])  # a damaged one is made again
    second.unlink()
    again = list(prepare_virtual_points(tiny, MaskFiles(masks), folder, config))
    assert again == [first, second, *[None] * (len(written) - 2)]
    assert np.array_equal(read_virtual_points(first).virtual, whole.virtual)
    with pytest.raises(ConfigError, match="made with"):
        next(prepare_virtual_points(tiny, MaskFiles(masks), folder, VirtualPointsConfig()))


def test_workers_prepare_the_same_points(tiny: NuScenes, masks: Path, tmp_path: Path) -> None:
    config = VirtualPointsConfig(points_per_instance=5, mask_errors=MaskErrors())
    tokens = tiny.sample_tokens()[:2]
    alone = list(prepare_virtual_points(tiny, MaskFiles(masks), tmp_path / "a", config, tokens))
    shared = list(
        prepare_virtual_points(tiny, MaskFiles(masks), tmp_path / "b", config, tokens, num_workers=1)
    )
    for one, other in zip(alone, shared, strict=True):
        assert one is not None and other is not None
        assert np.array_equal(read_virtual_points(one).virtual, read_virtual_points(other).virtual)


def test_only_the_key_sweep_has_virtual_points_and_the_others_are_counted(
    tiny: NuScenes, sample: Sample, masks: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "virtual"
    list(prepare_virtual_points(tiny, MaskFiles(masks), folder, VirtualPointsConfig(), [sample.token]))
    points, num_absent = load_mvp_points(sample, folder, absent="measured_only")
    assert num_absent == 3
    assert sorted(np.unique(points[:, FLAG_COLUMN])) == [-1, 0, 1]
    assert (points[points[:, FLAG_COLUMN] < 1, TIME_COLUMN] == 0).all()
    assert len(np.unique(points[:, TIME_COLUMN])) == 4
    with pytest.raises(DataError, match="no virtual points of this sweep"):
        load_mvp_points(sample, folder)


@pytest.mark.parametrize("absent", ["error", "measured_only", "drop_sweep"])
def test_a_key_frame_without_virtual_points_is_an_error_under_every_policy(
    sample: Sample, tmp_path: Path, absent
) -> None:
    with pytest.raises(DataError, match="no virtual points of this sweep"):
        load_mvp_points(sample, tmp_path, absent=absent)


def test_virtual_points_of_another_version_are_refused(sample: Sample, tmp_path: Path) -> None:
    path = virtual_points_path(tmp_path, sample.sweeps[0])
    points = VirtualPoints(np.ones((2, 15), np.float32), np.ones((3, 14), np.float32))
    write_virtual_points(path, points)
    assert np.array_equal(read_virtual_points(path).copies, points.copies)
    np.savez(path, version=np.array(7), copies=points.copies, virtual=points.virtual)
    with pytest.raises(DataError, match="version 7 of virtual points, expected 1"):
        read_virtual_points(path)
