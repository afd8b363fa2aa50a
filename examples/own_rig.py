"""A rig of one's own as a dataset: three cameras of three sizes, a LiDAR in training only (docs/rigs.md).

`python examples/own_rig.py data/rig`, then `distillbev inspect data/rig`. Your recordings replace `drive`.
"""

import sys

import numpy as np
from PIL import Image, ImageDraw

from distillbev.boxes import box_corners
from distillbev.data.recording_writer import write_dataset
from distillbev.data.recordings import KeyFrame, LabelledObject, Rig, RigCamera, Scene, Shot
from distillbev.geometry import invert_rigid, pose_matrix, rotation_about_z, transform_points

AHEAD = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # axes of a camera that looks ahead, in the ego frame
CARS = np.array([(x, y, 0.8, 4.5, 1.9, 1.6, 0) for x in range(-20, 60, 9) for y in (-7, 4)], dtype=float)


def camera(channel: str, width: int, height: int, heading_deg: float, x_m: float, focal_px: float):
    cam2img = np.array([[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1]])
    turned = rotation_about_z(np.radians(heading_deg)) @ AHEAD
    return RigCamera(channel, (width, height), cam2img, pose_matrix(np.array([x_m, 0, 1.4]), turned))


def photo(seen_by: RigCamera, ego2global: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: cars on grey ground, painted from far to near."""
    image = Image.new("RGB", seen_by.size_wh_px, (150, 180, 220))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, seen_by.size_wh_px[1] / 2, *seen_by.size_wh_px), (90, 90, 90))
    corners = transform_points(invert_rigid(ego2global @ seen_by.cam2ego), box_corners(CARS))
    for car in sorted(corners[corners[..., 2].min(axis=1) > 0.3], key=lambda car: -car[:, 2].mean()):
        pixels = ((car @ seen_by.cam2img.T) / car[:, 2:])[:, :2]
        for face in ((0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7), (4, 5, 6, 7)):
            pen.polygon([tuple(pixels[corner]) for corner in face], (140, 60, 40), (60, 20, 20))
    return np.array(image)


def drive(rig: Rig, with_lidar: bool, start_us: int = 1_700_000_000_000_000):
    """Four key frames at 2 Hz and 5 m/s."""
    on_cars = np.random.default_rng(0).uniform(-0.5, 0.5, (len(CARS), 300, 3)) * CARS[:, None, 3:6]
    for us in range(start_us, start_us + 2_000_000, 500_000):
        ego2global = pose_matrix(np.array([5e-6 * (us - start_us), 0, 0]), np.eye(3))
        seen = (CARS[:, None, :3] + on_cars).reshape(-1, 3)
        points = transform_points(invert_rigid(ego2global @ rig.lidar2ego), seen) if with_lidar else None
        images = {eye.channel: Shot(us, ego2global, photo(eye, ego2global)) for eye in rig.cameras}
        poses = [pose_matrix(car[:3], np.eye(3)) for car in CARS]
        cars = [LabelledObject(f"car {i}", "car", pose, (4.5, 1.9, 1.6)) for i, pose in enumerate(poses)]
        yield KeyFrame(us, images, None if points is None else Shot(us, ego2global, points), objects=cars)


if __name__ == "__main__":
    ahead, rear = camera("ahead", 640, 360, 0, 1.7, 400), camera("rear", 320, 240, 180, 0, 150)
    rig = Rig(
        (ahead, camera("left", 480, 400, 90, 1, 260), rear), pose_matrix(np.array([0.9, 0, 1.9]), np.eye(3))
    )
    scenes = [Scene("first", "train", rig, drive(rig, True)), Scene("second", "val", rig, drive(rig, False))]
    print(write_dataset(sys.argv[1], scenes))
