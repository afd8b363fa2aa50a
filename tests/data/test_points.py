from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillbev.data.points import count_points_in_boxes, load_points, load_points_one_by_one
from distillbev.data.samples import NuScenes
from distillbev.errors import DataError
from distillbev.geometry import invert_rigid, pose_matrix, quaternion_to_rotation, transform_points


def test_returns_from_the_car_itself_are_dropped_and_columns_are_in_order(tiny: NuScenes):
    sample = tiny.sample("scene-a-sample-0")
    points = load_points(sample)
    assert points.dtype == np.float32
    assert points.shape == (51, 5)  # the landmark and the clutter
    assert load_points(sample, remove_ego_radius_m=0).shape == (52, 5)
    assert set(points[:, 3]) == {40.0}
    assert set(points[:, 4]) == {0.0}


@pytest.mark.parametrize("num_sweeps", [0, 1, 9])
@pytest.mark.parametrize("radius_m", [0.0, 1.0, 8.0])
def test_sweeps_joined_at_once_equal_sweeps_joined_one_by_one(
    tiny: NuScenes, num_sweeps: int, radius_m: float
):
    sample = tiny.sample("scene-b-sample-2", num_sweeps)
    joined, expected = load_points(sample, radius_m), load_points_one_by_one(sample, radius_m)
    assert joined.shape == expected.shape
    assert joined.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(joined[:, :3], expected[:, :3], rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(joined[:, 3:], expected[:, 3:])
    key = expected[:, 4] == 0
    np.testing.assert_array_equal(joined[key], expected[key])
    assert len(np.unique(joined[:, 4])) == num_sweeps + 1


def test_what_stands_still_in_the_world_stands_still_in_all_sweeps_and_their_times_go_back(tiny: NuScenes):
    points = load_points(tiny.sample("scene-a-sample-2", num_sweeps=9))
    landmark = points[::51]  # the first of each sweep's points
    np.testing.assert_allclose(landmark[:, :3], landmark[:1, :3].repeat(10, axis=0), atol=1e-4)
    np.testing.assert_allclose(landmark[:, 4], -0.1 * np.arange(10), atol=1e-6)


def test_the_car_itself_is_removed_from_each_sweep_before_it_moves(tiny: NuScenes):
    sample = tiny.sample("scene-a-sample-2", num_sweeps=9)
    every, some = load_points(sample, remove_ego_radius_m=0), load_points(sample)
    assert len(every) - len(some) == 10  # one return from the car in each sweep


def test_a_truncated_point_file_names_file_and_sizes(spoilt_root: Path):
    path = spoilt_root / "samples" / "LIDAR_TOP" / "scene-a-lidar-0.pcd.bin"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"scene-a-lidar-0\.pcd\.bin: 1033 bytes, expected a multiple of 20"):
        load_points(NuScenes(spoilt_root).sample("scene-a-sample-0"))


def test_an_empty_point_file_is_refused(spoilt_root: Path):
    (spoilt_root / "samples" / "LIDAR_TOP" / "scene-a-lidar-0.pcd.bin").write_bytes(b"")
    with pytest.raises(DataError, match="0 bytes, expected a multiple of 20"):
        load_points(NuScenes(spoilt_root).sample("scene-a-sample-0"))


def test_an_absent_sweep_is_named(spoilt_root: Path):
    (spoilt_root / "sweeps" / "LIDAR_TOP" / "scene-a-lidar-4.pcd.bin").unlink()
    sample = NuScenes(spoilt_root).sample("scene-a-sample-1", num_sweeps=1)
    with pytest.raises(DataError, match=r"sweeps/LIDAR_TOP/scene-a-lidar-4\.pcd\.bin: no such LiDAR file"):
        load_points(sample)


def test_a_point_that_is_not_finite_is_named(spoilt_root: Path):
    path = spoilt_root / "samples" / "LIDAR_TOP" / "scene-a-lidar-0.pcd.bin"
    points = np.fromfile(path, "<f4").reshape(-1, 5)
    points[17, 1] = np.nan
    points.tofile(path)
    with pytest.raises(DataError, match=r"scene-a-lidar-0\.pcd\.bin \(1040 bytes\): point 17 of 52"):
        load_points(NuScenes(spoilt_root).sample("scene-a-sample-0"))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_counts_equal_a_test_of_every_point_in_every_box(seed: int):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-3, 3, (200, 3))
    quaternions = rng.normal(size=(4, 4))
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    poses = np.stack(
        [pose_matrix(rng.uniform(-2, 2, 3), rotation) for rotation in quaternion_to_rotation(quaternions)]
    )
    sizes = rng.uniform(0.2, 4, (4, 3))
    expected = [
        sum(bool((np.abs(transform_points(invert_rigid(pose), point)) <= size / 2).all()) for point in points)
        for pose, size in zip(poses, sizes, strict=True)
    ]
    assert count_points_in_boxes(points, poses, sizes).tolist() == expected


def test_no_boxes_and_no_points_give_no_counts():
    assert count_points_in_boxes(np.zeros((5, 3)), np.zeros((0, 4, 4)), np.zeros((0, 3))).shape == (0,)
    assert count_points_in_boxes(np.zeros((0, 3)), np.eye(4)[None], np.ones((1, 3))).tolist() == [0]
