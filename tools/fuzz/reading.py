"""How a spoilt world is read: through the package, and in the plainest way, to hold the package to it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from distillbev.data.frames import FrameDataset, frames_of_tokens
from distillbev.data.images import load_image
from distillbev.data.points import load_points
from distillbev.data.samples import NuScenes
from distillbev.data.settings import DataConfig
from distillbev.errors import DistillBevError

VERSION = "v1.0-sim"
TABLES = (
    "scene", "sample", "sample_data", "ego_pose", "calibrated_sensor", "sensor", "sample_annotation", "instance",
    "category", "attribute",
)  # fmt: skip
NUM_SWEEPS = 3
LONGEST_LINE = 1500


class WrongError(Exception):
    """A sample that is wrong without a word."""


def require(truth: bool, what: str) -> None:
    if not truth:
        raise WrongError(what)


def attempt(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """A result or the message of an error of ours, which must be one line that a terminal can show."""
    try:
        return read(), None
    except DistillBevError as error:
        message = str(error)
        message.encode()
        require(
            message.isprintable() or not set(message) & set(map(chr, range(32))),
            f"control characters: {message!r:.300}",
        )
        require(len(message) <= LONGEST_LINE, f"a line of {len(message)} characters: {message:.300}")
        return None, message


def read_all(root: Path, use_index: bool | None = False) -> dict[str, Any]:
    """Everything that can be read of a dataset through the package."""
    nuscenes = NuScenes(root, use_index=use_index)
    found: dict[str, Any] = {
        "splits": {name: nuscenes.sample_tokens(name) for name in sorted(nuscenes.splits())}
    }
    tokens = nuscenes.sample_tokens()
    for token in tokens:
        sample = nuscenes.sample(token, num_sweeps=NUM_SWEEPS)
        annotations = sample.annotations
        assert annotations is not None
        poses, sizes = nuscenes.annotation_poses(token)
        boxes = {
            (instance, i): (
                poses[i], sizes[i], annotations.boxes[i], annotations.categories[i], annotations.attributes[i],
                int(annotations.num_lidar_points[i]), int(annotations.visibility[i]),
            )
            for i, instance in enumerate(annotations.instance_tokens)
        }  # fmt: skip
        found[token] = {
            "scene": sample.scene,
            "time": sample.timestamp_us,
            "before": sample.previous_token,
            "lidar2ego": sample.lidar2ego,
            "cameras": {
                c.channel: (
                    c.timestamp_us,
                    c.size_wh_px,
                    c.cam2img,
                    c.cam2ego,
                    c.ego2global,
                    np.asarray(load_image(c).image),
                )
                for c in sample.cameras
            },
            "sweeps": [(s.timestamp_us, s.lidar2ego, s.ego2global) for s in sample.sweeps],
            "points": load_points(sample),
            "boxes": {key[0]: box for key, box in boxes.items()},
            "num_boxes": len(boxes),
        }
        nuscenes.labels_in(token)
    check_batches(nuscenes, tokens)
    return found


def check_batches(nuscenes: NuScenes, tokens: list[str]) -> None:
    """Nothing that reaches a network is infinite, and no number in a box but its speed is unknown."""
    has_lidar = all(nuscenes.sample(token).sweeps for token in tokens)
    config = DataConfig(image_size_px=(32, 16), load_points=has_lidar, num_sweeps=NUM_SWEEPS)
    dataset = FrameDataset(nuscenes, frames_of_tokens(tokens, labelled=True), config)
    for index in range(len(dataset)):
        batch = dataset[index, 0]
        boxes = batch.boxes[0]
        assert boxes is not None
        for numbers in (
            batch.cam2img,
            batch.cam2lidar,
            batch.lidar2global,
            *(batch.points or []),
            boxes.boxes[:, :7],
        ):
            require(bool(torch.isfinite(numbers).all()), "a number in a batch is not finite")
        require(not torch.isinf(boxes.boxes).any(), "a speed is infinite")


def read_plainly(root: Path) -> dict[str, Any]:
    """What `read_all` gives, read in the plainest way, and held to what must be so. Written apart from the package."""
    rows = {name: json.loads((root / VERSION / f"{name}.json").read_bytes()) for name in TABLES}
    by_token = {name: {row["token"]: row for row in table} for name, table in rows.items()}
    for name, table in rows.items():
        require(len(by_token[name]) == len(table), f"{name}: a token occurs twice")

    def channel_of(data: dict) -> tuple[dict, dict]:
        calibration = by_token["calibrated_sensor"][data["calibrated_sensor_token"]]
        return calibration, by_token["sensor"][calibration["sensor_token"]]

    def order(sample: dict) -> tuple[int, int]:
        scenes = list(by_token["scene"])
        return scenes.index(sample["scene_token"]), sample["timestamp"]

    tokens = [sample["token"] for sample in sorted(rows["sample"], key=order)]
    name_of = {scene["token"]: scene["name"] for scene in rows["scene"]}
    splits = json.loads((root / "splits.json").read_bytes()) if (root / "splits.json").exists() else None
    splits = {"all": list(name_of.values())} if splits is None else splits
    found: dict[str, Any] = {"splits": {}}
    for split in sorted(splits):
        of_scene = {
            name: [t for t in tokens if name_of[by_token["sample"][t]["scene_token"]] == name]
            for name in name_of.values()
        }
        found["splits"][split] = [t for name in splits[split] for t in of_scene.get(name, [name])]
    for token in tokens:
        sample = by_token["sample"][token]
        keys = [d for d in rows["sample_data"] if d["is_key_frame"] and d["sample_token"] == token]
        keys = [d for d in keys if channel_of(d)[1]["modality"] in ("camera", "lidar")]
        channels = [channel_of(d)[1]["channel"] for d in keys]
        require(len(set(channels)) == len(channels), "two recordings of a channel")
        require(all(abs(d["timestamp"] - sample["timestamp"]) <= 1e6 for d in keys), "far from its sample")
        lidars = [d for d in keys if channel_of(d)[1]["modality"] == "lidar"]
        sweeps = lidars[:1]
        while sweeps and sweeps[-1]["prev"] and len(sweeps) <= NUM_SWEEPS:
            sweeps.append(by_token["sample_data"][sweeps[-1]["prev"]])
            require(sweeps[-1]["timestamp"] < sweeps[-2]["timestamp"], "sweeps run backwards")
            require(channel_of(sweeps[-1])[1] == channel_of(sweeps[0])[1], "a sweep of another sensor")
        cameras = {}
        for data in keys:
            calibration, sensor = channel_of(data)
            if sensor["modality"] == "camera":
                cam2img = np.eye(4)
                cam2img[:3, :3] = calibration["camera_intrinsic"]
                with Image.open(inside(root, data["filename"])) as image:
                    pixels = np.asarray(image.convert("RGB"))
                require(pixels.shape[:2] == (data["height"], data["width"]), "an image of another size")
                pose = matrix_of(by_token["ego_pose"][data["ego_pose_token"]])
                size = (data["width"], data["height"])
                cameras[sensor["channel"]] = (
                    data["timestamp"],
                    size,
                    cam2img,
                    matrix_of(calibration),
                    pose,
                    pixels,
                )
        moved = [
            (
                d["timestamp"],
                matrix_of(channel_of(d)[0]),
                matrix_of(by_token["ego_pose"][d["ego_pose_token"]]),
            )
            for d in sweeps
        ]
        nearest = min(cameras.values(), key=lambda c: abs(c[0] - sample["timestamp"]))[4] if cameras else None
        lidar2ego, ego2global = (moved[0][1], moved[0][2]) if moved else (nominal_place(rows), nearest)
        lidar2global = ego2global @ lidar2ego
        clouds = [np.zeros((0, 5))]
        for data, (time_us, place, pose) in zip(sweeps, moved, strict=True):
            cloud = np.fromfile(inside(root, data["filename"]), dtype="<f4").reshape(-1, 5).astype(np.float64)
            cloud = cloud[(np.abs(cloud[:, 0]) >= 1) | (np.abs(cloud[:, 1]) >= 1)]
            there = np.linalg.inv(lidar2global) @ pose @ place
            cloud[:, :3] = cloud[:, :3] @ there[:3, :3].T + there[:3, 3]
            cloud[:, 4] = (time_us - sweeps[0]["timestamp"]) * 1e-6
            clouds.append(cloud)
        boxes = {}
        mine = [row for row in rows["sample_annotation"] if row["sample_token"] == token]
        for row in mine:
            boxes[row["instance_token"]] = plain_box(row, by_token, np.linalg.inv(lidar2global))
        found[token] = {
            "scene": name_of[sample["scene_token"]], "time": sample["timestamp"], "before": sample["prev"] or None,
            "lidar2ego": lidar2ego, "cameras": cameras, "sweeps": moved, "points": np.concatenate(clouds),
            "boxes": boxes, "num_boxes": len(mine),
        }  # fmt: skip
    return found


def plain_box(row: dict, by_token: dict[str, dict], global2lidar: np.ndarray) -> tuple:
    annotations, samples = by_token["sample_annotation"], by_token["sample"]
    first, last = annotations[row["prev"] or row["token"]], annotations[row["next"] or row["token"]]
    times = [samples[a["sample_token"]]["timestamp"] * 1e-6 for a in (first, row, last)]
    require(
        all(a["instance_token"] == row["instance_token"] for a in (first, last)),
        "a neighbour of another instance",
    )
    require(first is row or times[0] < times[1], "prev is later")
    require(last is row or times[1] < times[2], "next is earlier")
    gap = times[2] - times[0]
    longest = 1.5 * (2 if row["prev"] and row["next"] else 1)
    known = (row["prev"] or row["next"]) and gap <= longest + 1e-9
    way = (np.array(last["translation"]) - first["translation"])[:2]
    velocity = global2lidar[:2, :2] @ (way / gap) if known else np.full(2, np.nan)
    pose = matrix_of(row)
    there = global2lidar @ pose
    size = np.array(row["size"], dtype=float)[[1, 0, 2]]
    yaw = math.atan2(there[1, 0], there[0, 0])
    attribute = row["attribute_tokens"][0] if row["attribute_tokens"] else None
    return (
        pose, size, np.array([*there[:3, 3], *size, yaw, *velocity]),
        by_token["category"][by_token["instance"][row["instance_token"]]["category_token"]]["name"],
        by_token["attribute"][attribute]["name"] if attribute else "", row["num_lidar_pts"],
        int(row["visibility_token"]) if row["visibility_token"] in {"1", "2", "3", "4"} else 0,
    )  # fmt: skip


def inside(root: Path, name: str) -> Path:
    require(
        ".." not in Path(name).parts and not Path(name).is_absolute(),
        "a file outside of the dataset was read",
    )
    return root / name


def matrix_of(row: dict) -> np.ndarray:
    w, x, y, z = np.array(row["rotation"], dtype=float) / np.linalg.norm(row["rotation"])
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
    ]
    matrix[:3, 3] = row["translation"]
    return matrix


def nominal_place(rows: dict[str, list[dict]]) -> np.ndarray:
    lidars = {row["token"] for row in rows["sensor"] if row["modality"] == "lidar"}
    places = [matrix_of(row) for row in rows["calibrated_sensor"] if row["sensor_token"] in lidars]
    return (
        places[0] if places else np.array([[0, 1, 0, 0.94], [-1, 0, 0, 0], [0, 0, 1, 1.84], [0, 0, 0, 1.0]])
    )


def difference(left: Any, right: Any, where: str = "", exact: bool = True) -> str | None:
    """Where two readings differ; None where they do not."""
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return f"{where}: {sorted(map(str, left.keys() ^ right.keys()))[:3]}"
        pairs = [(f"{where}.{key}", left[key], right[key]) for key in left]
    elif isinstance(left, tuple | list) and isinstance(right, tuple | list):
        if len(left) != len(right):
            return f"{where}: {len(left)} and {len(right)}"
        pairs = [(f"{where}[{i}]", *both) for i, both in enumerate(zip(left, right, strict=True))]
    elif isinstance(left, np.ndarray):
        if left.shape != right.shape:
            return f"{where}: {left.shape} and {right.shape}"
        if exact or left.dtype == np.uint8:
            return None if np.array_equal(left, right, equal_nan=left.dtype.kind == "f") else where
        # float32 points against float64 ones; matrices whose translations run to 1e8.
        scale = max(float(np.nanmax(np.abs(right), initial=1)), 1)
        return None if np.allclose(left, right, rtol=1e-5, atol=2e-6 * scale, equal_nan=True) else where
    else:
        return None if left == right else f"{where}: {left!r:.50} and {right!r:.50}"
    return next((found for w, a, b in pairs if (found := difference(a, b, w, exact))), None)
