import itertools
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distillbev.classes import CLASSES
from distillbev.data.check import check_dataset
from distillbev.data.frames import FrameDataset, frames_of_tokens
from distillbev.data.points import load_points
from distillbev.data.recording_writer import write_dataset
from distillbev.data.recordings import (
    KeyFrame,
    LabelledObject,
    Rig,
    RigCamera,
    Scene,
    Shot,
)
from distillbev.data.samples import NOMINAL_LIDAR2EGO, NuScenes
from distillbev.data.settings import DataConfig
from distillbev.errors import DataError
from distillbev.geometry import pose_matrix, rotation_about_z, transform_points

START_US = 1_600_000_000_000_000
AHEAD = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
CAM2IMG = np.array([[50.0, 0, 30], [0, 52, 20], [0, 0, 1]])
SIDE2IMG = np.array([[40.0, 0, 15], [0, 40, 25], [0, 0, 1]])
FRONT = RigCamera("front", (60, 40), CAM2IMG, pose_matrix(np.array([1.5, 0, 1.4]), AHEAD))
SIDE = RigCamera(
    "side.wide", (32, 48), SIDE2IMG, pose_matrix(np.array([1, 1, 1]), rotation_about_z(1.3) @ AHEAD)
)
# x forward, as most LiDARs have it, and leaning forward by 0.2 rad.
LEANING = np.array([[np.cos(0.2), 0, np.sin(0.2)], [0, 1, 0], [-np.sin(0.2), 0, np.cos(0.2)]])
LIDAR2EGO = pose_matrix(np.array([0.5, 0.1, 2.2]), LEANING)
RIG = Rig((SIDE, FRONT), LIDAR2EGO)
CAR_SIZE = (4.0, 2.0, 1.5)


def ego2global(seconds: float) -> np.ndarray:
    return pose_matrix(np.array([500 + 8 * seconds, 700, 0.0]), rotation_about_z(0.3 + 0.1 * seconds))


def car2global(seconds: float) -> np.ndarray:
    return pose_matrix(np.array([512 + 3 * seconds, 706 - seconds, 0.8]), rotation_about_z(-2.5))


def points_on_car(seconds: float) -> np.ndarray:
    """(7, 4) in the LiDAR's own frame: all inside the car."""
    inside = np.random.default_rng(0).uniform(-0.45, 0.45, (7, 3)) * CAR_SIZE
    lidar2global = ego2global(seconds) @ LIDAR2EGO
    xyz = transform_points(np.linalg.inv(lidar2global) @ car2global(seconds), inside)
    return np.concatenate([xyz, np.full((7, 1), 90.0)], axis=1)


def key_frame(number: int, lidar: bool = True) -> KeyFrame:
    seconds = 0.5 * number
    us = START_US + 500_000 * number

    def shot(late_us: int, content) -> Shot:
        return Shot(us + late_us, ego2global(seconds + 1e-6 * late_us), content)

    rng = np.random.default_rng(number)
    images = {
        camera.channel: shot(late_us, rng.integers(0, 256, (*camera.size_wh_px[::-1], 3), dtype=np.uint8))
        for camera, late_us in ((FRONT, 12_000), (SIDE, -30_000))
    }
    return KeyFrame(
        us,
        images,
        shot(0, points_on_car(seconds)) if lidar else None,
        [shot(-100_000, points_on_car(seconds - 0.1))] if lidar else (),
        [LabelledObject("the car", "car", car2global(seconds), CAR_SIZE, "vehicle.moving", 3)],
    )


def scene(
    frames=range(3), name: str = "drive-1", split: str = "train", lidar: bool = True, rig: Rig = RIG
) -> Scene:
    return Scene(name, split, rig, (key_frame(number, lidar) for number in frames))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rig") / "data"
    return write_dataset(root, [scene(), scene(name="drive-2", split="val", lidar=False)])


def test_what_was_recorded_is_read_again(written: Path):
    nuscenes = NuScenes(written)
    assert nuscenes.splits() == {"train": ["drive-1"], "val": ["drive-2"]}
    sample = nuscenes.sample(nuscenes.sample_tokens("train")[1], num_sweeps=1)
    assert sample.timestamp_us == START_US + 500_000
    assert [camera.channel for camera in sample.cameras] == ["front", "side.wide"]
    for camera, mounted, late_s in zip(sample.cameras, (FRONT, SIDE), (0.012, -0.03), strict=True):
        assert camera.size_wh_px == mounted.size_wh_px
        np.testing.assert_array_equal(camera.cam2img[:3, :3], mounted.cam2img)
        np.testing.assert_allclose(camera.cam2ego, mounted.cam2ego, atol=1e-12)
        np.testing.assert_allclose(camera.ego2global, ego2global(0.5 + late_s), atol=1e-9)
    assert [sweep.timestamp_us - sample.timestamp_us for sweep in sample.sweeps] == [0, -100_000]


def test_boxes_come_back_with_velocity_and_counted_points(written: Path):
    nuscenes = NuScenes(written)
    sample = nuscenes.sample(nuscenes.sample_tokens("train")[1])
    annotations = sample.annotations
    assert annotations is not None
    (box,) = annotations.boxes
    np.testing.assert_allclose(
        transform_points(sample.lidar2global, box[:3]), car2global(0.5)[:3, 3], atol=1e-9
    )
    np.testing.assert_allclose(box[3:6], CAR_SIZE)
    velocity = sample.lidar2global[:2, :2] @ box[7:9]
    np.testing.assert_allclose(velocity, [3, -1], atol=1e-6)
    assert annotations.labels.tolist() == [CLASSES.index("car")]
    assert (annotations.attributes, annotations.visibility.tolist()) == (("vehicle.moving",), [3])
    assert annotations.num_lidar_points.tolist() == [7]


def test_points_lie_level_with_y_forward_wherever_the_lidar_looks(written: Path):
    nuscenes = NuScenes(written)
    sample = nuscenes.sample(nuscenes.sample_tokens("train")[0])
    np.testing.assert_allclose(sample.lidar2ego[:3, :3], NOMINAL_LIDAR2EGO[:3, :3], atol=1e-12)
    np.testing.assert_allclose(sample.lidar2ego[:3, 3], LIDAR2EGO[:3, 3], atol=1e-12)
    points = load_points(sample)
    found = transform_points(sample.lidar2global, points[:, :3].astype(np.float64))
    recorded = transform_points(ego2global(0) @ LIDAR2EGO, points_on_car(0)[:, :3])
    np.testing.assert_allclose(found, recorded, atol=1e-4)
    assert (points[:, 3] == 90).all()


def test_scenes_without_lidar_keep_the_frame_and_their_objects_as_targets(written: Path):
    nuscenes = NuScenes(written)
    token = nuscenes.sample_tokens("val")[1]
    sample = nuscenes.sample(token)
    assert sample.sweeps == ()
    np.testing.assert_allclose(sample.lidar2ego[:3, 3], LIDAR2EGO[:3, 3], atol=1e-12)
    assert nuscenes.labels_in(token) == {CLASSES.index("car")}
    config = DataConfig(image_size_px=(32, 16), load_points=False)
    batch = FrameDataset(nuscenes, frames_of_tokens([token], labelled=True), config)[0, 0]
    assert batch.boxes[0] is not None and len(batch.boxes[0]) == 1
    assert batch.images is not None and batch.images.shape == (1, 2, 3, 16, 32)


def test_points_of_a_sample_without_lidar_are_an_error_not_an_empty_cloud(written: Path):
    nuscenes = NuScenes(written)
    frames = frames_of_tokens(nuscenes.sample_tokens("val"))
    with pytest.raises(DataError, match=r"scene drive-2.*no LiDAR recording.*data.load_points=false"):
        FrameDataset(nuscenes, frames, DataConfig())[0, 0]


def test_the_check_finds_nothing_wrong(written: Path):
    assert check_dataset(written) == []


def test_the_official_devkit_loads_it(written: Path):
    devkit = pytest.importorskip("nuscenes.nuscenes", reason="needs the oracle packages")
    nuscenes = devkit.NuScenes(version="v1.0-rig", dataroot=str(written), verbose=False)
    sample = nuscenes.sample[1]
    path, (box,), intrinsic = nuscenes.get_sample_data(sample["data"]["front"])
    assert Image.open(path).size == FRONT.size_wh_px
    np.testing.assert_array_equal(intrinsic, CAM2IMG)
    expected = np.linalg.inv(ego2global(0.512) @ FRONT.cam2ego) @ car2global(0.5)
    np.testing.assert_allclose(box.center, expected[:3, 3], atol=1e-6)


def test_image_files_are_taken_as_they_are(tmp_path: Path):
    Image.new("RGB", FRONT.size_wh_px, (10, 20, 30)).save(tmp_path / "Für Elise.PNG")
    frame = key_frame(0)
    images = dict(frame.images)
    images["front"] = replace(images["front"], content=tmp_path / "Für Elise.PNG")
    root = write_dataset(tmp_path / "out", [replace(scene(), key_frames=[replace(frame, images=images)])])
    (file,) = (root / "samples" / "front").iterdir()
    assert file.suffix == ".png"
    assert file.read_bytes() == (tmp_path / "Für Elise.PNG").read_bytes()


def test_nothing_is_left_behind_by_a_recording_that_breaks_off(tmp_path: Path):
    def frames():
        yield key_frame(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "out", [replace(scene(), key_frames=frames())])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is in use"):
        write_dataset(tmp_path, [scene()])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def spoilt_frame(**changes) -> Scene:
    return replace(scene(), key_frames=[replace(key_frame(0), **changes)])


def spoilt_image(**changes) -> Scene:
    images = dict(key_frame(0).images)
    return spoilt_frame(images=images | {"front": replace(images["front"], **changes)})


def spoilt_object(**changes) -> Scene:
    return spoilt_frame(objects=[replace(key_frame(0).objects[0], **changes)])


def spoilt_camera(**changes) -> Scene:
    return replace(scene(), rig=Rig((replace(FRONT, **changes), SIDE)))


MIRRORED = np.diag([1.0, -1, 1, 1])
FAULTS = {
    r"key frame 0: images of front, the rig has side.wide, front": spoilt_frame(
        images={"front": key_frame(0).images["front"]}
    ),
    r"key frame 1 is 0 us after": replace(scene(), key_frames=[key_frame(0), key_frame(0)]),
    r"key frame 1 is -500000 us after": replace(scene(), key_frames=[key_frame(1), key_frame(0)]),
    r"front: recorded at 1600000000 us, its key frame at": spoilt_image(timestamp_us=1_600_000_000),
    r"timestamp_us 1600000000000000\.0; expected a whole number": spoilt_image(timestamp_us=1.6e15),
    r"front, ego2global.*is no rotation": spoilt_image(ego2global=MIRRORED),
    r"ego2global.*expected a finite 4x4 matrix": spoilt_image(ego2global=np.eye(3)),
    r"an array \(60, 40, 3\) of uint8, expected \(40, 60, 3\)": spoilt_image(
        content=np.zeros((60, 40, 3), np.uint8)
    ),
    r"none.jpg cannot be read as an image": spoilt_image(content=Path("none.jpg")),
    r"point 0 is .*nan.*drop points without a return": spoilt_frame(
        points=replace(key_frame(0).points, content=np.full((2, 3), np.nan))
    ),
    r"expected an array \(P, 3 to 5\)": spoilt_frame(
        points=replace(key_frame(0).points, content=np.ones((2, 6)))
    ),
    r"points, but the rig has no LiDAR": scene(rig=Rig((FRONT, SIDE))),
    r"LIDAR_TOP: .* comes after .* in the order of time": spoilt_frame(sweeps=[key_frame(0).points]),
    r"category 'cra'; expected one of car, truck": spoilt_object(category="cra"),
    r"object 'the car' is 8\d\d m away from the car; box2global": spoilt_object(box2global=np.eye(4)),
    r"size_lwh_m \(4, 0, 1\); expected": spoilt_object(size_lwh_m=(4, 0, 1)),
    r"attribute 'moving'; expected one of vehicle.moving": spoilt_object(attribute="moving"),
    r"visibility 5; expected 0": spoilt_object(visibility=5),
    r"object 'the car' comes twice": spoilt_frame(objects=key_frame(0).objects * 2),
    r"expected \[\[fx, 0, cx\]": spoilt_camera(cam2img=np.eye(4)),
    r"size_wh_px \(0, 40\)": spoilt_camera(size_wh_px=(0, 40)),
    r"camera 'a/b': it names files": spoilt_camera(channel="a/b"),
    r"this is the LiDAR's name": spoilt_camera(channel="LIDAR_TOP"),
    r"two cameras of one channel": spoilt_camera(channel="side.wide"),
    r"scene '\.\.': it names files": scene(name=".."),
    r"key frame 0: no image and no points": replace(
        scene(), rig=Rig((), LIDAR2EGO), key_frames=[KeyFrame(START_US, {})]
    ),
    r"object 'the car': vehicle.truck, in an earlier key frame vehicle.car": replace(
        scene(),
        key_frames=[
            key_frame(0),
            replace(key_frame(1), objects=[replace(key_frame(1).objects[0], category="truck")]),
        ],
    ),
    r"has no key frame": scene(frames=()),
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults_are_told_and_nothing_is_written(tmp_path: Path, message: str):
    with pytest.raises(DataError, match=message):
        write_dataset(tmp_path / "out", [FAULTS[message]])
    assert list(tmp_path.iterdir()) == []


def test_two_scenes_of_one_name_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="'drive-1' comes twice"):
        write_dataset(tmp_path / "out", itertools.repeat(scene(frames=[0]), 2))


def test_an_extrinsic_the_wrong_way_round_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    inverted = replace(FRONT, cam2ego=np.linalg.inv(FRONT.cam2ego))
    write_dataset(tmp_path / "out", [replace(scene(), rig=Rig((inverted, SIDE), LIDAR2EGO))])
    assert "front: the image's lower edge does not point down" in caplog.text
    assert "side" not in caplog.text


def test_all_thirteen_tables_are_written(written: Path):
    tables = {path.stem: json.loads(path.read_text()) for path in (written / "v1.0-rig").iterdir()}
    assert len(tables) == 13 and all(tables.values())


def test_the_page_about_rigs_tells_every_field():
    page = (Path(__file__).parents[2] / "docs" / "rigs.md").read_text()
    for part in (Scene, Rig, RigCamera, KeyFrame, Shot, LabelledObject):
        for field in fields(part):
            assert f"`{part.__name__}.{field.name}`" in page
