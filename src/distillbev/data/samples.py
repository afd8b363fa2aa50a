"""Key frames of a nuScenes folder: the tables joined into `Sample`, checked and put into one frame."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..classes import CATEGORY_TO_CLASS, CLASSES
from ..errors import DataError
from ..geometry import invert_rigid, pose_matrix, quaternion_to_rotation, yaw_of_rotation
from .files import NOT_JSON, read_whole, stays_inside
from .index import open_tables
from .schema import Annotations, CameraFrame, LidarSweep, Sample
from .tables import (
    AnnotationRow,
    CalibratedSensorRow,
    EgoPoseRow,
    SampleDataRow,
    SampleRow,
    SensorRow,
    check_name,
    find_version_folder,
)

# The order of the reference implementations; cameras of other rigs follow by name.
CAMERA_ORDER = (
    "CAM_FRONT_LEFT",
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_LEFT",
    "CAM_BACK",
    "CAM_BACK_RIGHT",
)
LIDAR_CHANNEL = "LIDAR_TOP"

# The frame of a rig that never had a LiDAR: where nuScenes' cars carry theirs, x right and y forward, so that a
# network trained with a LiDAR sees the world from its usual height.
NOMINAL_LIDAR2EGO = np.array(
    [[0, 1, 0, 0.94], [-1, 0, 0, 0], [0, 0, 1, 1.84], [0, 0, 0, 1]], dtype=np.float64
)

# Beyond these no recording makes sense, and arithmetic on it none either.
FARTHEST_M = 1e8  # of any place; map grids run to 1e7
LARGEST_BOX_M = 1000.0
SMALLEST_BOX_M = 0.001
MOST_PIXELS = 2**26  # of one image
MOST_FOCAL_PX = 1e6
LONGEST_DELAY_US = 1_000_000  # of a key frame's recording to its sample
FASTEST_M_S = (
    150.0  # of the car, between two recordings of one sample; 20 m more for a jump of its positioning
)
MOST_SPLITS_BYTES = 2**26


class NuScenes:
    """A nuScenes folder (the real one, a simulated world, one's own rig): tokens in, samples out.

    Args:
        root: the folder that holds `v1.0-*`, `samples` and `sweeps`, or its `v1.0-*` where it has several.
        version: name of the table folder; found by itself when there is exactly one `v1.0-*`.
        use_index: of big tables (`index.py`); None builds one where it pays, False reads the JSON.

    Raises:
        DataError: here or in any method, a table, link, token or value is absent or makes no sense.
    """

    def __init__(
        self, root: Path | str, version: str | None = None, *, use_index: bool | None = None
    ) -> None:
        self.folder = find_version_folder(Path(root), version)
        self.root = self.folder.parent
        self._tables = open_tables(self.folder, use_index)
        self._splits: dict[str, list[str]] | None = None
        self._poses: dict[
            str, NDArray[np.float64]
        ] = {}  # of calibrated sensors: few, asked for again and again
        self._lidar_places: list[NDArray[np.float64]] | None = None

    @property
    def version(self) -> str:
        return self.folder.name

    def splits(self) -> dict[str, list[str]]:
        """Split name -> scene names (or sample tokens, where `splits.json` lists such).

        Those of `splits.json` in the root, or every scene as "all" where there is no such file; besides, the
        official splits of nuScenes whose scenes are all there. A split of the file hides an official one.
        """
        if self._splits is None:
            path = self.root / "splits.json"
            known = set(self.scenes())
            official = {
                name: list(names) for name, names in official_splits().items() if known.issuperset(names)
            }
            there = path.exists() or path.is_symlink()  # a broken link is no absent file
            own = self._read_splits(path) if there else {"all": self.scenes()}
            self._splits = official | own
        return self._splits

    def scenes(self) -> list[str]:
        """The names of all scenes, in the order of the table."""
        return [scene.name for scene in self._tables.scene]

    def sample_tokens(self, split: str | None = None) -> list[str]:
        """The key frames of a split (of all scenes where None), scene by scene, in the order of time."""
        if split is None:
            scenes = self.scenes()
        else:
            splits = self.splits()
            if split not in splits:
                raise DataError(
                    f"{self.root}: no split {split!r}; there are {', '.join(sorted(splits))}: name one of them"
                )
            scenes = splits[split]
        scene_tokens = {scene.name: scene.token for scene in self._tables.scene}
        by_scene = self._tables.samples_of_scene
        return [
            token
            for name in scenes
            for token in (by_scene[scene_tokens[name]] if name in scene_tokens else [name])
        ]

    def sample(self, token: str, num_sweeps: int = 0, read_annotations: bool = True) -> Sample:
        """One key frame.

        Args:
            token: of the sample.
            num_sweeps: earlier LiDAR sweeps besides the key sweep; fewer where the scene has just begun.
            read_annotations: False leaves the frame's annotation rows untouched and gives `annotations=None`.
        """
        row = self._sample_row(token)
        check_name("sample", row, "token", token)
        scene = self._tables.scene.follow(row.scene_token, "sample", row, "scene_token")
        cameras: list[CameraFrame] = []
        lidars: dict[str, SampleDataRow] = {}
        seen: dict[str, SampleDataRow] = {}
        for data in self._tables.key_data_of_sample[token]:
            calibration, sensor = self._sensor_of(data)
            if seen.setdefault(sensor.channel, data) is not data:
                raise DataError(
                    f"sample_data.json: key frames {seen[sensor.channel].token!r} and {data.token!r} of sample "
                    f"{token!r} are both of {sensor.channel}; delete one"
                )
            if (
                sensor.modality in ("camera", "lidar")
                and abs(data.timestamp - row.timestamp) > LONGEST_DELAY_US
            ):
                raise DataError(
                    f"sample_data.json, token {data.token!r}: key frame {1e-6 * (data.timestamp - row.timestamp):.2f} "
                    f"s after its sample {token!r}; expected less than {1e-6 * LONGEST_DELAY_US:.0f} s between them"
                )
            if sensor.modality == "camera":
                cameras.append(self._camera_frame(data, calibration, sensor))
            elif sensor.modality == "lidar":
                lidars[sensor.channel] = data
        cameras.sort(key=lambda camera: (_camera_rank(camera.channel), camera.channel))
        if not cameras and not lidars:
            raise DataError(
                f"sample_data.json: no key-frame recording of sample {token!r}; write the table again"
            )

        sweeps = (
            self._sweeps(lidars.get(LIDAR_CHANNEL) or next(iter(lidars.values())), num_sweeps)
            if lidars
            else ()
        )
        if sweeps:
            lidar2ego, ego2global = sweeps[0].lidar2ego, sweeps[0].ego2global
        else:
            lidar2ego = self._place_of_lidar(token)
            ego2global = min(cameras, key=lambda camera: abs(camera.timestamp_us - row.timestamp)).ego2global
        _check_motion(token, cameras, sweeps)
        return Sample(
            token=token,
            scene=scene.name,
            timestamp_us=row.timestamp,
            lidar2ego=lidar2ego,
            ego2global=ego2global,
            cameras=tuple(cameras),
            sweeps=sweeps,
            annotations=self._annotations(token, ego2global @ lidar2ego) if read_annotations else None,
            previous_token=row.prev or None,
        )

    def labels_in(self, token: str, min_points: int = 1) -> set[int]:
        """The classes (indices into CLASSES) with an object that at least `min_points` sensor returns hit.

        An object that no sensor counted counts as hit.
        """
        self._sample_row(token)
        labels_and_points = (
            (_label_of(category), count) for category, count in self._tables.categories_of_sample(token)
        )
        return {
            label for label, count in labels_and_points if label >= 0 and (count >= min_points or count < 0)
        }

    def annotation_poses(self, token: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The annotated boxes of a key frame with their full rotation, tilt included.

        Returns:
            box2global: (n, 4, 4), origin at the gravity centre, x along the length.
            size_lwh_m: (n, 3), in the order of `Sample.annotations`.
        """
        self._sample_row(token)
        return _box_poses(self._tables.annotations_of_sample[token])

    def _read_splits(self, path: Path) -> dict[str, list[str]]:
        content = read_whole(path, "list of splits", MOST_SPLITS_BYTES, "; copy it again")
        try:
            splits = msgspec.json.decode(content, type=dict[str, list[str]])
        except NOT_JSON as error:
            raise DataError(f"{path}: not valid JSON: {error}; expected {{split: [scene names]}}") from None
        known = set(self.scenes())
        for split, names in splits.items():
            missing = [name for name in names if name not in known and self._tables.sample.get(name) is None]
            if missing:
                raise DataError(
                    f"{path}: split {split!r} names {len(missing)} of {len(names)} scenes "
                    f"that {self.version}/scene.json lacks, such as {reprlib.repr(missing[0])}; mend either"
                )
            if len(set(names)) < len(names):
                raise DataError(f"{path}: split {split!r} names a scene twice; name each once")
        return splits

    def _sample_row(self, token: str) -> SampleRow:
        row = self._tables.sample.get(token)
        if row is None:
            raise DataError(
                f"{self.folder / 'sample.json'}: no sample {token!r} among {len(self._tables.sample)}; "
                "give a token of this table"
            )
        return row

    def _sensor_of(self, data: SampleDataRow) -> tuple[CalibratedSensorRow, SensorRow]:
        calibration = self._tables.calibrated_sensor.follow(
            data.calibrated_sensor_token, "sample_data", data, "calibrated_sensor_token"
        )
        sensor = self._tables.sensor.follow(
            calibration.sensor_token, "calibrated_sensor", calibration, "sensor_token"
        )
        return calibration, sensor

    def _sensor2ego(self, calibration: CalibratedSensorRow) -> NDArray[np.float64]:
        if calibration.token not in self._poses:
            self._poses[calibration.token] = _pose("calibrated_sensor", calibration)
        return self._poses[calibration.token]

    def _place_of_lidar(self, sample_token: str) -> NDArray[np.float64]:
        """The frame of a sample that no LiDAR recorded: that of the rig's LiDAR all the same, or the nominal one."""
        if self._lidar_places is None:
            self._lidar_places = []
            lidars = {row.token for row in self._tables.sensor if row.modality == "lidar"}
            for row in self._tables.calibrated_sensor:
                if row.sensor_token in lidars:
                    place = self._sensor2ego(row)
                    if not any(np.allclose(place, known) for known in self._lidar_places):
                        self._lidar_places.append(place)
        if len(self._lidar_places) > 1:
            raise DataError(
                f"sample {sample_token!r} has no LiDAR recording, and calibrated_sensor.json places LiDARs in "
                f"{len(self._lidar_places)} ways; its frame cannot be told: give such samples a dataset of their own"
            )
        return self._lidar_places[0] if self._lidar_places else NOMINAL_LIDAR2EGO

    def _ego2global(self, data: SampleDataRow) -> NDArray[np.float64]:
        row = self._tables.ego_pose.follow(data.ego_pose_token, "sample_data", data, "ego_pose_token")
        return _pose("ego_pose", row)

    def _camera_frame(
        self, data: SampleDataRow, calibration: CalibratedSensorRow, sensor: SensorRow
    ) -> CameraFrame:
        intrinsic = calibration.camera_intrinsic
        if (
            [len(line) for line in intrinsic] != [3, 3, 3]
            or not np.all(np.abs(intrinsic) <= MOST_FOCAL_PX)
            or min(intrinsic[0][0], intrinsic[1][1]) <= 0
            or intrinsic[2] != [0, 0, 1]
        ):
            raise DataError(
                f"calibrated_sensor.json, token {calibration.token!r} ({sensor.channel}): camera_intrinsic "
                f"is {reprlib.repr(intrinsic)}; a camera needs a 3x3 matrix of finite numbers, focal lengths above "
                "zero, and 0, 0, 1 in its last row"
            )
        if data.width * data.height > MOST_PIXELS:
            raise DataError(
                f"sample_data.json, token {data.token!r}: {data.width}x{data.height} pixels, expected at most "
                f"{MOST_PIXELS} in all; mend the row"
            )
        cam2img = np.eye(4)
        cam2img[:3, :3] = intrinsic
        return CameraFrame(
            channel=sensor.channel,
            path=self._path(data),
            timestamp_us=data.timestamp,
            size_wh_px=(data.width, data.height),
            cam2img=cam2img,
            cam2ego=self._sensor2ego(calibration),
            ego2global=self._ego2global(data),
        )

    def _sweeps(self, key: SampleDataRow, num_sweeps: int) -> tuple[LidarSweep, ...]:
        rows = [key]
        while len(rows) <= num_sweeps and rows[-1].prev:
            before = self._tables.sample_data.follow(rows[-1].prev, "sample_data", rows[-1], "prev")
            self._check_sweep_before(rows[-1], before)
            rows.append(before)
        return tuple(
            LidarSweep(
                path=self._path(row),
                timestamp_us=row.timestamp,
                lidar2ego=self._sensor2ego(self._sensor_of(row)[0]),
                ego2global=self._ego2global(row),
            )
            for row in rows
        )

    def _check_sweep_before(self, row: SampleDataRow, before: SampleDataRow) -> None:
        """A link to another sensor or scene, or forward or in a circle, would join points that do not belong."""
        channels, scenes = [], []
        for data in (before, row):
            channels.append(self._sensor_of(data)[1].channel)
            sample = self._tables.sample.follow(data.sample_token, "sample_data", data, "sample_token")
            scenes.append(sample.scene_token)
        if channels[0] != channels[1] or scenes[0] != scenes[1] or before.timestamp >= row.timestamp:
            raise DataError(
                f"sample_data.json, token {row.token!r}: prev is {before.token!r} of {channels[0]} and scene "
                f"{scenes[0]!r}, {1e-6 * (row.timestamp - before.timestamp):.3f} s earlier; expected an earlier "
                f"recording of {channels[1]} in scene {scenes[1]!r}, or nothing at its start"
            )

    def _path(self, row: SampleDataRow) -> Path:
        if not stays_inside(row.filename):
            raise DataError(
                f"sample_data.json, token {row.token!r}: filename {row.filename!r}; expected the name of a file below "
                f"{self.root}, such as samples/CAM_FRONT/one.jpg"
            )
        return self.root / row.filename

    def _annotations(self, token: str, lidar2global: NDArray[np.float64]) -> Annotations:
        rows = self._tables.annotations_of_sample[token]
        box2global, size_lwh_m = _box_poses(rows)
        global2lidar = invert_rigid(lidar2global)
        box2lidar = global2lidar @ box2global
        velocity = np.array(self._tables.velocities_of_sample(token)).reshape(-1, 2)
        if (np.abs(velocity) > FARTHEST_M).any():
            raise DataError(
                f"sample_annotation.json: an object of sample {token!r} is infinitely far away in a neighbouring key "
                "frame; mend its translation there"
            )

        boxes = np.empty((len(rows), 9))
        boxes[:, :3] = box2lidar[:, :3, 3]
        boxes[:, 3:6] = size_lwh_m
        boxes[:, 6] = yaw_of_rotation(box2lidar[:, :3, :3])
        boxes[:, 7:9] = velocity @ global2lidar[:2, :2].T  # motion along z is dropped
        categories = tuple(category for category, _ in self._tables.categories_of_sample(token))
        return Annotations(
            boxes=boxes,
            labels=np.array([_label_of(category) for category in categories], dtype=np.int64),
            categories=categories,
            attributes=tuple(self._attribute_of(row) for row in rows),
            instance_tokens=tuple(row.instance_token for row in rows),
            num_lidar_points=np.array([row.num_lidar_pts for row in rows], dtype=np.int64),
            num_radar_points=np.array([row.num_radar_pts for row in rows], dtype=np.int64),
            visibility=np.array([_visibility_of(row) for row in rows], dtype=np.int64),
        )

    def _attribute_of(self, row: AnnotationRow) -> str:
        if not row.attribute_tokens:
            return ""
        token = row.attribute_tokens[0]
        return self._tables.attribute.follow(token, "sample_annotation", row, "attribute_tokens").name


@cache
def official_splits() -> dict[str, list[str]]:
    """The splits of nuScenes: train, val, test, mini_train, mini_val. The file names its source."""
    return json.loads(files("distillbev.data").joinpath("official_splits.json").read_text())["splits"]


def _camera_rank(channel: str) -> int:
    return CAMERA_ORDER.index(channel) if channel in CAMERA_ORDER else len(CAMERA_ORDER)


def _label_of(category: str) -> int:
    name = CATEGORY_TO_CLASS.get(category)
    return -1 if name is None else CLASSES.index(name)


def _visibility_of(row: AnnotationRow) -> int:
    """1 (0-40 % visible) to 4 (80-100 %), 0 where unknown; the tokens of the table are these very digits."""
    return int(row.visibility_token) if row.visibility_token in {"1", "2", "3", "4"} else 0


def _check_motion(token: str, cameras: Sequence[CameraFrame], sweeps: Sequence[LidarSweep]) -> None:
    """One pose of another place would throw a whole image or sweep somewhere else."""
    recordings = [*sweeps, *cameras]
    for recording in recordings[1:]:
        way_m = np.linalg.norm((recording.ego2global - recordings[0].ego2global)[:3, 3])
        seconds = 1e-6 * abs(recording.timestamp_us - recordings[0].timestamp_us)
        if way_m > 20 + FASTEST_M_S * seconds:
            raise DataError(
                f"sample {token!r}: the car is {way_m:.4g} m away from itself within {seconds:.3f} s, at "
                f"{recordings[0].path.name} and {recording.path.name}; mend their rows of ego_pose.json"
            )


def _pose(table: str, row: EgoPoseRow | CalibratedSensorRow) -> NDArray[np.float64]:
    if not (_is_near(row.translation) and _is_unit(row.rotation)):
        raise DataError(
            f"{table}.json, token {row.token!r}: translation {row.translation}, rotation {row.rotation}; "
            f"expected metres below {FARTHEST_M:.0e} and a unit quaternion (w, x, y, z)"
        )
    quaternion = np.array(row.rotation) / math.hypot(*row.rotation)
    return pose_matrix(np.array(row.translation), quaternion_to_rotation(quaternion))


def _box_poses(rows: list[AnnotationRow]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`NuScenes.annotation_poses` of some rows."""
    for row in rows:
        _check_box(row)
    box2global = np.tile(np.eye(4), (len(rows), 1, 1))
    if rows:
        box2global[:, :3, :3] = quaternion_to_rotation(np.array([row.rotation for row in rows]))
        box2global[:, :3, 3] = [row.translation for row in rows]
    sizes_wlh = np.array([row.size for row in rows], dtype=np.float64).reshape(-1, 3)
    return box2global, sizes_wlh[:, [1, 0, 2]]


def _check_box(row: AnnotationRow) -> None:
    sized = all(SMALLEST_BOX_M <= side <= LARGEST_BOX_M for side in row.size)
    if not (sized and _is_near(row.translation) and _is_unit(row.rotation)):
        raise DataError(
            f"sample_annotation.json, token {row.token!r}: translation {row.translation}, size {row.size}, "
            f"rotation {row.rotation}; expected metres below {FARTHEST_M:.0e}, sides of {SMALLEST_BOX_M} to "
            f"{LARGEST_BOX_M:.0f} m and a unit quaternion; mend or delete the row"
        )


def _is_near(translation: Iterable[float]) -> bool:
    return all(abs(value) <= FARTHEST_M for value in translation)  # NaN is not


def _is_unit(rotation: Iterable[float]) -> bool:
    return abs(math.hypot(*rotation) - 1) < 1e-3
