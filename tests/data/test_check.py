import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_nuscenes import edit_table
from typer.testing import CliRunner

from distillbev.cli import app
from distillbev.data.check import check_dataset
from distillbev.data.findings import Findings
from distillbev.world import SplitConfig, WorldConfig, simulate


def faults(root: Path, files_per_channel: int | None = None) -> dict[str, int]:
    findings = check_dataset(root, files_per_channel=files_per_channel)
    return {f"{finding.severity}: {finding.what}": finding.count for finding in findings}


def test_a_sound_dataset_has_no_findings(tiny_root: Path):
    assert check_dataset(tiny_root) == []


def changed(row: int, **values: object) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[row].update(values)


# Table, edit, all that is found. Rows 0 to 4 of sample_data are sweeps of the LiDAR, row 11 is the first image.
TABLE_FAULTS = {
    "a lost pose": (
        "sample_data",
        changed(0, ego_pose_token="lost"),
        {"error: sample_data: ego_pose_token is not in ego_pose.json": 1},
    ),
    "a lost scene": (
        "sample",
        changed(2, scene_token="lost"),
        {
            "error: sample: scene_token is not in scene.json": 1,
            "error: sample: prev is of another scene": 1,
        },
    ),
    "a lost attribute": (
        "sample_annotation",
        changed(0, attribute_tokens=["lost"]),
        {"error: sample_annotation: attribute_tokens are not in attribute.json": 1},
    ),
    "a link that does not lead back": (
        "sample",
        changed(1, prev=""),
        {"error: sample: prev of next leads elsewhere": 1},
    ),
    "a token twice": (
        "ego_pose",
        lambda rows: rows.append(rows[0]),
        {"error: ego_pose: token occurs twice": 1},
    ),
    "no key frames": (
        "sample",
        lambda rows: rows.clear(),
        {
            "error: sample: no key frames": 1,
            "error: sample_annotation: sample_token is not in sample.json": 16,
            "error: sample_data: sample_token is not in sample.json": 40,
        },
    ),
    "samples back in time": (
        "sample",
        lambda rows: rows[1].update(timestamp=rows[0]["timestamp"] - 1),
        {
            "error: sample: prev is not earlier": 1,
            "error: sample_annotation: prev is not earlier": 2,
            "warning: sample_data: key frame over 0.5 s away from its sample": 3,
        },
    ),
    "recordings in a circle": (
        "sample_data",
        lambda rows: rows[0].update(prev=rows[1]["token"]),
        {"error: sample_data: prev is not earlier": 1},
    ),
    "a sweep of another sensor": (
        "sample_data",
        lambda rows: rows[12].update(prev=rows[0]["token"]),
        {"error: sample_data: prev is of another sensor": 1},
    ),
    "an annotation of another instance": (
        "sample_annotation",
        lambda rows: rows[1].update(instance_token=rows[3]["instance_token"]),
        {"error: sample_annotation: prev is of another instance": 2},
    ),
    "a pose that is not finite": (
        "ego_pose",
        changed(0, translation=[float("nan"), 0.0, 0.0]),
        {
            "error: ego_pose: translation is not finite": 1,
            "warning: ego_pose: the car jumps between two recordings": 0,
        },
    ),
    "a pose that is no rotation": (
        "ego_pose",
        changed(0, rotation=[2.0, 0.0, 0.0, 0.0]),
        {"error: ego_pose: rotation is no unit quaternion": 1},
    ),
    "a car that jumps": (
        "ego_pose",
        changed(2, translation=[630.0, 1600.0, 0.0]),
        {"warning: ego_pose: the car jumps between two recordings": 2},
    ),
    "a sensor far away": (
        "calibrated_sensor",
        changed(0, translation=[11.0, 0.0, 0.0]),
        {"warning: calibrated_sensor: over 10 m away from the ego origin": 1},
    ),
    "a camera that does not rotate": (
        "calibrated_sensor",
        changed(0, rotation=[0.0, 0.0, 0.0, 0.0]),
        {"error: calibrated_sensor: rotation is no unit quaternion": 1},
    ),
    "no intrinsics": (
        "calibrated_sensor",
        changed(0, camera_intrinsic=[]),
        {"error: calibrated_sensor: camera_intrinsic is not 3x3": 1},
    ),
    "intrinsics with a negative focal length": (
        "calibrated_sensor",
        changed(0, camera_intrinsic=[[-120.0, 0.0, 80.0], [0.0, 120.0, 45.0], [0.0, 0.0, 1.0]]),
        {"error: calibrated_sensor: camera_intrinsic is no pinhole matrix": 1},
    ),
    "intrinsics of the full image for a smaller one": (
        "calibrated_sensor",
        changed(0, camera_intrinsic=[[240.0, 0.0, 160.0], [0.0, 240.0, 90.0], [0.0, 0.0, 1.0]]),
        {"warning: calibrated_sensor: camera_intrinsic is of another image size": 1},
    ),
    "a box without width": (
        "sample_annotation",
        changed(0, size=[0.0, 1.0, 1.0]),
        {"error: sample_annotation: translation or size makes no box": 1},
    ),
    "a box of 60 m": (
        "sample_annotation",
        changed(0, size=[2.0, 60.0, 3.0]),
        {"warning: sample_annotation: a side over 50 m": 1},
    ),
    "a box that is not turned": (
        "sample_annotation",
        changed(0, rotation=[0.0, 0.0, 0.0, 0.0]),
        {"error: sample_annotation: rotation is no unit quaternion": 1},
    ),
    "fewer points than none": (
        "sample_annotation",
        changed(0, num_radar_pts=-1),
        {"error: sample_annotation: a negative number of points": 1},
    ),
    "a name that leaves the root": (
        "sample_data",
        changed(0, filename="../outside.jpg"),
        {"error: file: its name leaves the dataset": 1, "error: sample: cannot be read": 2},
    ),
    "a key frame without its file": (
        "sample_data",
        changed(0, filename="samples/none.bin"),
        {"error: file: a key frame of LIDAR_TOP is absent": 1},
    ),
    "a sweep without its file": (
        "sample_data",
        changed(1, filename="sweeps/none.bin"),
        {"error: file: a sweep of LIDAR_TOP is absent": 1},
    ),
    "an image of another size": (
        "sample_data",
        changed(11, width=320, height=180),
        {"error: file: an image of CAM_BACK cannot be used": 1},
    ),
    "a camera that is absent from a key frame": (
        "sample_data",
        changed(11, is_key_frame=False),
        {"warning: sample: with other cameras (CAM_FRONT CAM_SIDE)": 1},
    ),
    "two recordings of one camera": (
        "sample_data",
        lambda rows: rows[12].update(sample_token=rows[11]["sample_token"]),
        {"error: sample: cannot be read": 1, "warning: sample: with other cameras (CAM_FRONT CAM_SIDE)": 1},
    ),
}


@pytest.mark.parametrize("name", TABLE_FAULTS)
def test_a_fault_of_the_tables_is_found(spoilt_root: Path, name: str):
    table, edit, expected = TABLE_FAULTS[name]
    edit_table(spoilt_root, table, edit)
    assert faults(spoilt_root) == {what: count for what, count in expected.items() if count}


def test_tables_that_cannot_be_read_are_all_told(spoilt_root: Path):
    (spoilt_root / "v1.0-mini" / "sample.json").write_text("[{")
    (spoilt_root / "v1.0-mini" / "ego_pose.json").unlink()
    assert faults(spoilt_root) == {
        "error: ego_pose.json: cannot be read": 1,
        "error: sample.json: cannot be read": 1,
    }


def test_tables_of_annotations_may_be_absent_where_nothing_is_annotated(spoilt_root: Path):
    (spoilt_root / "v1.0-mini" / "sample_annotation.json").write_text("[]")
    for name in ("instance", "category", "attribute"):
        (spoilt_root / "v1.0-mini" / f"{name}.json").unlink()
    assert faults(spoilt_root) == {}


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"train": ["scene-a"], "val": ["scene-c"]}, {"error: splits.json: cannot be used": 1}),
        ({"train": ["scene-a"], "val": []}, {"warning: splits.json: a split without key frames": 1}),
        (
            {"train": ["scene-a", "scene-b"], "val": ["scene-b-sample-1"]},
            {"warning: splits.json: a key frame is both in train and val": 1},
        ),
        ({"train": ["scene-a"], "few": ["scene-a"]}, {}),
    ],
)
def test_splits_are_checked(spoilt_root: Path, splits: dict[str, list[str]], expected: dict[str, int]):
    (spoilt_root / "splits.json").write_text(json.dumps(splits))
    assert faults(spoilt_root) == expected


def damage_points(path: Path, value: bytes) -> None:
    path.write_bytes(path.read_bytes()[:-4] + value)


def test_damaged_files_are_found(spoilt_root: Path):
    image = min((spoilt_root / "samples" / "CAM_FRONT").iterdir())
    image.write_bytes(image.read_bytes()[:300])
    key, other = sorted((spoilt_root / "samples" / "LIDAR_TOP").iterdir())[:2]
    damage_points(key, b"")
    damage_points(other, b"\x00\x00\xc0\x7f")  # NaN
    min((spoilt_root / "sweeps" / "LIDAR_TOP").iterdir()).write_bytes(b"")
    assert faults(spoilt_root) == {
        "error: file: an image of CAM_FRONT cannot be used": 1,
        "error: file: LiDAR points of LIDAR_TOP cannot be used": 3,
    }
    assert faults(spoilt_root, files_per_channel=1) == {
        "error: file: an image of CAM_FRONT cannot be used": 1,
        "error: file: LiDAR points of LIDAR_TOP cannot be used": 1,
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("check") / "world"
    splits = (SplitConfig(name="train", scenes=2),)
    size = (96, 54)
    simulate(
        WorldConfig(
            splits=splits, key_frames_per_scene=2, image_size_px=size, lidar_sweeps=0, write_masks=False
        ),
        root,
        processes=1,
    )
    return root


@pytest.fixture
def spoilt_world(world: Path, tmp_path: Path) -> Path:
    """The world with tables of its own."""
    shutil.copytree(world / "v1.0-sim", tmp_path / "v1.0-sim")
    for name in ("samples", "sweeps"):
        if (world / name).exists():
            os.symlink(world / name, tmp_path / name)
    return tmp_path


def spoil_calibration(root: Path, channel: str, **values: object) -> None:
    sensors = json.loads((root / "v1.0-sim" / "sensor.json").read_text())
    tokens = {row["token"] for row in sensors if row["channel"].startswith(channel)}

    def edit(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["sensor_token"] in tokens:
                row.update(values)

    edit_table(root, "calibrated_sensor", edit, "v1.0-sim")


def test_a_simulated_world_has_no_findings(world: Path):
    assert check_dataset(world) == []


def test_a_lidar_in_the_wrong_place_is_found(spoilt_world: Path):
    spoil_calibration(spoilt_world, "LIDAR", translation=[4.0, 0.0, 1.8])
    assert set(faults(spoilt_world)) == {"warning: points: boxes hold none where the tables count some"}


def test_cameras_that_look_at_the_sky_are_found(spoilt_world: Path):
    spoil_calibration(spoilt_world, "CAM", rotation=[1.0, 0.0, 0.0, 0.0])  # z of the camera is up
    assert "warning: projection: annotated objects fall on no image" in faults(spoilt_world)


def test_one_camera_that_looks_at_the_sky_is_found(spoilt_world: Path):
    spoil_calibration(spoilt_world, "CAM_FRONT_LEFT", rotation=[1.0, 0.0, 0.0, 0.0])
    assert "warning: projection: no annotated object falls on a camera" in faults(spoilt_world)


def test_findings_count_all_and_show_some_errors_first():
    findings = Findings()
    findings.add("warning", "odd", "here")
    assert not findings.has_errors
    for number in range(5):
        findings.add("error", "wrong", str(number))
    assert findings.has_errors
    assert [(finding.what, finding.count, finding.examples) for finding in findings.listed()] == [
        ("wrong", 5, "0, 1, 2"),
        ("odd", 1, "here"),
    ]


@pytest.mark.parametrize(
    ("size", "code"), [([2.0, 4.0, 2.0], 0), ([2.0, 60.0, 3.0], 0), ([0.0, 1.0, 1.0], 1)]
)
def test_the_command_ends_with_1_where_there_are_errors(spoilt_root: Path, size: list[float], code: int):
    edit_table(spoilt_root, "sample_annotation", changed(0, size=size))
    result = CliRunner().invoke(app, ["prepare", str(spoilt_root), "--check"])
    assert result.exit_code == code
    listed = re.findall(r"error|warning", result.stdout)
    assert listed == ([] if size[1] == 4 else ["warning"] if code == 0 else ["error"])
