"""The one real nuScenes frame: what cannot be learnt from data of our own making."""

import json

import numpy as np
import pytest

from distillbev.classes import CLASSES
from distillbev.data.points import count_points_in_boxes, read_sweep
from distillbev.data.samples import NuScenes
from distillbev.data.schema import Sample
from distillbev.geometry import invert_rigid, project_to_image, transform_points


@pytest.fixture(scope="module")
def sample(real: NuScenes) -> Sample:
    return real.sample(real.sample_tokens()[0])


def test_it_loads_as_it_is(real: NuScenes, sample: Sample):
    assert real.version == "v1.0-mini"
    assert real.splits() == {"all": ["scene-0061"]}
    assert [camera.channel for camera in sample.cameras][1] == "CAM_FRONT"
    assert len(sample.cameras) == 6
    assert sample.annotations is not None
    assert len(sample.annotations.boxes) == 69
    assert (sample.annotations.num_lidar_points + sample.annotations.num_radar_points > 0).sum() == 66
    assert np.isnan(sample.annotations.boxes[:, 7:9]).all()  # one key frame: no differences
    assert CLASSES[sample.annotations.labels[0]] == "pedestrian"


def test_boxes_hold_the_annotated_number_of_points(real: NuScenes, sample: Sample):
    assert sample.annotations is not None
    points = read_sweep(sample.sweeps[0])
    box2global, size_lwh_m = real.annotation_poses(sample.token)
    counts = count_points_in_boxes(points, invert_rigid(sample.lidar2global) @ box2global, size_lwh_m)
    assert len(points) == 34_688
    assert (counts == sample.annotations.num_lidar_points).sum() >= 61


def test_counts_equal_those_of_the_devkit(real: NuScenes, sample: Sample):
    devkit = pytest.importorskip("nuscenes.nuscenes")
    from nuscenes.utils.geometry_utils import points_in_box

    oracle = devkit.NuScenes("v1.0-mini", str(real.root), verbose=False)
    _, boxes, _ = oracle.get_sample_data(oracle.get("sample", sample.token)["data"]["LIDAR_TOP"])
    points = read_sweep(sample.sweeps[0])
    box2global, size_lwh_m = real.annotation_poses(sample.token)
    counts = count_points_in_boxes(points, invert_rigid(sample.lidar2global) @ box2global, size_lwh_m)
    assert counts.tolist() == [int(points_in_box(box, points[:, :3].T.astype(float)).sum()) for box in boxes]


def test_every_annotated_object_is_in_the_picture_of_one_or_two_cameras(sample: Sample):
    """Six cameras look all around with narrow overlaps; a wrong pose leaves gaps or counts objects thrice."""
    assert sample.annotations is not None
    cameras_that_see = np.zeros(69, dtype=int)
    for camera in sample.cameras:
        lidar2cam = invert_rigid(camera.ego2global @ camera.cam2ego) @ sample.lidar2global
        centres = transform_points(lidar2cam, sample.annotations.boxes[:, :3])
        pixels, depth = project_to_image(camera.cam2img, centres)
        cameras_that_see += (depth > 1) & ((pixels > 0) & (pixels < camera.size_wh_px)).all(axis=1)
    assert set(cameras_that_see) == {1, 2}


def test_given_velocities_turn_with_the_boxes(real: NuScenes, sample: Sample):
    """Moving vehicles drive where they head: the frame's own velocities against our yaw."""
    assert sample.annotations is not None
    velocities = json.loads((real.root / "velocities.json").read_text())
    rows = json.loads((real.folder / "sample_annotation.json").read_text())
    global2lidar = invert_rigid(sample.lidar2global)[:2, :2]
    moving = 0
    for row, box, label in zip(rows, sample.annotations.boxes, sample.annotations.labels, strict=True):
        velocity = global2lidar @ velocities[row["token"]]
        if label in (0, 1, 2) and np.linalg.norm(velocity) > 2:
            moving += 1
            heading = np.array([np.cos(box[6]), np.sin(box[6])])
            assert velocity @ heading / np.linalg.norm(velocity) > 0.97
    assert moving > 0
