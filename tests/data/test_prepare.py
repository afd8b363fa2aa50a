import json
from pathlib import Path

import pytest
from tiny_nuscenes import edit_table

from distillbev.data.check import check_dataset
from distillbev.data.prepare import prepare
from distillbev.data.samples import NuScenes, official_splits
from distillbev.errors import DataError


def faults(root: Path) -> dict[str, int]:
    return {finding.what: finding.count for finding in check_dataset(root)}


def test_preparing_twice_builds_once(spoilt_root: Path):
    assert ": built in " in prepare(spoilt_root)
    assert ": up to date, " in prepare(spoilt_root)


def test_preparing_faulty_tables_tells_what_is_wrong(spoilt_root: Path):
    edit_table(spoilt_root, "sample_data", lambda rows: rows[0].update(ego_pose_token="lost"))
    with pytest.raises(DataError, match=r"ego_pose_token 'lost' leads nowhere.*--check"):
        prepare(spoilt_root)


def test_a_sound_dataset_has_no_findings(tiny_root: Path):
    assert check_dataset(tiny_root) == []


@pytest.mark.parametrize(
    ("table", "field", "value", "what"),
    [
        ("sample_data", "ego_pose_token", "lost", "sample_data: ego_pose_token is not in ego_pose.json"),
        ("sample_data", "filename", "../outside.jpg", "file: its name leaves the dataset"),
        ("sample_data", "filename", "samples/none.jpg", "file: a key frame of LIDAR_TOP is absent"),
        ("ego_pose", "rotation", [2.0, 0.0, 0.0, 0.0], "ego_pose: rotation is no unit quaternion"),
        ("calibrated_sensor", "camera_intrinsic", [], "calibrated_sensor: camera_intrinsic is not 3x3"),
        ("sample_annotation", "size", [0.0, 1.0, 1.0], "sample_annotation: translation or size makes no box"),
    ],
)
def test_a_fault_is_found_once(spoilt_root: Path, table: str, field: str, value: object, what: str):
    edit_table(spoilt_root, table, lambda rows: rows[0].update({field: value}))
    assert faults(spoilt_root)[what] == 1


def test_time_that_runs_backwards_is_found(spoilt_root: Path):
    edit_table(spoilt_root, "sample", lambda rows: rows[1].update(timestamp=rows[0]["timestamp"] - 1))
    assert "sample: prev is not earlier" in faults(spoilt_root)


def test_damaged_files_are_found(spoilt_root: Path):
    image = next((spoilt_root / "samples" / "CAM_FRONT").iterdir())
    image.write_bytes(image.read_bytes()[:300])
    sweep = next((spoilt_root / "samples" / "LIDAR_TOP").iterdir())
    sweep.write_bytes(sweep.read_bytes()[:-3])
    found = faults(spoilt_root)
    assert found["file: an image cannot be read"] == 1
    assert found["file: a LiDAR file cannot be read"] == 1


def test_official_splits_have_their_known_sizes_and_do_not_overlap():
    splits = official_splits()
    assert {name: len(scenes) for name, scenes in splits.items()} == {
        "train": 700,
        "val": 150,
        "test": 150,
        "mini_train": 8,
        "mini_val": 2,
    }
    assert len({scene for name in ("train", "val", "test") for scene in splits[name]}) == 1000


def test_an_official_split_is_there_where_all_its_scenes_are(spoilt_root: Path):
    names = official_splits()["mini_val"]
    edit_table(
        spoilt_root,
        "scene",
        lambda rows: [row.update(name=name) for row, name in zip(rows, names, strict=True)],
    )
    (spoilt_root / "splits.json").unlink()
    assert set(NuScenes(spoilt_root).splits()) == {"all", "mini_val"}


def test_a_split_may_list_sample_tokens(spoilt_root: Path):
    (spoilt_root / "splits.json").write_text(json.dumps({"few": ["scene-b-sample-2", "scene-a-sample-0"]}))
    assert NuScenes(spoilt_root).sample_tokens("few") == ["scene-b-sample-2", "scene-a-sample-0"]
