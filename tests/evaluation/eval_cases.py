"""Small evaluations in three forms: our samples and boxes, a results file, the devkit's objects."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from distillbev.boxes import Boxes3D, transform_boxes
from distillbev.classes import CATEGORY_TO_CLASS, CLASSES
from distillbev.data.schema import Annotations, Sample
from distillbev.evaluation.eval_boxes import ATTRIBUTES, BICYCLE_RACK
from distillbev.evaluation.metrics import ERRORS, DetectionEvalConfig, DetectionMetrics
from distillbev.geometry import invert_rigid, pose_matrix, rotation_about_z

CATEGORIES = (*CATEGORY_TO_CLASS, BICYCLE_RACK, "animal")
ATTRIBUTES_OF_CLASS = {
    name: [a for a in ATTRIBUTES if a.startswith(prefix)]
    for prefix, names in {
        "vehicle": ("car", "truck", "bus", "trailer", "construction_vehicle"),
        "cycle": ("bicycle", "motorcycle"),
        "pedestrian": ("pedestrian",),
        "none": ("barrier", "traffic_cone"),
    }.items()
    for name in names
}


@dataclass
class Truth:
    """One annotation: (9,) BOX_FIELDS in the global frame, upright there."""

    box: np.ndarray
    category: str
    attribute: str = ""
    lidar_points: int = 5
    radar_points: int = 0


@dataclass
class Found:
    """One detection: (9,) BOX_FIELDS in the global frame."""

    box: np.ndarray
    name: str
    score: float
    attribute: str = ""


@dataclass
class Scene:
    """One sample; `lidar2ego` and `ego2global` are its poses."""

    token: str
    lidar2ego: np.ndarray
    ego2global: np.ndarray
    truths: list[Truth]
    found: list[Found]
    scene: str = "scene-1"


def box(x=0.0, y=0.0, z=0.0, length=4.0, width=2.0, height=1.5, yaw=0.0, vx=0.0, vy=0.0) -> np.ndarray:
    return np.array([x, y, z, length, width, height, yaw, vx, vy], dtype=np.float64)


def flat_poses(x=0.0, y=0.0, yaw=0.0) -> tuple[np.ndarray, np.ndarray]:
    """LiDAR 1 m ahead of and 2 m above the ego origin, on level ground."""
    lidar2ego = pose_matrix(np.array([1.0, 0.0, 2.0]), np.eye(3))
    return lidar2ego, pose_matrix(np.array([x, y, 0.0]), rotation_about_z(yaw))


def tilted_poses(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A LiDAR turned by -90 degrees on a car that rolls and pitches by about a degree, anywhere."""

    def tilt() -> np.ndarray:
        roll, pitch = rng.normal(0, 0.02, 2)
        cos_r, sin_r, cos_p, sin_p = np.cos(roll), np.sin(roll), np.cos(pitch), np.sin(pitch)
        about_x = np.array([[1, 0, 0], [0, cos_r, -sin_r], [0, sin_r, cos_r]])
        about_y = np.array([[cos_p, 0, sin_p], [0, 1, 0], [-sin_p, 0, cos_p]])
        return about_x @ about_y

    lidar2ego = pose_matrix(np.array([0.94, 0.0, 1.84]), rotation_about_z(-np.pi / 2) @ tilt())
    turn = rotation_about_z(rng.uniform(-np.pi, np.pi)) @ tilt()
    return lidar2ego, pose_matrix(np.array([*rng.uniform(-1000, 1000, 2), 0.0]), turn)


def samples_of(scenes: list[Scene]) -> list[Sample]:
    samples = []
    for scene in scenes:
        truths = scene.truths
        boxes = np.array([truth.box for truth in truths]).reshape(-1, 9)
        global2lidar = invert_rigid(scene.ego2global @ scene.lidar2ego)
        labels = [
            CLASSES.index(CATEGORY_TO_CLASS[t.category]) if t.category in CATEGORY_TO_CLASS else -1
            for t in truths
        ]
        annotations = Annotations(
            boxes=transform_boxes(global2lidar, boxes),
            labels=np.array(labels, dtype=np.int64),
            categories=tuple(t.category for t in truths),
            attributes=tuple(t.attribute for t in truths),
            instance_tokens=tuple(f"i{i}" for i in range(len(truths))),
            num_lidar_points=np.array([t.lidar_points for t in truths], dtype=np.int64),
            num_radar_points=np.array([t.radar_points for t in truths], dtype=np.int64),
            visibility=np.zeros(len(truths), dtype=np.int64),
        )
        samples.append(
            Sample(scene.token, scene.scene, 0, scene.lidar2ego, scene.ego2global, (), (), annotations, None)
        )
    return samples


def detections_of(scenes: list[Scene]) -> dict[str, Boxes3D]:
    """The detections in each sample's LiDAR frame; their attributes are left to the rule."""
    detections = {}
    for scene in scenes:
        global2lidar = invert_rigid(scene.ego2global @ scene.lidar2ego)
        boxes = transform_boxes(global2lidar, np.array([f.box for f in scene.found]).reshape(-1, 9))
        detections[scene.token] = Boxes3D(
            torch.from_numpy(boxes),
            torch.tensor([CLASSES.index(f.name) for f in scene.found], dtype=torch.int64),
            torch.tensor([f.score for f in scene.found], dtype=torch.float64),
        )
    return detections


def results_json(scenes: list[Scene]) -> str:
    """The results file as any tool would write it, by the standard library alone."""
    results = {
        scene.token: [
            {
                "sample_token": scene.token,
                "translation": f.box[:3].tolist(),
                "size": [float(f.box[4]), float(f.box[3]), float(f.box[5])],
                "rotation": [float(np.cos(f.box[6] / 2)), 0.0, 0.0, float(np.sin(f.box[6] / 2))],
                "velocity": f.box[7:9].tolist(),
                "detection_name": f.name,
                "detection_score": float(f.score),
                "attribute_name": f.attribute,
            }
            for f in scene.found
        ]
        for scene in scenes
    }
    sensors = dict.fromkeys(("use_camera", "use_lidar", "use_radar", "use_map", "use_external"), False)
    return json.dumps({"meta": sensors | {"use_camera": True}, "results": results})


def devkit_metrics(scenes: list[Scene], results_path: Path, config: DetectionEvalConfig):
    """The official evaluation of a results file: the devkit's metrics and its list of curves."""
    from nuscenes.eval.common.loaders import (
        add_center_dist,
        filter_eval_boxes,
        load_gt_of_sample_tokens,
        load_prediction,
    )
    from nuscenes.eval.detection.data_classes import DetectionBox, DetectionConfig
    from nuscenes.eval.detection.evaluate import DetectionEval

    ranges = dict(zip(CLASSES, config.ranges_m().tolist(), strict=True))
    official = DetectionConfig(
        ranges,
        "center_distance",
        list(config.dist_ths_m),
        config.dist_th_tp_m,
        config.min_recall,
        config.min_precision,
        config.max_boxes_per_sample,
        config.mean_ap_weight,
    )
    nusc = _Tables(scenes)
    evaluation = DetectionEval.__new__(DetectionEval)
    evaluation.cfg, evaluation.verbose = official, False
    pred, _ = load_prediction(str(results_path), config.max_boxes_per_sample, DetectionBox)
    truth = load_gt_of_sample_tokens(nusc, [s.token for s in scenes], DetectionBox)
    filtered = []
    for boxes in (pred, truth):
        boxes = add_center_dist(nusc, boxes)
        if boxes.all:  # without a single box the devkit cannot tell which kind it filters, and raises
            boxes = filter_eval_boxes(nusc, boxes, ranges)
        filtered.append(boxes)
    evaluation.pred_boxes, evaluation.gt_boxes = filtered
    return evaluation.evaluate()


class _Tables:
    """What the evaluation asks of a `NuScenes` object."""

    def __init__(self, scenes: list[Scene]) -> None:
        self.attribute = [{"token": f"attribute-{name}", "name": name} for name in ATTRIBUTES]
        self.tables: dict[tuple[str, str], dict] = {}
        self.velocities = {}
        for scene in scenes:
            tokens = [f"{scene.token}/{row}" for row in range(len(scene.truths))]
            self.tables["sample", scene.token] = {"anns": tokens, "data": {"LIDAR_TOP": scene.token}}
            self.tables["sample_data", scene.token] = {"ego_pose_token": scene.token}
            self.tables["ego_pose", scene.token] = {"translation": scene.ego2global[:3, 3].tolist()}
            for token, truth in zip(tokens, scene.truths, strict=True):
                self.velocities[token] = np.array([*truth.box[7:9], 0.0])
                half = truth.box[6] / 2
                self.tables["sample_annotation", token] = {
                    "token": token,
                    "category_name": truth.category,
                    "attribute_tokens": [f"attribute-{truth.attribute}"] if truth.attribute else [],
                    "translation": truth.box[:3].tolist(),
                    "size": truth.box[[4, 3, 5]].tolist(),
                    "rotation": [np.cos(half), 0.0, 0.0, np.sin(half)],
                    "num_lidar_pts": truth.lidar_points,
                    "num_radar_pts": truth.radar_points,
                }

    def get(self, table: str, token: str) -> dict:
        return self.tables[table, token]

    def box_velocity(self, token: str) -> np.ndarray:
        return self.velocities[token]


def assert_same(ours: DetectionMetrics, official, curves, tolerance: float = 1e-9) -> None:
    """Every number and every curve."""
    config = ours.config
    for c, name in enumerate(CLASSES):
        for d, threshold in enumerate(config.dist_ths_m):
            here = f"{name} at {threshold} m"
            _close(ours.ap[c, d], official.get_label_ap(name, threshold), tolerance, f"AP of {here}")
            curve, expected = ours.curves[c][d], curves[name, threshold]
            _close(curve.precision, expected.precision, tolerance, f"precision of {here}")
            _close(curve.confidence, expected.confidence, tolerance, f"confidence of {here}")
            for e, error in enumerate(ERRORS):
                _close(curve.errors[e], getattr(expected, error), tolerance, f"{error} of {here}")
        for e, error in enumerate(ERRORS):
            _close(ours.tp_errors[c, e], official.get_label_tp(name, error), tolerance, f"{error} of {name}")
    _close(ours.mean_ap, official.mean_ap, tolerance, "mAP")
    _close(ours.nds, official.nd_score, tolerance, "NDS")
    for error, value in official.tp_errors.items():
        _close(ours.mean_errors[error], value, tolerance, f"mean {error}")


def _close(ours, expected, tolerance: float, what: str) -> None:
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance, err_msg=what)


def random_scenes(
    rng: np.random.Generator,
    num_samples: int,
    num_truths: int,
    num_false: int,
    tilted: bool = True,
    shake: float = 0.7,
    samples_per_scene: int = 1,
) -> list[Scene]:
    """A crowded world with detections near the truth and elsewhere, in all classes, some of it unknown."""
    scenes = []
    categories = [c for c in CATEGORIES for _ in range(1 if c in (BICYCLE_RACK, "animal") else 3)]
    for index in range(num_samples):
        lidar2ego, ego2global = tilted_poses(rng) if tilted else flat_poses(*rng.integers(-50, 50, 2))
        truths, found = [], []
        for _ in range(rng.integers(0, num_truths + 1)):
            category = str(rng.choice(categories))
            spot = ego2global[:3, 3] + [*rng.normal(0, 22, 2), rng.normal(0, 0.5)]
            size = np.array([6.0, 3.0, 2.0]) if category == BICYCLE_RACK else rng.uniform(0.5, 5, 3)
            velocity = rng.normal(0, 2, 2) if rng.random() > 0.1 else [np.nan, np.nan]
            where = np.array([*spot, *size, rng.uniform(-np.pi, np.pi), *velocity])
            name = CATEGORY_TO_CLASS.get(category)
            choices = ATTRIBUTES_OF_CLASS.get(name or "", [])
            attribute = str(rng.choice(choices)) if choices and rng.random() > 0.1 else ""
            points = int(rng.integers(0, 4))
            truths.append(Truth(where, category, attribute, points, int(rng.integers(0, 2))))
            for _ in range(rng.integers(0, 3) if name else 0):
                near = where + np.concatenate([rng.normal(0, shake, 2), rng.normal(0, 0.2, 7)])
                near[3:6] = np.maximum(near[3:6], 0.2)
                if rng.random() > 0.1:
                    near[7:9] = rng.normal(0, 2, 2)
                guess = str(rng.choice(choices)) if choices else ""
                found.append(Found(near, str(name), float(rng.random()), guess))
        for _ in range(rng.integers(0, num_false + 1)):
            spot = ego2global[:3, 3] + [*rng.normal(0, 22, 2), 0.0]
            where = np.array([*spot, *rng.uniform(0.5, 5, 3), rng.uniform(-4, 4), *rng.normal(0, 2, 2)])
            found.append(Found(where, str(rng.choice(CLASSES)), float(rng.random())))
        order = rng.permutation(len(found))
        scenes.append(
            Scene(
                f"sample-{index}",
                lidar2ego,
                ego2global,
                truths,
                [found[i] for i in order],
                f"scene-{index // samples_per_scene}",
            )
        )
    return scenes


def with_found(scene: Scene, found: list[Found]) -> Scene:
    return replace(scene, found=found)
