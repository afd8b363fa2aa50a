"""The official devkit loads, walks and projects the world, and agrees on every count."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from world.small_world import SMALL

from distillbev.classes import CATEGORY_TO_CLASS, CLASSES

pytest.importorskip("nuscenes", reason="needs the oracle packages of requirements-dev.lock")

from nuscenes.nuscenes import NuScenes
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.geometry_utils import points_in_box, view_points


@pytest.fixture(scope="module")
def devkit(world: Path) -> NuScenes:
    return NuScenes(version="v1.0-sim", dataroot=str(world), verbose=False)


def test_devkit_loads_and_lists_scenes(devkit: NuScenes, capsys: pytest.CaptureFixture):
    devkit.list_scenes()
    assert capsys.readouterr().out.count("scene-") == SMALL.num_scenes


def test_each_annotation_counts_exactly_the_points_of_its_key_sweep(devkit: NuScenes):
    counted = 0
    for sample in devkit.sample:
        path, boxes, _ = devkit.get_sample_data(sample["data"]["LIDAR_TOP"])
        points = LidarPointCloud.from_file(path).points[:3]
        for box in boxes:
            row = devkit.get("sample_annotation", box.token)
            inside = int(points_in_box(box, points).sum())
            assert inside == row["num_lidar_pts"], row
            counted += inside
    assert counted > 1000


def test_pixels_of_an_instance_lie_in_its_projected_box(devkit: NuScenes, world: Path):
    """Cameras fire up to 43 ms before the boxes are valid, so moving actors are left out."""
    filled = []
    for sample in devkit.sample:
        scene = devkit.get("scene", sample["scene_token"])["name"]
        mapping = json.loads((world / "instance_masks" / f"{scene}.json").read_text())
        numbers = {token: int(number) for number, token in mapping.items()}
        for channel, token in sample["data"].items():
            if channel == "LIDAR_TOP":
                continue
            path, boxes, intrinsic = devkit.get_sample_data(token)
            mask = np.asarray(Image.open(world / "instance_masks" / channel / f"{Path(path).stem}.png"))
            for box in boxes:
                row = devkit.get("sample_annotation", box.token)
                velocity = devkit.box_velocity(box.token)
                rows, columns = np.nonzero(mask == numbers[row["instance_token"]])
                corners = box.corners()
                if not len(rows) or not np.linalg.norm(velocity) < 0.01 or corners[2].min() < 0.5:
                    continue
                corners = view_points(corners, intrinsic, normalize=True)[:2]
                low, high = corners.min(axis=1) - 0.6, corners.max(axis=1) + 0.6
                assert columns.min() >= low[0] and columns.max() <= high[0], row
                assert rows.min() >= low[1] and rows.max() <= high[1], row
                if (
                    row["visibility_token"] == "4"
                    and len(rows) > 60
                    and low.min() > 1
                    and high[0] < 94
                    and high[1] < 52
                ):
                    filled.append(np.ptp(columns) / (high[0] - low[0] - 2.2))
                    filled.append(np.ptp(rows) / (high[1] - low[1] - 2.2))
    # Tight, too: unhidden actors fill their boxes from side to side (a cone less, a car nearly whole).
    assert len(filled) > 10
    assert np.median(filled) > 0.8


def test_velocities_are_those_of_the_headings(devkit: NuScenes):
    moving = 0
    for row in devkit.sample_annotation:
        names = {devkit.get("attribute", token)["name"] for token in row["attribute_tokens"]}
        velocity = devkit.box_velocity(row["token"])
        if np.isnan(velocity).any():
            continue
        speed = np.linalg.norm(velocity[:2])
        if names & {"vehicle.parked", "vehicle.stopped", "pedestrian.standing", "cycle.without_rider"}:
            assert speed < 0.01, row
        elif names:
            w, _, _, z = row["rotation"]
            yaw = 2 * np.arctan2(z, w)
            assert velocity[:2] @ (np.cos(yaw), np.sin(yaw)) >= 0.9 * speed - 1e-9, row
            moving += speed > 0.5
    assert moving > 10


def test_lidar_points_project_onto_the_images(devkit: NuScenes):
    sample = devkit.sample[0]
    data = sample["data"]
    points, depth, image = devkit.explorer.map_pointcloud_to_image(
        data["LIDAR_TOP"], data["CAM_FRONT"], min_dist=1.0
    )
    assert image.size == SMALL.image_size_px
    assert points.shape[1] > 50 and depth.min() > 1


def test_the_map_has_road_below_the_ego_vehicle(devkit: NuScenes):
    for sample in devkit.sample:
        scene = devkit.get("scene", sample["scene_token"])
        log_map = devkit.get("map", devkit.get("log", scene["log_token"])["map_token"])
        pose = devkit.get("ego_pose", sample["data"]["LIDAR_TOP"])
        x, y, _ = pose["translation"]
        assert log_map["mask"].is_on_mask(x, y)[0]


def test_multisweep_stays_together_on_what_stands_still(devkit: NuScenes):
    sample = devkit.sample[2]
    cloud, times = LidarPointCloud.from_file_multisweep(devkit, sample, "LIDAR_TOP", "LIDAR_TOP", nsweeps=3)
    assert len(np.unique(times.round(3))) == 3
    heights = cloud.points[2][np.hypot(*cloud.points[:2]) < 8]
    ground = heights[heights < -1.5]
    assert abs(np.median(ground) + 1.84) < 0.25


def test_all_ten_classes_occur(devkit: NuScenes):
    found = {CATEGORY_TO_CLASS[row["category_name"]] for row in devkit.sample_annotation}
    assert found == set(CLASSES)
