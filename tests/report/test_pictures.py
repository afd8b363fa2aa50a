from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from distillbev.boxes import Boxes3D
from distillbev.data.samples import NuScenes
from distillbev.data.schema import Annotations, CameraFrame, LidarSweep, Sample
from distillbev.geometry import pose_matrix
from distillbev.report.camera_views import (
    NEAR_M,
    camera_mosaic,
    clip_segment,
    depth_colours,
    draw_boxes_on_image,
    draw_points_on_image,
    lidar_to_image,
)
from distillbev.report.inspection import inspect_sample
from distillbev.report.paint import BoxLayer
from distillbev.report.top_view import bev_picture

REPOSITORY = Path(__file__).parents[2]
REAL_FRAME = REPOSITORY.parent / "shared" / "data" / "nuscenes-one-frame"

# A camera in the LiDAR's place that looks along y (forward): focal length 100 px, 200 x 100 pixels.
CAM2LIDAR = pose_matrix(np.zeros(3), np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]))
CAM2IMG = np.array([[100.0, 0, 100, 0], [0, 100, 50, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
LIDAR2IMG = CAM2IMG @ np.linalg.inv(CAM2LIDAR)
GREY = Image.new("RGB", (200, 100), (90, 90, 90))
RED = (255, 0, 0)


def field_of(picture: Image.Image) -> Image.Image:
    """The ground alone: the legend cut away."""
    return picture.crop((0, 0, picture.width, picture.height - 34))


def layer_of(*boxes: list[float], colour=RED, scores: list[float] | None = None) -> BoxLayer:
    tensor = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 9)
    labels = torch.zeros(len(tensor), dtype=torch.int64)
    return BoxLayer(
        Boxes3D(tensor, labels, None if scores is None else torch.tensor(scores)), "boxes", colour
    )


def painted(image: Image.Image, colour=RED) -> np.ndarray:
    """(n, 2) column and row of the pixels that are more of this colour than of the others."""
    pixels = np.asarray(image, dtype=int)
    main = int(np.argmax(colour))
    others = [channel for channel in range(3) if channel != main]
    rows, columns = np.nonzero(pixels[..., main] > pixels[..., others].max(axis=-1) + 60)
    return np.stack([columns, rows], axis=-1)


def test_a_box_is_outlined_where_it_projects():
    # 4 m wide, 2 m high, faces at 9 and 11 m: the near one spans 100 +- 22.2 and 50 +- 11.1.
    image = draw_boxes_on_image(GREY, [layer_of([0, 10, 0, 2, 4, 2, np.pi / 2, 0, 0])], LIDAR2IMG)
    spots = painted(image)
    np.testing.assert_allclose(spots.min(axis=0), [77, 38], atol=2)
    np.testing.assert_allclose(spots.max(axis=0), [122, 61], atol=2)
    assert np.asarray(GREY).max() == 90  # the picture given is not painted on


@pytest.mark.parametrize("box", [[0, -10, 0, 2, 4, 2, 0, 0, 0], [60, 10, 0, 2, 4, 2, 0, 0, 0]])
def test_a_box_behind_or_beside_the_camera_leaves_no_mark(box: list[float]):
    image = draw_boxes_on_image(GREY, [layer_of(box)], LIDAR2IMG)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(GREY))


def test_a_box_that_reaches_behind_the_camera_is_cut_not_folded_over():
    # A wall to the left, 2 m away, from 20 m behind to 20 m ahead. All of it must stay left of the centre.
    image = draw_boxes_on_image(GREY, [layer_of([-3, 0, 0, 40, 2, 2, np.pi / 2, 0, 0])], LIDAR2IMG)
    spots = painted(image)
    assert len(spots) > 50
    assert spots[:, 0].max() < 100
    assert spots[:, 0].min() == 0


def test_no_boxes_leave_the_picture_as_it_was():
    image = draw_boxes_on_image(GREY, [layer_of()], LIDAR2IMG)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(GREY))


@given(st.lists(st.floats(-10, 10), min_size=6, max_size=6))
def test_a_clipped_segment_lies_on_the_segment_and_in_front(values: list[float]):
    start, end = np.array(values[:3]), np.array(values[3:])
    clipped = clip_segment(start, end)
    if max(start[2], end[2]) < NEAR_M:
        assert clipped is None
        return
    assert clipped is not None
    length = np.linalg.norm(end - start)
    for point in clipped:
        assert point[2] >= NEAR_M - 1e-9
        assert np.linalg.norm(point - start) + np.linalg.norm(point - end) <= length + 1e-6


def test_points_fall_on_their_pixels_and_near_ones_cover_far_ones():
    far, near = [2.0, 40.0, 1.0], [0.2, 4.0, 0.1]  # both at pixel 105, 47.5
    behind = [0.0, -5.0, 0.0]
    image = draw_points_on_image(GREY, np.array([near, far, behind]), LIDAR2IMG, radius_px=2)
    changed = np.argwhere((np.asarray(image) != 90).any(axis=-1))
    np.testing.assert_allclose(changed.mean(axis=0), [47, 105], atol=1)
    np.testing.assert_allclose(np.asarray(image)[47, 105], depth_colours(np.array([4.0]), 60)[0], atol=2)


def test_the_view_from_above_has_x_to_the_right_and_y_up():
    ahead_right = layer_of([10, 20, 0, 4, 2, 1.5, 0, 0, 0])
    picture = bev_picture(None, [ahead_right], extent_m=40, size_px=400)
    spots = painted(field_of(picture))
    centre = (spots.min(axis=0) + spots.max(axis=0)) / 2
    np.testing.assert_allclose(
        centre, [(10 + 40) * 5 + 1.5, (40 - 20) * 5], atol=2
    )  # the tick adds to the right
    width, height = np.ptp(spots, axis=0)
    assert width > 1.5 * height  # heads along x


def test_uncertain_detections_are_fainter():
    def redness(score: float) -> int:
        layer = layer_of([10, 20, 0, 8, 8, 1.5, 0, 0, 0], scores=[score])
        pixels = np.asarray(field_of(bev_picture(None, [layer], 40, 400)), dtype=int)
        return int((pixels[..., 0] - pixels[..., 1]).max())

    assert redness(0.0) > 20
    assert redness(0.1) + 60 < redness(1.0)


def test_pictures_take_no_points_no_boxes_and_unknown_velocity():
    empty = bev_picture(np.zeros((0, 5)), [layer_of()], size_px=200)
    assert empty.size == (200, 234)
    nan = float("nan")
    bev_picture(
        np.full((3, 5), 100.0), [layer_of([0, 10, 0, 4, 2, 1, 0, nan, nan], colour=None)], size_px=200
    )


def hand_made_sample(folder: Path, num_cameras: int, annotated: bool = True) -> Sample:
    eye = np.eye(4)
    cameras = []
    for i in range(num_cameras):
        GREY.save(folder / f"{i}.jpg")
        cameras.append(CameraFrame(f"CAM_{i}", folder / f"{i}.jpg", 0, (200, 100), CAM2IMG, CAM2LIDAR, eye))
    np.array([[0, 10, 0, 1, 0]], dtype="<f4").tofile(folder / "points.bin")
    one = np.ones(1, dtype=np.int64)
    annotations = Annotations(
        np.array([[0, 10, 0, 2, 4, 2, 0, np.nan, np.nan]]),
        0 * one - 1,
        ("animal",),
        ("",),
        ("i",),
        one,
        one,
        one,
    )
    sweep = LidarSweep(folder / "points.bin", 0, eye, eye)
    return Sample(
        "token", "scene", 0, eye, eye, tuple(cameras), (sweep,), annotations if annotated else None, None
    )


@pytest.mark.parametrize(
    ("cameras", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (4, 2, 2), (5, 3, 2), (6, 3, 2)]
)
def test_a_mosaic_takes_any_rig(tmp_path: Path, cameras: int, columns: int, rows: int):
    mosaic = camera_mosaic(hand_made_sample(tmp_path, cameras), tile_width_px=100)
    assert mosaic.size == (columns * 106 + 6, 34 + rows * 56)


def test_a_mosaic_shows_images_of_other_shapes_whole(tmp_path: Path):
    sample = hand_made_sample(tmp_path, 2)
    upright = replace(sample.cameras[1], size_wh_px=(90, 300), path=tmp_path / "upright.png")
    Image.new("RGB", upright.size_wh_px, (0, 200, 0)).save(upright.path)
    mosaic = camera_mosaic(replace(sample, cameras=(sample.cameras[0], upright)), tile_width_px=200)
    assert mosaic.size == (2 * 206 + 6, 34 + 150 + 6)  # no row is higher than a 4:3 image of full width
    columns = painted(mosaic, (0, 200, 0))[:, 0]
    assert columns.max() - columns.min() + 1 == 45


def test_inspecting_writes_every_picture(tmp_path: Path):
    paths = inspect_sample(hand_made_sample(tmp_path, 2), tmp_path / "out")
    assert [path.name for path in paths] == [
        "scene_token_boxes.jpg",
        "scene_token_points.jpg",
        "scene_token_ground.jpg",
        "scene_token_bev.png",
    ]
    assert all(Image.open(path).width > 100 for path in paths)
    unlabelled = inspect_sample(hand_made_sample(tmp_path, 0, annotated=False), tmp_path / "out")
    assert [path.name for path in unlabelled] == ["scene_token_bev.png"]


def test_the_real_frame_is_drawn_with_boxes_on_their_objects():
    """The orange-white truck ahead: the box around it holds the LiDAR's returns from it, in pixels too."""
    if not REAL_FRAME.is_dir():
        pytest.skip(f"the real nuScenes frame is not there ({REAL_FRAME.name})")
    nuscenes = NuScenes(REAL_FRAME)
    sample = nuscenes.sample(nuscenes.sample_tokens()[0])
    for path in inspect_sample(sample, REPOSITORY / "test-output" / "inspect"):
        assert path.stat().st_size > 50_000
    front = sample.cameras[1]
    assert sample.annotations is not None
    truck = sample.annotations.boxes[np.argmax(sample.annotations.num_lidar_points)]
    u, v, d = (lidar_to_image(sample, front) @ [*truck[:3], 1])[:3]
    assert 300 < u / d < 700  # left of the middle, as the photograph shows
    assert 250 < v / d < 700
