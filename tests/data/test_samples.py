import json
from pathlib import Path

import numpy as np
import pytest
from tiny_nuscenes import (
    CAMERAS,
    IMAGE_WH,
    LANDMARK,
    LIDAR2EGO,
    OBJECTS,
    edit_table,
    ego2global_at,
    write_tiny_nuscenes,
)

from distillbev.classes import CLASSES
from distillbev.data.points import load_points
from distillbev.data.samples import NOMINAL_LIDAR2EGO, NuScenes
from distillbev.errors import DataError
from distillbev.geometry import invert_rigid, transform_points

SAMPLE = "scene-a-sample-1"  # in the middle of its scene


def test_the_only_version_folder_is_found(tiny_root: Path):
    assert NuScenes(tiny_root).version == "v1.0-mini"


def test_a_wrong_version_lists_those_found(tiny_root: Path):
    with pytest.raises(DataError, match=r"no version folder 'v1\.0-trainval'; found v1\.0-mini"):
        NuScenes(tiny_root, "v1.0-trainval")


def test_two_versions_ask_for_a_choice(spoilt_root: Path):
    (spoilt_root / "v1.0-test").mkdir()
    with pytest.raises(DataError, match=r"found v1\.0-mini, v1\.0-test; give one of them"):
        NuScenes(spoilt_root)
    assert NuScenes(spoilt_root, "v1.0-mini").scenes() == ["scene-a", "scene-b"]
    chosen = NuScenes(spoilt_root / "v1.0-mini")
    assert (chosen.root, chosen.version) == (spoilt_root, "v1.0-mini")


@pytest.mark.parametrize("make", [True, False])
def test_a_folder_without_tables_is_refused(tmp_path: Path, make: bool):
    root = tmp_path / "nothing"
    if make:
        root.mkdir()
    with pytest.raises(DataError, match=r"expected a nuScenes folder|expected exactly one"):
        NuScenes(root)


def test_splits_come_from_the_file_and_tokens_in_scene_and_time_order(tiny: NuScenes):
    assert tiny.splits() == {"train": ["scene-b"], "val": ["scene-a"]}
    assert tiny.sample_tokens("train") == [f"scene-b-sample-{i}" for i in range(3)]
    assert tiny.sample_tokens() == [f"scene-{scene}-sample-{i}" for scene in "ab" for i in range(3)]


def test_without_a_splits_file_all_scenes_are_one_split(spoilt_root: Path):
    (spoilt_root / "splits.json").unlink()
    assert NuScenes(spoilt_root).splits() == {"all": ["scene-a", "scene-b"]}


def test_an_unknown_split_lists_those_that_exist(tiny: NuScenes):
    with pytest.raises(DataError, match="no split 'test'; there are train, val"):
        tiny.sample_tokens("test")


def test_a_split_of_unknown_scenes_is_refused(spoilt_root: Path):
    (spoilt_root / "splits.json").write_text(json.dumps({"train": ["scene-a", "scene-z"]}))
    with pytest.raises(
        DataError, match=r"'train' names 1 of 2 scenes that .*scene\.json lacks, such as 'scene-z'"
    ):
        NuScenes(spoilt_root).sample_tokens("train")


def test_a_sample_holds_poses_cameras_and_links(tiny: NuScenes):
    sample = tiny.sample(SAMPLE)
    np.testing.assert_allclose(sample.lidar2ego, LIDAR2EGO, atol=1e-12)
    np.testing.assert_allclose(sample.ego2global, ego2global_at(0.5), atol=1e-12)
    assert sample.scene == "scene-a"
    assert sample.previous_token == "scene-a-sample-0"
    assert tiny.sample("scene-a-sample-0").previous_token is None
    assert [camera.channel for camera in sample.cameras] == ["CAM_FRONT", "CAM_BACK", "CAM_SIDE"]
    assert all(camera.size_wh_px == IMAGE_WH for camera in sample.cameras)
    # Each camera has its own time and its own pose.
    offsets_us = {camera.channel: camera.timestamp_us - sample.timestamp_us for camera in sample.cameras}
    assert offsets_us == {"CAM_BACK": -12_000, "CAM_FRONT": 0, "CAM_SIDE": 12_000}
    back = sample.cameras[1]
    np.testing.assert_allclose(back.ego2global, ego2global_at(0.488), atol=1e-12)


def test_earlier_sweeps_follow_newest_first_and_stop_at_the_start_of_the_scene(tiny: NuScenes):
    times = [(s.timestamp_us - tiny.sample(SAMPLE).timestamp_us) / 1e6 for s in tiny.sample(SAMPLE, 3).sweeps]
    np.testing.assert_allclose(times, [0, -0.1, -0.2, -0.3], atol=1e-9)
    assert len(tiny.sample(SAMPLE, 9).sweeps) == 6
    assert len(tiny.sample("scene-a-sample-0", 9).sweeps) == 1


def test_boxes_stand_in_the_lidar_frame_with_all_they_are(tiny: NuScenes):
    annotations = tiny.sample(SAMPLE).annotations
    assert annotations is not None
    assert annotations.categories == ("vehicle.car", "human.pedestrian.adult", "movable_object.barrier")
    assert [CLASSES[label] for label in annotations.labels] == ["car", "pedestrian", "barrier"]
    assert annotations.attributes == ("vehicle.moving", "", "")
    assert annotations.visibility.tolist() == [4, 4, 4]
    assert annotations.num_lidar_points.tolist() == [7, 7, 0]
    assert annotations.instance_tokens[0] == "scene-a-instance-vehicle.car"

    lidar2global = ego2global_at(0.5) @ LIDAR2EGO
    centre = np.add(OBJECTS["vehicle.car"][0], (2.0, 1.0, 0.0))  # after half a second
    car = annotations.boxes[0]
    np.testing.assert_allclose(transform_points(lidar2global, car[None, :3])[0], centre, atol=1e-9)
    np.testing.assert_allclose(car[3:6], [4.5, 1.9, 1.6])
    heading = lidar2global[:2, :2] @ [np.cos(car[6]), np.sin(car[6])]
    assert np.arctan2(heading[1], heading[0]) == pytest.approx(0.46, abs=2e-3)  # the frame is tilted by 0.03
    np.testing.assert_allclose(lidar2global[:2, :2] @ car[7:9], [4.0, 2.0], atol=1e-2)


def test_velocity_is_undefined_for_a_single_annotation_and_across_a_long_gap(spoilt_root: Path):
    def boxes_of(token: str) -> dict[str, np.ndarray]:
        annotations = NuScenes(spoilt_root).sample(token).annotations
        assert annotations is not None
        return dict(zip(annotations.categories, annotations.boxes, strict=True))

    assert np.isnan(boxes_of(SAMPLE)["movable_object.barrier"][7:9]).all()  # seen once
    assert np.isfinite(boxes_of("scene-a-sample-0")["animal"][7:9]).all()  # one neighbour, 1 s away

    def stretch(rows: list[dict]) -> None:
        for i, row in enumerate(row for row in rows if row["token"].startswith("scene-a")):
            row["timestamp"] += 900_000 * i  # 1.4 s between neighbours

    edit_table(spoilt_root, "sample", stretch)
    assert np.isnan(boxes_of("scene-a-sample-0")["animal"][7:9]).all()  # 2.8 s to its one neighbour
    assert np.isfinite(boxes_of("scene-a-sample-0")["vehicle.car"][7:9]).all()  # 1.4 s
    assert np.isfinite(
        boxes_of(SAMPLE)["vehicle.car"][7:9]
    ).all()  # 2.8 s over both neighbours: twice is allowed


def test_boxes_velocities_and_sweeps_equal_those_of_the_devkit(tiny_root: Path, tiny: NuScenes):
    devkit = pytest.importorskip("nuscenes.nuscenes")
    from nuscenes.utils.data_classes import LidarPointCloud

    oracle = devkit.NuScenes("v1.0-mini", str(tiny_root), verbose=False)
    for token in tiny.sample_tokens():
        sample = tiny.sample(token, num_sweeps=4)
        annotations = sample.annotations
        assert annotations is not None
        row = oracle.get("sample", token)
        _, boxes, _ = oracle.get_sample_data(row["data"]["LIDAR_TOP"])
        assert [box.name for box in boxes] == list(annotations.categories)
        for ours, box in zip(annotations.boxes, boxes, strict=True):
            np.testing.assert_allclose(ours[:3], box.center, atol=1e-9)
            np.testing.assert_allclose(ours[3:6], box.wlh[[1, 0, 2]])
            forward = box.orientation.rotation_matrix[:, 0]
            assert ours[6] == pytest.approx(np.arctan2(forward[1], forward[0]), abs=1e-9)
            velocity = oracle.box_velocity(box.token)
            velocity[2] = 0
            expected = (invert_rigid(sample.lidar2global)[:3, :3] @ velocity)[:2]
            np.testing.assert_allclose(ours[7:9], expected, atol=1e-9)
        cloud, times = LidarPointCloud.from_file_multisweep(oracle, row, "LIDAR_TOP", "LIDAR_TOP", 5, 1.0)
        points = load_points(sample)
        np.testing.assert_allclose(points[:, :4], cloud.points.T, atol=2e-5)
        np.testing.assert_allclose(points[:, 4], -times[0], atol=1e-6)


def test_a_landmark_seen_by_every_sweep_falls_on_one_point(tiny: NuScenes):
    sample = tiny.sample("scene-b-sample-2", num_sweeps=10)
    landmark = transform_points(invert_rigid(sample.lidar2global), LANDMARK[None])[0]
    points = load_points(sample)
    hits = points[np.linalg.norm(points[:, :3] - landmark, axis=1) < 1e-3]
    np.testing.assert_allclose(hits[:, 4], -0.1 * np.arange(11), atol=1e-6)


def test_labels_that_are_not_asked_for_are_not_read(spoilt_root: Path):
    def spoil(rows: list[dict]) -> None:
        for row in rows:
            row |= {"size": [0, -1, 1e9], "instance_token": "nonsense", "translation": [1e308, 0, 0]}

    edit_table(spoilt_root, "sample_annotation", spoil)
    nuscenes = NuScenes(spoilt_root)
    assert nuscenes.sample(SAMPLE, read_annotations=False).annotations is None
    (spoilt_root / "v1.0-mini" / "sample_annotation.json").unlink()
    assert NuScenes(spoilt_root).sample(SAMPLE, read_annotations=False).annotations is None


def test_samples_without_a_recording_of_the_rigs_lidar_keep_its_frame(tmp_path: Path):
    nuscenes = NuScenes(write_tiny_nuscenes(tmp_path / "tiny", with_lidar=False))
    sample = nuscenes.sample(SAMPLE, num_sweeps=3)
    assert sample.sweeps == ()
    np.testing.assert_allclose(sample.lidar2ego, LIDAR2EGO, atol=1e-12)
    np.testing.assert_allclose(sample.ego2global, ego2global_at(0.5), atol=1e-12)  # the front camera's
    assert load_points(sample).shape == (0, 5)


def test_a_rig_that_never_had_a_lidar_gets_a_nominal_frame(tmp_path: Path):
    root = write_tiny_nuscenes(tmp_path / "tiny", with_lidar=False)
    edit_table(root, "calibrated_sensor", list.pop)  # the LiDAR's stands last
    np.testing.assert_array_equal(NuScenes(root).sample(SAMPLE).lidar2ego, NOMINAL_LIDAR2EGO)


def test_a_sample_without_lidar_is_refused_where_lidars_sit_in_two_places(tmp_path: Path):
    root = write_tiny_nuscenes(tmp_path / "tiny", with_lidar=False)

    def add_a_higher_one(rows: list[dict]):
        rows.append(rows[-1] | {"token": "other", "translation": [0.9, 0.0, 2.8]})

    edit_table(root, "calibrated_sensor", add_a_higher_one)
    with pytest.raises(DataError, match=r"no LiDAR recording.*in 2 ways"):
        NuScenes(root).sample(SAMPLE)


def test_labels_in_counts_classes_with_returns_only(tiny: NuScenes):
    assert tiny.labels_in(SAMPLE) == {CLASSES.index("car"), CLASSES.index("pedestrian")}
    assert tiny.labels_in(SAMPLE, min_points=0) >= {CLASSES.index("barrier")}


def test_labels_in_counts_classes_whose_returns_nobody_counted(spoilt_root: Path):
    edit_table(spoilt_root, "sample_annotation", lambda rows: [row.update(num_lidar_pts=-1) for row in rows])
    assert NuScenes(spoilt_root).labels_in(SAMPLE) >= {CLASSES.index("barrier")}


def test_cameras_of_any_number_are_taken(spoilt_root: Path):
    edit_table(
        spoilt_root,
        "sample_data",
        lambda rows: rows.__setitem__(
            slice(None),
            [row for row in rows if "CAM_SIDE" not in row["token"] and "CAM_BACK" not in row["token"]],
        ),
    )
    assert [camera.channel for camera in NuScenes(spoilt_root).sample(SAMPLE).cameras] == ["CAM_FRONT"]
    assert len(CAMERAS) == 3


@pytest.mark.parametrize("table", ["scene", "sample_data", "sample_annotation", "category"])
def test_a_missing_table_is_named(spoilt_root: Path, table: str):
    (spoilt_root / "v1.0-mini" / f"{table}.json").unlink()
    with pytest.raises(DataError, match=rf"{table}\.json: no such table"):
        NuScenes(spoilt_root).sample(SAMPLE)


def test_a_truncated_table_is_named(spoilt_root: Path):
    path = spoilt_root / "v1.0-mini" / "ego_pose.json"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"ego_pose\.json \(1000 bytes\): not a JSON table"):
        NuScenes(spoilt_root).sample(SAMPLE)


def test_a_row_that_lacks_a_field_is_named(spoilt_root: Path):
    edit_table(spoilt_root, "sample_annotation", lambda rows: rows[3].pop("size"))
    with pytest.raises(DataError, match=r"sample_annotation\.json, row 3, token 'scene-a-.*size"):
        NuScenes(spoilt_root).sample(SAMPLE)


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ("sample", "scene_token"),
        ("sample_data", "ego_pose_token"),
        ("sample_data", "calibrated_sensor_token"),
        ("sample_data", "sample_token"),
        ("calibrated_sensor", "sensor_token"),
        ("sample_annotation", "instance_token"),
        ("sample_annotation", "prev"),
        ("sample_annotation", "attribute_tokens"),
        ("instance", "category_token"),
    ],
)
def test_a_broken_link_names_table_token_and_field(spoilt_root: Path, table: str, field: str):
    def break_all(rows: list[dict]) -> None:
        for row in rows:
            row[field] = ["lost"] if field == "attribute_tokens" else "lost"

    edit_table(spoilt_root, table, break_all)
    with pytest.raises(
        DataError, match=rf"^{table}\.json, token '[^']+': {field} 'lost' is not in \w+\.json"
    ):
        NuScenes(spoilt_root).sample(SAMPLE)


def test_an_unknown_sample_is_refused(tiny: NuScenes):
    with pytest.raises(DataError, match=r"sample\.json: no sample 'nobody' among 6"):
        tiny.sample("nobody")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", [0.0, 1.0, 1.0]),
        ("size", [1.0, float("nan"), 1.0]),
        ("translation", [float("inf"), 0.0, 0.0]),
        ("rotation", [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_an_impossible_box_names_its_annotation(spoilt_root: Path, field: str, value: list[float]):
    edit_table(spoilt_root, "sample_annotation", lambda rows: rows[1].update({field: value}))
    with pytest.raises(
        DataError, match=r"sample_annotation\.json, token 'scene-a-annotation-vehicle\.car-1'"
    ):
        NuScenes(spoilt_root).sample(SAMPLE)


def test_an_impossible_pose_names_its_row(spoilt_root: Path):
    edit_table(
        spoilt_root, "calibrated_sensor", lambda rows: rows[0].update({"rotation": [1.0, 1.0, 0.0, 0.0]})
    )
    with pytest.raises(
        DataError, match=r"calibrated_sensor\.json, token 'calibration-CAM_FRONT'.*unit quaternion"
    ):
        NuScenes(spoilt_root).sample(SAMPLE)


def test_a_camera_without_intrinsics_is_named(spoilt_root: Path):
    edit_table(spoilt_root, "calibrated_sensor", lambda rows: rows[0].update({"camera_intrinsic": []}))
    with pytest.raises(DataError, match=r"'calibration-CAM_FRONT' \(CAM_FRONT\): camera_intrinsic is \[\]"):
        NuScenes(spoilt_root).sample(SAMPLE)
