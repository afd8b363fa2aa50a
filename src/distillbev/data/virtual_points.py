"""Virtual points: instances found in images, lifted to where the LiDAR saw them, so that far objects gain points.

Source: Multimodal Virtual Point 3D Detection (MVP, arXiv:2111.06881), section 4; the 17 columns are those of its
release. Everything is in the LiDAR frame of the sweep until `load_mvp_points` brings sweeps together.

The columns: x, y, z (m), intensity (0-255, -1 for virtual points), one per class of CLASSES, score, flag, time (s).
Points that the LiDAR measured have ones for classes and score; a *copy* of such a point that lies in a mask, and
the *virtual* points made from that mask, carry the mask's class and score.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..classes import CLASSES
from ..config import Config, read_config, write_config
from ..errors import ConfigError, DataError
from ..geometry import invert_rigid, transform_points
from .instance_masks import InstanceMasks, MaskErrors, MaskFiles, ReadMasks, WorldMasks, degrade_masks
from .points import read_sweep
from .samples import NuScenes
from .schema import LidarSweep, Sample

CLASS_COLUMNS = slice(4, 4 + len(CLASSES))
SCORE_COLUMN = CLASS_COLUMNS.stop
FLAG_COLUMN = SCORE_COLUMN + 1
TIME_COLUMN = FLAG_COLUMN + 1
NUM_COLUMNS = TIME_COLUMN + 1
MEASURED, COPY, VIRTUAL = 1.0, 0.0, -1.0  # values of the flag
VIRTUAL_INTENSITY = -1.0
FILE_VERSION = 1
SETTINGS_FILE = "virtual_points.yaml"
ORIGIN_FILE = "made_from.yaml"

AbsentPolicy = Literal["error", "measured_only", "drop_sweep"]


class VirtualPointsConfig(Config, frozen=True):
    """How virtual points are made.

    `as_released` takes a pixel's corner for its place and leaves out row and column 0, as MVP's code does; by
    default a pixel stands for its centre.
    """

    points_per_instance: int = 50
    min_score: float = 0.0
    mask_errors: MaskErrors | None = None
    as_released: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.points_per_instance < 1:
            raise ConfigError(f"points_per_instance={self.points_per_instance}; expected at least 1")


class VirtualPointsOrigin(Config, frozen=True):
    """What a folder of virtual points was made from: a hash of the tables, and where the masks came from."""

    tables: str
    masks: str


class VirtualPointsInput(Config, frozen=True):
    """Virtual points as the input of a teacher: samples then have 17 columns.

    `folder` is relative to the root of the dataset. `absent` says what becomes of earlier sweeps without
    virtual points (masks are usually there for key frames only); the key sweep must have them.
    """

    folder: str = "virtual_points"
    absent: AbsentPolicy = "error"
    as_released: bool = False


@dataclass(frozen=True)
class VirtualPoints:
    """What the images add to one sweep, float32, in its LiDAR frame.

    copies: (R, 15) x, y, z, intensity, classes, score of the measured points that lie in a mask.
    virtual: (V, 14) x, y, z, classes, score.
    """

    copies: NDArray[np.float32]
    virtual: NDArray[np.float32]


def sample_pixels(mask: NDArray[np.bool_], num: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(num, 2) column and row, drawn without replacement; a mask too small repeats the first one drawn."""
    rows, columns = np.nonzero(mask)
    drawn = rng.permutation(len(rows))[:num]
    drawn = np.concatenate([drawn, np.repeat(drawn[:1], num - len(drawn))])
    return np.stack([columns[drawn], rows[drawn]], axis=1)


def project_points(
    points: NDArray[np.floating],
    cam2img: NDArray[np.float64],
    lidar2cam: NDArray[np.float64],
    size_wh_px: tuple[int, int],
    first_px: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """LiDAR points that one camera sees.

    Returns:
        (S,) their numbers, (S, 2) column and row of the pixels they fall into, (S,) depths (m).
    """
    in_camera = transform_points(lidar2cam, np.asarray(points[:, :3], dtype=np.float64))
    ahead = np.flatnonzero(in_camera[:, 2] > 0)
    homogeneous = in_camera[ahead] @ cam2img[:3, :3].T
    pixels = np.floor(homogeneous[:, :2] / homogeneous[:, 2:])
    seen = ((pixels >= first_px) & (pixels < size_wh_px)).all(axis=1)
    return ahead[seen], pixels[seen].astype(np.int64), in_camera[ahead[seen], 2]


def lift_masks(
    points: NDArray[np.floating],
    cam2img: NDArray[np.float64],
    lidar2cam: NDArray[np.float64],
    instances: Sequence[InstanceMasks],
    pixels: Sequence[NDArray[np.int64]],
    as_released: bool = False,
) -> VirtualPoints:
    """Gives every drawn pixel the depth of the nearest LiDAR point of its instance, and lifts it.

    A point belongs to the first instance of a camera whose mask covers it; instances without one give nothing.

    Args:
        points: (P, >=4) x, y, z, intensity of one sweep.
        cam2img: (N, 4, 4) or (N, 3, 3). lidar2cam: (N, 4, 4), with the motion between the two sensors.
        instances: of each of the N cameras.
        pixels: of each camera (n, m, 2) column and row, m drawn for each instance.
    """
    copied = np.zeros((len(points), len(CLASSES) + 1), dtype=np.float32)
    virtual = [np.zeros((0, 3 + len(CLASSES) + 1), dtype=np.float32)]
    for intrinsics, extrinsics, found, drawn in zip(cam2img, lidar2cam, instances, pixels, strict=True):
        height, width = found.masks.shape[1:]
        numbers, seen_px, depth_m = project_points(
            points, intrinsics, extrinsics, (width, height), first_px=1 if as_released else 0
        )
        owner = np.full(len(numbers), -1)
        for i in reversed(range(len(found))):
            owner[found.masks[i, seen_px[:, 1], seen_px[:, 0]]] = i
        for i, instance_px in enumerate(drawn):
            own = np.flatnonzero(owner == i)
            if len(own) == 0:
                continue
            tag = np.zeros(len(CLASSES) + 1, dtype=np.float32)
            tag[found.labels[i]] = 1
            tag[-1] = found.scores[i]
            copied[numbers[own]] = np.maximum(copied[numbers[own]], tag)

            distances = np.square(instance_px[:, None] - seen_px[own][None]).sum(axis=2)  # (m, own)
            depths = depth_m[own][distances.argmin(axis=1), None]
            places = instance_px if as_released else instance_px + 0.5
            rays = np.concatenate([places, np.ones((len(places), 1))], axis=1)
            in_camera = (rays * depths) @ np.linalg.inv(intrinsics[:3, :3]).T
            xyz = transform_points(invert_rigid(extrinsics), in_camera)
            virtual.append(np.concatenate([xyz, np.tile(tag, (len(xyz), 1))], axis=1).astype(np.float32))
    inside = copied[:, :-1].any(axis=1)
    copies = np.concatenate([points[inside, :4], copied[inside]], axis=1).astype(np.float32)
    return VirtualPoints(copies=copies, virtual=np.concatenate(virtual))


def make_virtual_points(
    sample: Sample,
    read_masks: ReadMasks,
    config: VirtualPointsConfig,
    rng: np.random.Generator,
) -> VirtualPoints:
    """Virtual points of a key frame's own sweep, from the masks of all its cameras.

    Raises:
        DataError: no LiDAR, or what `read_masks` finds wrong.
    """
    points = read_sweep(key_sweep(sample))
    instances = []
    for found in read_masks(sample):
        if config.mask_errors is not None:
            found = degrade_masks(found, config.mask_errors, rng)
        instances.append(found[(found.scores >= config.min_score) & found.masks.any(axis=(1, 2))])
    pixels = [
        np.array([sample_pixels(mask, config.points_per_instance, rng) for mask in found.masks]).reshape(
            -1, config.points_per_instance, 2
        )
        for found in instances
    ]
    lidar2cam = [
        invert_rigid(camera.ego2global @ camera.cam2ego) @ sample.lidar2global for camera in sample.cameras
    ]
    cam2img = [camera.cam2img for camera in sample.cameras]
    return lift_masks(
        points,
        np.array(cam2img).reshape(-1, 4, 4),
        np.array(lidar2cam).reshape(-1, 4, 4),
        instances,
        pixels,
        config.as_released,
    )


def virtual_points_path(folder: Path, sweep: LidarSweep) -> Path:
    """Where the virtual points of a sweep are kept; recordings have unique names."""
    return folder / sweep.path.parent.name / f"{sweep.path.name.split('.')[0]}.npz"


def write_virtual_points(path: Path, points: VirtualPoints) -> None:
    """Writes one file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    with unfinished.open("wb") as file:
        np.savez_compressed(
            file, version=np.array(FILE_VERSION), copies=points.copies, virtual=points.virtual
        )
    unfinished.replace(path)


def read_virtual_points(path: Path) -> VirtualPoints:
    """Reads what `write_virtual_points` wrote.

    Raises:
        DataError: the file is absent, damaged, or of another version.
    """
    again = "prepare the virtual points again"
    try:
        with np.load(path, allow_pickle=False) as file:
            version = int(file["version"])
            if version != FILE_VERSION:
                raise DataError(
                    f"{path}: version {version} of virtual points, expected {FILE_VERSION}; {again}"
                )
            points = VirtualPoints(copies=file["copies"], virtual=file["virtual"])
    except FileNotFoundError:
        raise DataError(
            f"{path}: no virtual points of this sweep; prepare them for the whole dataset"
        ) from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: unreadable virtual points: {error}; {again}") from None
    for name, array, columns in (("copies", points.copies, 15), ("virtual", points.virtual, 14)):
        if array.ndim != 2 or array.shape[1] != columns or not np.isfinite(array).all():
            raise DataError(f"{path}: {name} of shape {array.shape}; expected (n, {columns}) finite; {again}")
    return points


def load_mvp_points(
    sample: Sample,
    folder: Path,
    remove_ego_radius_m: float = 1.0,
    absent: AbsentPolicy = "error",
    as_released: bool = False,
) -> tuple[NDArray[np.float32], int]:
    """All sweeps of a sample with their copies and virtual points, in the LiDAR frame of the key frame.

    Args:
        sample: its sweeps are read, newest first.
        folder: of the virtual points.
        remove_ego_radius_m: points with |x| and |y| below it, in their own sweep's frame, hit the car itself.
        absent: what becomes of an earlier sweep without virtual points: an error, its measured points alone, or
            nothing of it, as in the reference. The key sweep must have them.
        as_released: what the published weights were trained with: nothing removed from the key sweep, and the
            ring in column 4 of the measured points of earlier sweeps.

    Returns:
        (P, 17) float32, sweep by sweep, in each the measured points, copies and virtual points; the time is 0 in
        the key sweep and negative before. And how many sweeps had no virtual points.

    Raises:
        DataError: a file is absent (and `absent` does not allow for it) or damaged.
    """
    if not sample.sweeps:
        return np.zeros((0, NUM_COLUMNS), dtype=np.float32), 0
    global2key = invert_rigid(sample.lidar2global)
    clouds: list[NDArray[np.float32]] = []
    num_absent = 0
    for i, sweep in enumerate(sample.sweeps):
        path = virtual_points_path(folder, sweep)
        added = None
        if i == 0 or absent == "error" or path.exists():
            added = read_virtual_points(path)
        else:
            num_absent += 1
            if absent == "drop_sweep":
                continue
        measured = read_sweep(sweep)
        cloud = mvp_columns(measured, added)
        if i > 0 and as_released:
            cloud[: len(measured), 4] = measured[:, 4]
        if i > 0 or not as_released:
            cloud = cloud[(np.abs(cloud[:, :2]) >= remove_ego_radius_m).any(axis=1)]
        if i > 0:
            sweep2key = (global2key @ sweep.ego2global @ sweep.lidar2ego).astype(np.float32)
            cloud[:, :3] = cloud[:, :3] @ sweep2key[:3, :3].T + sweep2key[:3, 3]
        cloud[:, TIME_COLUMN] = (sweep.timestamp_us - sample.sweeps[0].timestamp_us) * 1e-6
        clouds.append(cloud)
    return np.concatenate(clouds), num_absent


def mvp_columns(measured: NDArray[np.float32], added: VirtualPoints | None) -> NDArray[np.float32]:
    """(P, >=4) measured points of a sweep and what images added -> (P + R + V, 17), time 0."""
    blocks = [np.ones((len(measured), NUM_COLUMNS), dtype=np.float32)]
    blocks[0][:, :4] = measured[:, :4]
    if added is not None:
        copies = np.full((len(added.copies), NUM_COLUMNS), COPY, dtype=np.float32)
        copies[:, :FLAG_COLUMN] = added.copies
        virtual = np.full((len(added.virtual), NUM_COLUMNS), VIRTUAL, dtype=np.float32)
        virtual[:, :3] = added.virtual[:, :3]
        virtual[:, 3] = VIRTUAL_INTENSITY
        virtual[:, 4:FLAG_COLUMN] = added.virtual[:, 3:]
        blocks += [copies, virtual]
    cloud = np.concatenate(blocks)
    cloud[:, TIME_COLUMN] = 0
    return cloud


def prepare_virtual_points(
    nuscenes: NuScenes,
    read_masks: ReadMasks,
    folder: Path,
    config: VirtualPointsConfig,
    tokens: Sequence[str] | None = None,
    num_workers: int = 0,
) -> Iterator[Path | None]:
    """Writes the virtual points of key frames; yields each file written, None for one that was there.

    Sound files are kept, so a preparation that was stopped goes on where it was; the points of a frame depend on
    the seed and its token alone. `read_masks` travels to the workers, so it must be picklable.

    Raises:
        ConfigError: the folder holds virtual points made with other settings or from other tables or masks.
        DataError: as `make_virtual_points`; what is finished stays.
    """
    origin = VirtualPointsOrigin(tables=tables_fingerprint(nuscenes), masks=type(read_masks).__name__)
    made_from = folder / ORIGIN_FILE
    holds_points = any(folder.glob("*/*.npz"))  # a first try that failed at once binds nobody
    if (
        holds_points
        and made_from.exists()
        and (found := read_config(made_from, VirtualPointsOrigin)) != origin
    ):
        raise ConfigError(
            f"{folder} holds virtual points made from {found}, not {origin}; choose another folder"
        )
    settings = folder / SETTINGS_FILE
    if holds_points and settings.exists():
        found = read_config(settings, VirtualPointsConfig)
        if found != config:
            raise ConfigError(
                f"{folder} holds virtual points made with {found}, not {config}; choose another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, settings)
    write_config(origin, made_from)
    chosen = nuscenes.sample_tokens() if tokens is None else list(tokens)
    samples = (nuscenes.sample(token) for token in chosen)
    work = partial(_prepare_frame, read_masks=read_masks, folder=folder, config=config)
    if num_workers == 0:
        yield from map(work, samples)
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, samples, chunksize=4)


def prepare_folder(
    root: Path,
    config: VirtualPointsConfig,
    masks: Path | None = None,
    torchvision: bool = False,
    split: str | None = None,
    out: Path | None = None,
    processes: int | None = None,
    progress: bool = False,
) -> Path:
    """Prepares the virtual points of a dataset; the result is the same whatever the number of processes.

    Args:
        masks: folder of mask files; a simulated world's own masks if None.
        torchvision: find the masks with torchvision's Mask R-CNN instead.
        processes: one per core if None; Mask R-CNN runs in one, which uses all cores.

    Returns:
        The folder, `ROOT/virtual_points` unless `out` is given.

    Raises:
        ConfigError, DataError: as `prepare_virtual_points`.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    nuscenes = NuScenes(root)
    if masks is not None and torchvision:
        raise ConfigError(f"both mask files ({masks}) and Mask R-CNN were asked for; choose one")
    read_masks: ReadMasks = WorldMasks(nuscenes.root) if masks is None else MaskFiles(masks)
    if torchvision:
        from .mask_rcnn import MaskRcnn

        read_masks = MaskRcnn()
    workers = 0 if torchvision else (processes or os.cpu_count() or 1)
    folder = out or nuscenes.root / "virtual_points"
    tokens = nuscenes.sample_tokens(split)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not progress) as bar:
        done = prepare_virtual_points(
            nuscenes, read_masks, folder, config, tokens, 0 if workers == 1 else workers
        )
        for _ in bar.track(done, total=len(tokens), description="virtual points"):
            pass
    return folder


def tables_fingerprint(nuscenes: NuScenes) -> str:
    """A hash of the samples' and sensors' tables: other worlds and other calibrations have another."""
    digest = hashlib.sha256()
    for name in ("sample", "calibrated_sensor"):
        digest.update((nuscenes.folder / f"{name}.json").read_bytes())
    return digest.hexdigest()[:16]


def require_same_tables(nuscenes: NuScenes, folder: Path) -> None:
    """Refuses virtual points that were made for other tables.

    Raises:
        DataError: there are none, or their tables were others.
    """
    again = f"prepare them: distillbev virtual-points {nuscenes.root} --out {folder}"
    path = folder / ORIGIN_FILE
    if not path.exists():
        raise DataError(f"{folder}: no prepared virtual points (no {ORIGIN_FILE}); {again}")
    found, expected = read_config(path, VirtualPointsOrigin).tables, tables_fingerprint(nuscenes)
    if found != expected:
        raise DataError(
            f"{folder}: virtual points of other tables ({found}) than {nuscenes.folder} ({expected}); "
            f"delete the folder and {again}"
        )


def _prepare_frame(
    sample: Sample, read_masks: ReadMasks, folder: Path, config: VirtualPointsConfig
) -> Path | None:
    path = virtual_points_path(folder, key_sweep(sample))
    with contextlib.suppress(DataError):  # absent, or not sound: made again
        read_virtual_points(path)
        return None
    rng = np.random.default_rng([config.seed, zlib.crc32(sample.token.encode())])
    write_virtual_points(path, make_virtual_points(sample, read_masks, config, rng))
    return path


def key_sweep(sample: Sample) -> LidarSweep:
    """The sweep of the key frame itself.

    Raises:
        DataError: the sample has no LiDAR.
    """
    if not sample.sweeps:
        raise DataError(
            f"sample {sample.token} has no LiDAR sweep, and without depths no pixel can be lifted"
        )
    return sample.sweeps[0]
