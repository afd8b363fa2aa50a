"""A nuScenes folder to reason about: two scenes of three key frames, three cameras, one LiDAR."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from distillbev.geometry import (
    invert_rigid,
    pose_matrix,
    rotation_about_z,
    rotation_to_quaternion,
    transform_points,
)

CAMERAS = ("CAM_BACK", "CAM_FRONT", "CAM_SIDE")
IMAGE_WH = (160, 90)
SWEEPS_PER_KEY = 5  # 0.1 s apart, every fifth one is a key frame
KEYS_PER_SCENE = 3
START_US = 1_600_000_000_000_000

LIDAR2EGO = pose_matrix(np.array([0.9, 0.0, 1.8]), rotation_about_z(-np.pi / 2))
# Looks along ego x: the camera's x is ego -y, its y is ego -z.
FORWARD = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
CAMERA_YAWS = {"CAM_FRONT": 0.0, "CAM_BACK": np.pi, "CAM_SIDE": np.pi / 2}
INTRINSIC = [[120.0, 0.0, 80.0], [0.0, 120.0, 45.0], [0.0, 0.0, 1.0]]

# Global position at the scene's start, velocity, size (w, l, h), yaw, key frames in which it is annotated.
OBJECTS = {
    "vehicle.car": ((612.0, 1604.0, 0.8), (4.0, 2.0), (1.9, 4.5, 1.6), 0.46, (0, 1, 2)),
    "human.pedestrian.adult": ((606.0, 1593.0, 0.9), (0.0, -1.0), (0.6, 0.7, 1.8), -1.5, (0, 1)),
    "movable_object.barrier": ((620.0, 1600.0, 0.5), (0.0, 0.0), (2.0, 0.5, 1.0), 2.0, (1,)),
    "animal": ((609.0, 1598.0, 0.3), (1.0, 0.0), (0.3, 0.8, 0.6), 0.0, (0, 2)),
}
# A fixed point of the world that every sweep sees.
LANDMARK = np.array([618.0, 1607.0, 2.5])


def ego2global_at(seconds: float) -> np.ndarray:
    """The car drives a gentle left turn on a slope."""
    slope = np.array([[np.cos(0.03), 0, np.sin(0.03)], [0, 1, 0], [-np.sin(0.03), 0, np.cos(0.03)]])
    position = np.array([600 + 5 * seconds, 1600 + 0.5 * seconds**2, 0.1 * seconds])
    return pose_matrix(position, rotation_about_z(0.3 + 0.2 * seconds) @ slope)


def write_tiny_nuscenes(root: Path, version: str = "v1.0-mini", with_lidar: bool = True) -> Path:
    """Writes the folder and returns it; files are real JPEG images and point files."""
    tables: dict[str, list[dict]] = {name: [] for name in ("scene", "sample", "sample_data", "ego_pose")}
    tables |= {name: [] for name in ("instance", "sample_annotation")}
    tables["sensor"] = [
        {"token": f"sensor-{name}", "channel": name, "modality": "camera"} for name in CAMERAS
    ]
    tables["sensor"].append({"token": "sensor-LIDAR_TOP", "channel": "LIDAR_TOP", "modality": "lidar"})
    tables["calibrated_sensor"] = [
        _calibration(name, pose_matrix(np.array([1.5, 0.0, 1.5]), rotation_about_z(yaw) @ FORWARD), INTRINSIC)
        for name, yaw in CAMERA_YAWS.items()
    ]
    tables["calibrated_sensor"].append(_calibration("LIDAR_TOP", LIDAR2EGO, []))
    tables["category"] = [{"token": f"category-{name}", "name": name, "description": ""} for name in OBJECTS]
    tables["attribute"] = [{"token": "moving", "name": "vehicle.moving", "description": ""}]
    tables["visibility"] = [{"token": str(i), "level": "", "description": ""} for i in (1, 2, 3, 4)]
    tables["log"] = [
        {"token": "log", "logfile": "", "vehicle": "", "date_captured": "", "location": "nowhere"}
    ]
    tables["map"] = [
        {"token": "map", "log_tokens": ["log"], "category": "semantic_prior", "filename": "maps/m.png"}
    ]
    for scene in ("scene-a", "scene-b"):
        _write_scene(root, tables, scene, with_lidar)
    (root / "maps").mkdir(parents=True)
    Image.new("L", (1, 1)).save(root / "maps" / "m.png")  # the devkit wants one
    (root / version).mkdir()
    for name, rows in tables.items():
        (root / version / f"{name}.json").write_text(json.dumps(rows))
    (root / "splits.json").write_text(json.dumps({"train": ["scene-b"], "val": ["scene-a"]}))
    return root


def edit_table(root: Path, name: str, edit, version: str = "v1.0-mini") -> None:
    """Applies `edit` to the list of rows of a table."""
    path = root / version / f"{name}.json"
    rows = json.loads(path.read_text())
    edit(rows)
    path.write_text(json.dumps(rows))


def _write_scene(root: Path, tables: dict[str, list[dict]], scene: str, with_lidar: bool) -> None:
    rng = np.random.default_rng(len(tables["scene"]))
    tokens = [f"{scene}-sample-{i}" for i in range(KEYS_PER_SCENE)]
    tables["scene"].append(
        {
            "token": f"{scene}-token",
            "name": scene,
            "log_token": "log",
            "nbr_samples": KEYS_PER_SCENE,
            "first_sample_token": tokens[0],
            "last_sample_token": tokens[-1],
            "description": "",
        }
    )
    start_us = START_US + 10_000_000 * len(tables["scene"])
    for i, token in enumerate(tokens):
        row = {"token": token, "timestamp": start_us + 500_000 * i, "scene_token": f"{scene}-token"}
        tables["sample"].append(row | _neighbours(tokens, i))
    sweep_tokens = [f"{scene}-lidar-{i}" for i in range(SWEEPS_PER_KEY * (KEYS_PER_SCENE - 1) + 1)]
    for i, token in enumerate(sweep_tokens if with_lidar else []):
        seconds = 0.1 * i
        is_key = i % SWEEPS_PER_KEY == 0
        filename = f"{'samples' if is_key else 'sweeps'}/LIDAR_TOP/{token}.pcd.bin"
        _write_points(root / filename, seconds, rng)
        nearest = tokens[-(-i // SWEEPS_PER_KEY)]
        _add_recording(tables, token, nearest, "LIDAR_TOP", seconds, start_us, is_key, filename, (0, 0))
        tables["sample_data"][-1] |= _neighbours(sweep_tokens, i)
    for number, channel in enumerate(CAMERAS):
        camera_tokens = [f"{scene}-{channel}-{i}" for i in range(KEYS_PER_SCENE)]
        for i, token in enumerate(camera_tokens):
            filename = f"samples/{channel}/{token}.jpg"
            _write_image(root / filename, rng)
            seconds = 0.5 * i + 0.012 * (number - 1)  # cameras fire a little before and after the LiDAR
            _add_recording(tables, token, tokens[i], channel, seconds, start_us, True, filename, IMAGE_WH)
            tables["sample_data"][-1] |= _neighbours(camera_tokens, i)
    for category, (position, velocity, size, yaw, keys) in OBJECTS.items():
        instance = f"{scene}-instance-{category}"
        annotation_tokens = [f"{scene}-annotation-{category}-{i}" for i in keys]
        tables["instance"].append({"token": instance, "category_token": f"category-{category}"})
        tables["instance"][-1] |= {
            "nbr_annotations": len(keys),
            "first_annotation_token": annotation_tokens[0],
        }
        tables["instance"][-1]["last_annotation_token"] = annotation_tokens[-1]
        for i, key in enumerate(keys):
            moved = np.array(position) + 0.5 * key * np.array([*velocity, 0.0])
            annotation = {
                "token": annotation_tokens[i],
                "sample_token": tokens[key],
                "instance_token": instance,
                "visibility_token": "4",
                "attribute_tokens": ["moving"] if category == "vehicle.car" else [],
                "translation": moved.tolist(),
                "size": list(size),
                "rotation": rotation_to_quaternion(rotation_about_z(yaw)).tolist(),
                "num_lidar_pts": 0 if category == "movable_object.barrier" else 7,
                "num_radar_pts": 0,
            }
            tables["sample_annotation"].append(annotation | _neighbours(annotation_tokens, i))


def _neighbours(tokens: list[str], i: int) -> dict[str, str]:
    return {"prev": tokens[i - 1] if i else "", "next": tokens[i + 1] if i + 1 < len(tokens) else ""}


def _calibration(channel: str, sensor2ego: np.ndarray, intrinsic: list) -> dict:
    return {
        "token": f"calibration-{channel}",
        "sensor_token": f"sensor-{channel}",
        "translation": sensor2ego[:3, 3].tolist(),
        "rotation": rotation_to_quaternion(sensor2ego[:3, :3]).tolist(),
        "camera_intrinsic": intrinsic,
    }


def _add_recording(
    tables: dict[str, list[dict]],
    token: str,
    sample_token: str,
    channel: str,
    seconds: float,
    start_us: int,
    is_key: bool,
    filename: str,
    size_wh: tuple[int, int],
) -> None:
    pose = ego2global_at(seconds)
    timestamp = start_us + round(1e6 * seconds)
    tables["ego_pose"].append(
        {
            "token": f"pose-{token}",
            "timestamp": timestamp,
            "translation": pose[:3, 3].tolist(),
            "rotation": rotation_to_quaternion(pose[:3, :3]).tolist(),
        }
    )
    tables["sample_data"].append(
        {
            "token": token,
            "sample_token": sample_token,
            "ego_pose_token": f"pose-{token}",
            "calibrated_sensor_token": f"calibration-{channel}",
            "timestamp": timestamp,
            "fileformat": "jpg" if size_wh[0] else "pcd",
            "is_key_frame": is_key,
            "width": size_wh[0],
            "height": size_wh[1],
            "filename": filename,
        }
    )


def _write_points(path: Path, seconds: float, rng: np.random.Generator) -> None:
    """The landmark, a point on the car itself, and some clutter."""
    global2lidar = invert_rigid(ego2global_at(seconds) @ LIDAR2EGO)
    landmark = transform_points(global2lidar, LANDMARK[None])
    clutter = rng.uniform([-20, 3, -2], [20, 20, 2], (50, 3))
    xyz = np.concatenate([landmark, [[0.5, -0.5, -1.0]], clutter])
    points = np.concatenate([xyz, np.full((len(xyz), 1), 40.0), np.full((len(xyz), 1), 3.0)], axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    points.astype("<f4").tofile(path)


def _write_image(path: Path, rng: np.random.Generator) -> None:
    coarse = rng.integers(0, 256, (9, 16, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(IMAGE_WH, Image.Resampling.BICUBIC).save(path, quality=95)
