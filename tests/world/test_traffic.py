"""What the world is made of: shapes, roads, motions, rays."""

import numpy as np
import pytest

from distillbev.classes import CLASSES
from distillbev.world import WorldConfig
from distillbev.world.actors import make_shape
from distillbev.world.casting import build
from distillbev.world.lidar import points_in_boxes
from distillbev.world.paths import footprints_touch
from distillbev.world.rig import rig
from distillbev.world.roads import Road, RoadMap, _cut, blend, draw_roads, ground_mesh
from distillbev.world.scenes import SceneSimulator
from distillbev.world.traffic import GAP_M
from distillbev.world.visibility import level

# Length, width, height in metres that a shape of the class may have.
SIZES = {
    "car": ((3.5, 5.5), (1.6, 2.3), (1.3, 2.2)),
    "truck": ((4.8, 9.8), (1.9, 2.9), (1.7, 3.7)),
    "bus": ((9.0, 12.6), (2.4, 2.9), (2.9, 4.5)),
    "trailer": ((6.8, 12.8), (2.3, 2.7), (3.2, 4.2)),
    "construction_vehicle": ((3.4, 8.5), (1.6, 3.4), (2.2, 4.8)),
    "pedestrian": ((0.25, 1.4), (0.35, 0.9), (0.9, 2.1)),
    "motorcycle": ((1.5, 2.4), (0.5, 1.1), (1.1, 1.4)),
    "bicycle": ((1.5, 2.0), (0.4, 0.7), (0.9, 1.2)),
    "traffic_cone": ((0.3, 0.5), (0.3, 0.5), (0.6, 1.1)),
    "barrier": ((0.3, 0.7), (1.6, 2.6), (0.8, 1.2)),
}


@pytest.fixture(scope="module")
def scene() -> SceneSimulator:
    return SceneSimulator(WorldConfig(seed=2, key_frames_per_scene=8), 0)


@pytest.mark.parametrize("label", CLASSES)
def test_shapes_have_sizes_as_on_the_road_and_boxes_that_just_hold_them(label: str):
    for seed in range(8):
        shape = make_shape(label, np.random.default_rng(seed))
        low, high = shape.mesh.bounds()
        np.testing.assert_allclose(high - low, shape.size_lwh_m, atol=1e-4)
        np.testing.assert_allclose(low[:2], -high[:2], atol=1e-4)
        assert abs(low[2]) < 1e-5
        for extent, (least, most) in zip(shape.size_lwh_m, SIZES[label], strict=True):
            assert least <= extent <= most, (label, seed, shape.size_lwh_m)


def test_no_two_actors_ever_overlap(scene: SceneSimulator):
    times = np.linspace(0, 3.5, 36)
    poses = np.stack([actor.motion.at(times) for actor in scene.traffic.actors])  # (n, T, 3)
    half = np.array([actor.shape.size_lwh_m[:2] for actor in scene.traffic.actors]) / 2
    assert len(half) > 20
    for k in range(len(half) - 1):
        touch = footprints_touch(poses[k], half[k], poses[k + 1 :], half[k + 1 :, None])
        assert not touch.any(), [
            (scene.traffic.actors[k + 1 + j].shape.label, k) for j in np.nonzero(touch)[0]
        ]
    assert GAP_M > 0


@pytest.mark.parametrize("curvature", [0.0, 0.01, -0.008])
def test_places_on_a_road_are_located_where_they_were_put(curvature: float):
    road = Road((3.0, -4.0), 0.7, curvature, 2, True)
    s, d = (axis.ravel() for axis in np.meshgrid(np.linspace(-80, 80, 17), np.linspace(-9, 9, 7)))
    points, headings = road.place(s, d)
    found_s, found_d = road.locate(points[:, 0], points[:, 1])
    np.testing.assert_allclose(found_s, s, atol=1e-9)
    np.testing.assert_allclose(found_d, d, atol=1e-9)
    ahead, _ = road.place(s + 1e-4, d)
    direction = np.arctan2(*(ahead - points)[:, ::-1].T)
    np.testing.assert_allclose(np.cos(direction - headings), 1, atol=1e-6)


def test_kerbs_blend_only_where_roads_meet():
    far, near = np.array([2.0, 30.0]), np.array([40.0, 1.0])
    np.testing.assert_array_equal(blend([far, near]), [2.0, 1.0])
    assert blend([np.array([1.0]), np.array([1.0])])[0] < 1.0


def test_cut_triangles_keep_the_area_where_the_field_is_positive():
    triangle, field = np.array([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]), np.array([[1.0, -1.0, -1.0]])
    for sign, area in ((1, 0.125), (-1, 0.375)):
        parts, edges = _cut(triangle, sign * field)
        a, b = parts[:, 1] - parts[:, 0], parts[:, 2] - parts[:, 0]
        assert abs(np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum() / 2 - area) < 1e-12
        assert len(edges) == 1


def test_pavement_is_raised_where_the_kerb_distance_is_positive():
    roads = draw_roads(np.random.default_rng(5))
    mesh = build(ground_mesh(roads, 80.0).triangles)
    xy = np.random.default_rng(0).uniform(-60, 60, (4000, 2))
    origins = np.column_stack([xy, np.full(len(xy), 10.0)]).astype(np.float32)
    down = np.broadcast_to(np.float32([0, 0, -1]), origins.shape).copy()
    heights = 10 - mesh.run(origins, down, query="DISTANCE")
    distance = roads.kerb_distance(xy[:, 0], xy[:, 1])
    clear = np.abs(distance) > 0.3  # the mesh cuts corners by a little
    assert (heights[clear] > 0.1).tolist() == (distance[clear] > 0).tolist()
    assert RoadMap((roads.roads[0],), ()).distance_at(0.0, 0.0) < 0


def test_points_in_boxes_counts_as_the_plain_rule_does():
    rng = np.random.default_rng(0)
    points = rng.uniform(-5, 5, (3000, 3))
    boxes = np.column_stack([rng.uniform(-3, 3, (20, 3)), rng.uniform(1, 4, (20, 3)), rng.uniform(-4, 4, 20)])
    expected = []
    for x, y, z, length, width, height, yaw in boxes:
        turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        local = (points - (x, y, z)) @ turn
        expected.append((np.abs(local) <= np.array([length, width, height]) / 2).all(axis=1).sum())
    assert points_in_boxes(points, boxes).tolist() == expected
    assert sum(expected) > 100


def test_visibility_levels_have_the_limits_of_nuscenes():
    assert [level(share) for share in (0.0, 0.4, 0.41, 0.6, 0.61, 0.8, 0.81, 1.0)] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_cameras_look_round_the_vehicle_as_nuscenes_do():
    sensors = {sensor.channel: sensor for sensor in rig(WorldConfig(image_size_px=(1600, 900)))}
    yaws = {}
    for channel, sensor in sensors.items():
        assert abs(np.linalg.det(sensor.sensor2ego[:3, :3]) - 1) < 1e-9
        if sensor.intrinsic is not None:
            forward = sensor.sensor2ego[:3, 2]
            assert abs(forward[2]) < 0.03  # level
            yaws[channel] = np.degrees(np.arctan2(forward[1], forward[0]))
    expected = {
        "CAM_FRONT": 0,
        "CAM_FRONT_LEFT": 55,
        "CAM_FRONT_RIGHT": -55,
        "CAM_BACK_LEFT": 110,
        "CAM_BACK_RIGHT": -110,
    }
    for channel, yaw in expected.items():
        assert abs(yaws[channel] - yaw) < 3, yaws
    assert abs(abs(yaws["CAM_BACK"]) - 180) < 2
    right, forward = sensors["LIDAR_TOP"].sensor2ego[:3, 0], sensors["LIDAR_TOP"].sensor2ego[:3, 1]
    assert right[1] < -0.99 and forward[0] > 0.99
    front = sensors["CAM_FRONT"].intrinsic
    assert front is not None and abs(front[0, 0] - 1266.4) < 0.1
