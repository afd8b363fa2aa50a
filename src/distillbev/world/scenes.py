"""One scene, from its number to its files and its rows of the tables."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.table_writer import Row, attribute_token, category_token, link, sensor_token, token
from ..geometry import pose_matrix, rotation_about_z, rotation_to_quaternion, transform_points
from .actors import annotated_box
from .cameras import take_picture
from .casting import Stage
from .lidar import MAX_RANGE_M, points_in_boxes, take_sweep
from .rig import KEY_PERIOD_US, LIDAR, SWEEP_PERIOD_US, Calibration, lidar_rays, rig
from .roads import draw_roads, ground_mesh
from .settings import WorldConfig
from .shading import Backdrop, LampLight
from .surroundings import draw_surroundings
from .textures import GroundLook
from .traffic import Catalogue, Traffic, draw_traffic
from .visibility import Silhouettes, level, visible_pixels, windows
from .weather import draw_air, draw_weather

# Scenes lie in the positive quadrant of the global frame, as map images need.
MAP_SIDE_M = 400.0
MAP_PIXEL_M = 0.1
MAP_RASTER_M = 0.8  # the map is evaluated this coarsely and enlarged
FIRST_TIMESTAMP_US = 1_700_000_000_000_000
GROUND_HALF_EXTENT_M = 240.0
SHADOWS_FROM_M = 13.0  # moving actors this near are present even when no pixel shows them
_CAMERA_PERIOD_US = 1_000_000 / 12


def scene_name(number: int) -> str:
    return f"scene-{number + 1:04d}"


@lru_cache(maxsize=1)
def _shapes(seed: int) -> tuple[Catalogue, Silhouettes]:
    """Kept from scene to scene: making a shape takes longer than using it."""
    catalogue = Catalogue(seed)
    return catalogue, Silhouettes(catalogue)


class SceneSimulator:
    """A scene of a world: a pure function of the world's settings and the scene's number."""

    def __init__(self, config: WorldConfig, number: int) -> None:
        self.config, self.number = config, number
        self.name = scene_name(number)
        self.log = f"sim-{self.name}"
        self.base_us = FIRST_TIMESTAMP_US + number * 1_000_000_000
        rng = self._rng("layout")
        self.weather = draw_weather(config.weathers, rng)
        air = draw_air(self.weather, rng)
        self.roads = draw_roads(rng)
        surroundings = draw_surroundings(self.roads, self._rng("surroundings"))
        duration_s = (config.key_frames_per_scene - 1) * KEY_PERIOD_US / 1e6
        times = np.arange(-0.5, duration_s + 0.26, 0.25)
        catalogue, self.silhouettes = _shapes(config.seed)
        self.traffic: Traffic = draw_traffic(
            self.roads, surroundings.obstacles, catalogue, times, config.extent_m, config.classes,
            self._rng("traffic"),
        )  # fmt: skip
        self.stage = Stage(ground_mesh(self.roads, GROUND_HALF_EXTENT_M), surroundings, self.traffic.actors)
        lamps = LampLight(surroundings.lamps) if air.dark else None
        self.backdrop = Backdrop(
            self.roads, GroundLook(self._rng("ground")), surroundings.facades, lamps, air
        )
        self.sensors = rig(config)
        self._sway = self._rng("sway").uniform(0, 2 * np.pi, 4)

    def _rng(self, *purpose: object) -> np.random.Generator:
        return np.random.default_rng(int(token(self.config.seed, self.number, *purpose), 16))

    def _token(self, *parts: object) -> str:
        return token(self.config.seed, self.name, *parts)

    def time_s(self, timestamp_us: int) -> float:
        return (timestamp_us - self.base_us) / 1e6

    def ego2world(self, timestamp_us: int) -> NDArray[np.float64]:
        """Pose of the vehicle in the scene's own frame; it pitches and rolls a little as it drives."""
        t = self.time_s(timestamp_us)
        x, y, yaw = self.traffic.ego.at(np.array([t]))[0]
        moving = min(self.traffic.ego.speed_mps / 5, 1.0)
        pitch = np.radians(0.25) * moving * np.sin(2 * np.pi * 0.9 * t + self._sway[0]) + np.radians(
            0.15
        ) * np.sin(self._sway[1])
        roll = np.radians(0.3) * moving * np.sin(2 * np.pi * 0.6 * t + self._sway[2]) + np.radians(
            0.2
        ) * np.sin(self._sway[3])
        cp, sp, cr, sr = np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
        tilt = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]]) @ np.array(
            [[1, 0, 0], [0, cr, -sr], [0, sr, cr]]
        )
        return pose_matrix(np.array([x, y, 0.0]), rotation_about_z(float(yaw)) @ tilt)

    # ---- writing ----

    def write(self, root: Path) -> dict[str, list[Row]]:
        """Writes images, sweeps, masks and map below `root`; returns the scene's rows by table."""
        config = self.config
        rows: dict[str, list[Row]] = defaultdict(list)
        key_us = [self.base_us + k * KEY_PERIOD_US for k in range(config.key_frames_per_scene)]
        sample_tokens = [self._token("sample", k) for k in range(len(key_us))]
        scene_token, log_token = self._token("scene"), self._token("log")
        samples = [
            {"token": t, "timestamp": us, "scene_token": scene_token}
            for t, us in zip(sample_tokens, key_us, strict=True)
        ]
        link(samples)
        rows["sample"] = samples
        rows["scene"] = [{
            "token": scene_token, "log_token": log_token, "nbr_samples": len(samples),
            "first_sample_token": sample_tokens[0], "last_sample_token": sample_tokens[-1],
            "name": self.name, "description": self._description(),
        }]  # fmt: skip
        rows["log"] = [{"token": log_token, "logfile": self.log, "vehicle": "sim", "date_captured": "2023-11-14",
                        "location": "simulated-town"}]  # fmt: skip
        rows["map"] = [{"token": self._token("map"), "log_tokens": [log_token], "category": "semantic_prior",
                        "filename": self._write_map(root)}]  # fmt: skip
        for sensor in self.sensors:
            rows["calibrated_sensor"].append({
                "token": self._token("calibration", sensor.channel), "sensor_token": sensor_token(sensor.channel),
                "translation": list(sensor.translation_m), "rotation": list(sensor.quat_wxyz),
                "camera_intrinsic": [] if sensor.intrinsic is None else sensor.intrinsic.tolist(),
            })  # fmt: skip
        shots = self._shots(key_us)
        poses_of_shots = self.stage.poses(np.array([self.time_s(timestamp_us) for timestamp_us, *_ in shots]))
        per_sensor: dict[str, list[Row]] = defaultdict(list)
        seen = np.zeros((len(key_us), len(self.traffic.actors) + 1, 3))  # visible, alone, exact pixels
        sweeps: list[NDArray[np.float32]] = []
        for (timestamp_us, sensor, frame, is_key), poses in zip(shots, poses_of_shots, strict=True):
            ego2world = self.ego2world(timestamp_us)
            file = self._file_of(sensor.channel, timestamp_us, is_key)
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            if sensor.intrinsic is None:
                distance = np.hypot(*(poses[:, :2] - ego2world[:2, 3]).T)
                self.stage.set(poses, distance < MAX_RANGE_M + 10)
                sweep = self._sweep(ego2world @ sensor.sensor2ego, timestamp_us)
                sweep.tofile(root / file)
                if is_key:
                    sweeps.append(sweep)
            else:
                self._expose(
                    root, file, sensor, ego2world, poses, timestamp_us, seen[frame] if is_key else None
                )
            data_token = self._token("data", sensor.channel, timestamp_us)
            width, height = (0, 0) if sensor.intrinsic is None else config.image_size_px
            per_sensor[sensor.channel].append({
                "token": data_token, "sample_token": sample_tokens[frame], "ego_pose_token": data_token,
                "calibrated_sensor_token": self._token("calibration", sensor.channel), "timestamp": timestamp_us,
                "fileformat": "pcd" if sensor.intrinsic is None else "jpg", "is_key_frame": is_key, "height": height,
                "width": width, "filename": file,
            })  # fmt: skip
            rows["ego_pose"].append(self._ego_row(data_token, timestamp_us, ego2world))
        for data in per_sensor.values():
            link(data)
            rows["sample_data"] += data
        self._annotate(rows, key_us, sample_tokens, seen, sweeps)
        if config.write_masks:
            tokens = {str(n): self._token("instance", n) for n in range(1, len(self.traffic.actors) + 1)}
            mapping = root / "instance_masks" / f"{self.name}.json"
            mapping.write_text(json.dumps(tokens))
        return dict(rows)

    def _description(self) -> str:
        main = self.roads.roads[0]
        shape = "curved road" if main.curvature else "straight road"
        crossings = len(self.roads.junctions_s_m)
        return f"{self.weather}, {shape}, {crossings} junction{'s' if crossings != 1 else ''}"

    def _shots(self, key_us: list[int]) -> list[tuple[int, Calibration, int, bool]]:
        """All exposures in the order of time: timestamp, sensor, key frame that they belong to, whether of it."""
        shots = []
        for frame, us in enumerate(key_us):
            for sensor in self.sensors:
                at = us - sensor.delay_us
                shots.append((at, sensor, frame, True))
                if sensor.intrinsic is None:
                    shots += [
                        (at - k * SWEEP_PERIOD_US, sensor, frame, False)
                        for k in range(1, self.config.lidar_sweeps + 1)
                    ]
                elif self.config.camera_hz is not None:
                    shots += [(at - round(k * _CAMERA_PERIOD_US), sensor, frame, False) for k in range(1, 6)]
        return sorted(shots, key=lambda shot: (shot[0], shot[1].channel))

    def _file_of(self, channel: str, timestamp_us: int, is_key: bool) -> str:
        folder, ending = "samples" if is_key else "sweeps", "pcd.bin" if channel == LIDAR else "jpg"
        return f"{folder}/{channel}/{self.log}__{channel}__{timestamp_us}.{ending}"

    def _sweep(self, lidar2world: NDArray[np.float64], timestamp_us: int) -> NDArray[np.float32]:
        directions, rings = lidar_rays(self.config)
        return take_sweep(
            self.stage, self.backdrop, lidar2world, directions, rings, self._rng("lidar", timestamp_us)
        )

    def _expose(
        self,
        root: Path,
        file: str,
        camera: Calibration,
        ego2world: NDArray[np.float64],
        poses: NDArray[np.float64],
        timestamp_us: int,
        seen: NDArray[np.float64] | None,
    ) -> None:
        """Writes an image; of a key frame also its mask, and counts into `seen` what it shows."""
        rng, size_px = self._rng(camera.channel, timestamp_us), self.config.image_size_px
        cam2world = ego2world @ camera.sensor2ego
        actors = self.traffic.actors
        boxes = np.array(
            [annotated_box(pose, actor.shape) for pose, actor in zip(poses, actors, strict=True)]
        ).reshape(-1, 7)
        where = windows(boxes, camera, cam2world, size_px)
        distance = np.hypot(*(poses[:, :2] - ego2world[:2, 3]).T)
        # Those just outside the picture throw shadows into it.
        self.stage.set(poses, where.inside | (distance < SHADOWS_FROM_M))
        picture = take_picture(self.stage, self.backdrop, camera, ego2world, size_px, rng)
        Image.fromarray(picture.image).save(root / file, quality=self.config.jpeg_quality)
        if seen is None:
            return
        seen[:, 2] += np.bincount(picture.instance.ravel(), minlength=len(seen))
        near = np.flatnonzero(distance < self.config.annotation_radius_m + 5)
        shapes = {int(k) + 1: actors[k].shape for k in near}
        seen[:, :2] += visible_pixels(self.stage, self.silhouettes, shapes, poses, where, camera, cam2world)
        if self.config.write_masks:
            mask = root / "instance_masks" / camera.channel / f"{Path(file).stem}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            small = len(actors) < 256
            Image.fromarray(picture.instance.astype(np.uint8 if small else np.uint16)).save(
                mask, compress_level=1
            )

    def _ego_row(self, pose_token: str, timestamp_us: int, ego2world: NDArray[np.float64]) -> Row:
        return {
            "token": pose_token, "timestamp": timestamp_us,
            "rotation": rotation_to_quaternion(ego2world[:3, :3]).tolist(),
            "translation": (ego2world[:3, 3] + (MAP_SIDE_M / 2, MAP_SIDE_M / 2, 0)).tolist(),
        }  # fmt: skip

    def _annotate(
        self,
        rows: dict[str, list[Row]],
        key_us: list[int],
        sample_tokens: list[str],
        seen: NDArray[np.float64],
        sweeps: list[NDArray[np.float32]],
    ) -> None:
        """Rows of annotations and instances: what a LiDAR point or a pixel shows, within the radius."""
        per_actor: dict[int, list[Row]] = defaultdict(list)
        lidar = self.sensors[0]
        for frame, (us, sweep) in enumerate(zip(key_us, sweeps, strict=True)):
            ego2world = self.ego2world(us)
            points = transform_points(ego2world @ lidar.sensor2ego, sweep[:, :3].astype(np.float64))
            poses = self.stage.poses(np.array([self.time_s(us)]))[0]
            boxes = [
                annotated_box(pose, actor.shape)
                for pose, actor in zip(poses, self.traffic.actors, strict=True)
            ]
            counts = points_in_boxes(points, np.array(boxes).reshape(-1, 7))
            for n, (actor, box) in enumerate(zip(self.traffic.actors, boxes, strict=True), start=1):
                if np.hypot(*(box[:2] - ego2world[:2, 3])) > self.config.annotation_radius_m:
                    continue
                count = int(counts[n - 1])
                shown, alone, exact = seen[frame, n]
                if not count and not exact:
                    continue
                per_actor[n].append({
                    "token": self._token("annotation", frame, n), "sample_token": sample_tokens[frame],
                    "instance_token": self._token("instance", n),
                    "visibility_token": str(level(shown / alone if alone else 0.0)),
                    "attribute_tokens": [attribute_token(actor.attribute)] if actor.attribute else [],
                    "translation": [box[0] + MAP_SIDE_M / 2, box[1] + MAP_SIDE_M / 2, box[2]],
                    "size": [box[4], box[3], box[5]],
                    "rotation": [float(np.cos(box[6] / 2)), 0.0, 0.0, float(np.sin(box[6] / 2))],
                    "num_lidar_pts": count, "num_radar_pts": 0,
                })  # fmt: skip
        for n, of_actor in per_actor.items():
            link(of_actor)
            rows["sample_annotation"] += of_actor
            rows["instance"].append({
                "token": self._token("instance", n),
                "category_token": category_token(self.traffic.actors[n - 1].shape.category),
                "nbr_annotations": len(of_actor), "first_annotation_token": of_actor[0]["token"],
                "last_annotation_token": of_actor[-1]["token"],
            })  # fmt: skip
        rows["sample_annotation"] = _plain(rows["sample_annotation"])

    def _write_map(self, root: Path) -> str:
        """The carriageways as an image, 0.1 m per pixel, first row at the highest y."""
        side = round(MAP_SIDE_M / MAP_RASTER_M)
        axis = (np.arange(side) + 0.5) * MAP_RASTER_M - MAP_SIDE_M / 2
        x, y = np.meshgrid(axis.astype(np.float32), axis[::-1].astype(np.float32))
        road = self.roads.kerb_distance(x, y) < 0
        enlarged = round(MAP_SIDE_M / MAP_PIXEL_M)
        image = Image.fromarray(road * np.uint8(255)).resize((enlarged, enlarged), Image.Resampling.NEAREST)
        file = f"maps/{self.name}.png"
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / file, compress_level=1, compress_type=3)  # run lengths: smallest and fastest here
        return file


def _plain(rows: list[Row]) -> list[Row]:
    """numpy numbers -> Python numbers, which JSON can write."""
    return json.loads(json.dumps(rows, default=float))


def write_scene(config: WorldConfig, number: int, root: Path, shard: Path) -> None:
    """Simulates one scene; its shard appears, whole, only when all its files are written."""
    rows: dict[str, Any] = SceneSimulator(config, number).write(root)
    partial = shard.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(rows))
    partial.replace(shard)
