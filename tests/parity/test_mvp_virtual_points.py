"""Virtual points and the 17 columns against golden h_mvp_dynamic_pillar, sections 2 and 3.

The golden counts time backwards (seconds before the key frame, positive); ours is negative there.
"""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from distillbev.data.instance_masks import InstanceMasks
from distillbev.data.schema import LidarSweep, Sample
from distillbev.data.virtual_points import (
    VirtualPoints,
    lift_masks,
    load_mvp_points,
    mvp_columns,
    project_points,
    virtual_points_path,
    write_virtual_points,
)
from distillbev.geometry import pose_matrix

GOLDEN = Path(__file__).parents[1] / "golden" / "h_mvp_dynamic_pillar"
INPUTS, OUTPUTS = (load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs"))
KEY_US = 1_500_000_000_000_000


def assert_relative(actual: NDArray, expected: NDArray, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def test_points_fall_into_the_reference_s_pixels() -> None:
    for camera in range(3):
        expected = OUTPUTS["vg.projected"][camera]
        seen = np.flatnonzero(expected[:, 3])
        numbers, pixels, depth_m = project_points(
            INPUTS["vg.points"],
            INPUTS["vg.intrinsics"][camera].astype(np.float64),
            INPUTS["vg.cam_from_lidar"][camera].astype(np.float64),
            (64, 36),
            first_px=1,
        )
        assert np.array_equal(numbers, seen)
        assert np.array_equal(pixels, expected[seen, :2].astype(np.int64))
        assert_relative(depth_m, expected[seen, 2])


def test_masks_are_lifted_as_in_the_reference() -> None:
    of_camera = [np.flatnonzero(INPUTS["vg.mask_camera"] == camera) for camera in range(3)]
    lifted = lift_masks(
        INPUTS["vg.points"],
        INPUTS["vg.intrinsics"].astype(np.float64),
        INPUTS["vg.cam_from_lidar"].astype(np.float64),
        [
            InstanceMasks(INPUTS["vg.masks"][i], INPUTS["vg.mask_label"][i], INPUTS["vg.mask_score"][i])
            for i in of_camera
        ],
        [INPUTS["vg.sampled_pixels"][i] for i in of_camera],
        as_released=True,
    )
    assert_relative(lifted.virtual, OUTPUTS["vg.virtual_points"])
    assert_relative(lifted.copies, OUTPUTS["vg.real_points"])
    copied = INPUTS["vg.points"][OUTPUTS["vg.real_indices"]]
    assert np.array_equal(lifted.copies[:, :4], copied[:, :4])


def golden_added(name: str) -> VirtualPoints:
    return VirtualPoints(
        copies=INPUTS[f"load.{name}.real_points"], virtual=INPUTS[f"load.{name}.virtual_points"]
    )


def golden_sample(folder: Path, names: list[str], without: str = "") -> Sample:
    """Sweeps written to files; the ego frame is the LiDAR's and the global frame the key frame's."""
    sweeps = []
    for i, name in enumerate(names):
        path = folder / "LIDAR_TOP" / f"{i}-{name}.pcd.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        INPUTS[f"load.{name}.points"].astype("<f4").tofile(path)
        pose, lag_us = np.eye(4), 0
        if name != "key":
            rotation = INPUTS[f"load.{name}.sensor2lidar_rotation"].astype(np.float64)
            pose = pose_matrix(INPUTS[f"load.{name}.sensor2lidar_translation"].astype(np.float64), rotation)
            lag_us = int(INPUTS[f"load.{name}.time_lag_us"])
        sweep = LidarSweep(path=path, timestamp_us=KEY_US - lag_us, lidar2ego=np.eye(4), ego2global=pose)
        sweeps.append(sweep)
        if name != without:
            write_virtual_points(virtual_points_path(folder, sweep), golden_added(name))
    return Sample("a", "scene", KEY_US, np.eye(4), np.eye(4), (), tuple(sweeps), None, None)


def in_our_time(points: NDArray) -> NDArray:
    return np.concatenate([points[:, :16], -points[:, 16:]], axis=1)


def test_a_key_frame_gets_the_reference_s_columns() -> None:
    cloud = mvp_columns(INPUTS["load.key.points"], golden_added("key"))
    assert np.array_equal(cloud, OUTPUTS["load.mvp_key"])


def test_sweeps_come_together_as_in_the_reference_one_of_them_without_virtual_points(tmp_path: Path) -> None:
    sample = golden_sample(tmp_path, ["key", "sweep0", "sweep1", "sweep2", "sweep3"], without="sweep2")
    points, num_absent = load_mvp_points(sample, tmp_path, absent="drop_sweep", as_released=True)
    expected = in_our_time(OUTPUTS["load.mvp"])
    assert num_absent == 1
    assert_relative(points, expected)
    assert np.abs(points[:, 16] - expected[:, 16]).max() <= 2e-6


def test_a_key_frame_repeated_for_want_of_sweeps_is_the_reference_s_but_for_the_ring(tmp_path: Path) -> None:
    sample = golden_sample(tmp_path, ["key", "key", "key"])
    points, _ = load_mvp_points(sample, tmp_path, as_released=True)
    columns = [c for c in range(17) if c != 4]  # where the reference forgets the ring that sweeps have
    assert np.array_equal(points[:, columns], OUTPUTS["load.mvp_no_sweeps"][:, columns])


@pytest.mark.parametrize("policy", ["measured_only", "drop_sweep"])
def test_a_sweep_without_virtual_points_follows_the_policy_and_is_counted(tmp_path: Path, policy) -> None:
    sample = golden_sample(tmp_path, ["key", "sweep2"], without="sweep2")
    points, num_absent = load_mvp_points(sample, tmp_path, absent=policy)
    assert num_absent == 1
    from_sweep = points[points[:, 16] < 0]
    assert (len(from_sweep) > 0) == (policy == "measured_only")
    assert (from_sweep[:, 15] == 1).all()
    assert (from_sweep[:, 4:15] == 1).all()  # no ring among the classes, unless as released
