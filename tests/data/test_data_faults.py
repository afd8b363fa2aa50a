"""Faults of files and machines, one by one; `tools/fuzz` draws them by the thousand."""

import ast
import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from test_index import assert_same
from tiny_nuscenes import IMAGE_WH, edit_table, write_tiny_nuscenes

import distillbev
from distillbev.data import index
from distillbev.data.check import check_dataset
from distillbev.data.frames import FrameDataset, frames_of_tokens
from distillbev.data.images import has_hidden_damage, load_image
from distillbev.data.index import build_index, open_tables
from distillbev.data.index_reader import IndexedTables, read_list
from distillbev.data.instance_masks import MaskFiles
from distillbev.data.points import load_points
from distillbev.data.prepare import prepare
from distillbev.data.samples import NuScenes
from distillbev.data.schema import CameraFrame
from distillbev.data.settings import DataConfig, PastConfig
from distillbev.data.tables import LONGEST_ROW, SceneRow, read_rows
from distillbev.errors import DataError
from distillbev.evaluation.eval_boxes import ground_truth_boxes
from distillbev.evaluation.results import read_results

FIRST, SAMPLE = "scene-a-sample-0", "scene-a-sample-1"
VERSION = "v1.0-mini"


@pytest.fixture(autouse=True)
def nothing_waits() -> Iterator[None]:
    """A fault that makes reading wait forever fails its test."""

    def stop(*_: object) -> None:
        raise TimeoutError("still reading")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)


def read_everything(root: Path) -> dict[str, tuple]:
    nuscenes = NuScenes(root)
    found = {}
    for token in nuscenes.sample_tokens():
        sample = nuscenes.sample(token, num_sweeps=9)
        images = tuple(np.asarray(load_image(camera).image) for camera in sample.cameras)
        found[token] = (sample.annotations, load_points(sample), *images)
    return found


def camera_of(root: Path, channel: str = "CAM_FRONT") -> CameraFrame:
    return next(camera for camera in NuScenes(root).sample(FIRST).cameras if camera.channel == channel)


def point_file(root: Path) -> Path:
    return root / "samples" / "LIDAR_TOP" / "scene-a-lidar-0.pcd.bin"


# Images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
def test_a_jpeg_cut_anywhere_is_refused(spoilt_root: Path, fast: bool):
    camera = camera_of(spoilt_root)
    content = camera.path.read_bytes()
    for size in (*range(0, len(content), 397), len(content) - 1):
        camera.path.write_bytes(content[:size])
        with pytest.raises(DataError, match="unreadable image"):
            load_image(camera, fast=fast)


def test_a_jpeg_with_flipped_bits_is_refused_or_keeps_its_size_and_some_are_told(spoilt_root: Path):
    pytest.importorskip("simplejpeg")
    camera = camera_of(spoilt_root)
    content = camera.path.read_bytes()
    rng = np.random.default_rng(0)
    refused = told = 0
    for _ in range(100):
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        camera.path.write_bytes(flipped)
        try:
            image = load_image(camera).image
        except DataError:
            refused += 1
        else:
            assert (image.size, image.mode) == (IMAGE_WH, "RGB")
            told += has_hidden_damage(camera.path)
    assert refused > 0 and told > 10
    findings = check_dataset(spoilt_root)
    assert all("damaged, yet decodes" in finding.what or finding.severity == "error" for finding in findings)


def gigantic_png(side_px: int) -> bytes:
    """A PNG of few bytes whose head claims any size."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    content = file.getvalue()
    head = b"IHDR" + side_px.to_bytes(4, "big") * 2 + content[24:29]
    return content[:12] + head + zlib.crc32(head).to_bytes(4, "big") + content[33:]


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "EPS", "PPM"])
def test_only_jpeg_and_png_are_opened(spoilt_root: Path, kind: str):
    camera = camera_of(spoilt_root)
    image = Image.open(camera.path)
    image.load()
    image.save(camera.path, kind)
    with pytest.raises(DataError, match="neither JPEG nor PNG"):
        load_image(camera)


def test_an_image_that_claims_a_gigantic_size_is_refused_before_it_is_decoded(spoilt_root: Path):
    camera = camera_of(spoilt_root)
    camera.path.write_bytes(gigantic_png(60_000))
    with pytest.raises(DataError, match=r"decompression bomb|60000x60000 pixels"):
        load_image(camera)
    edit_table(
        spoilt_root, "sample_data", lambda rows: [row.update(width=60_000, height=60_000) for row in rows]
    )
    with pytest.raises(DataError, match=r"60000x60000 pixels, expected at most"):
        NuScenes(spoilt_root).sample(FIRST)


def test_a_jpeg_of_thousands_of_scans_is_refused(spoilt_root: Path):
    camera = camera_of(spoilt_root)
    file = io.BytesIO()
    Image.open(camera.path).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    scan = content[content.index(b"\xff\xda") : -2]
    camera.path.write_bytes(content[:-2] + 1000 * scan + b"\xff\xd9")
    with pytest.raises(DataError, match=r"a JPEG of \d+ scans, expected at most 100"):
        load_image(camera)


# LiDAR ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [3e38, -2e4, np.inf, np.nan])
def test_a_point_that_no_lidar_gives_is_named(spoilt_root: Path, value: float):
    points = np.fromfile(point_file(spoilt_root), dtype="<f4")
    points[5] = value
    points.tofile(point_file(spoilt_root))
    with pytest.raises(DataError, match=r"scene-a-lidar-0\.pcd\.bin.*point 1 of 52 is .*at most"):
        load_points(NuScenes(spoilt_root).sample(FIRST))


# Things in a file's place ---------------------------------------------------------------------------------------

FILES: dict[str, Callable[[Path], Path]] = {
    "table": lambda root: root / VERSION / "ego_pose.json",
    "list of splits": lambda root: root / "splits.json",
    "image": lambda root: camera_of(root).path,
    "LiDAR file": point_file,
}
PLACED: dict[str, Callable[[Path], None]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a broken link": lambda path: path.symlink_to("gone"),
}


@pytest.mark.parametrize("placed", PLACED)
@pytest.mark.parametrize("what", FILES)
def test_what_is_no_file_is_refused_without_waiting(spoilt_root: Path, what: str, placed: str):
    path = FILES[what](spoilt_root)
    path.unlink()
    PLACED[placed](path)
    with pytest.raises(DataError, match=rf"{path.name}.*{what}"):
        NuScenes(spoilt_root).splits()
        read_everything(spoilt_root)
    assert any(finding.severity == "error" for finding in check_dataset(spoilt_root))


def test_links_to_other_disks_are_followed(tmp_path: Path, tiny_root: Path):
    sound = read_everything(tiny_root)
    root = tmp_path / "linked"
    root.mkdir()
    for path in tiny_root.iterdir():
        (root / path.name).symlink_to(path)
    (tmp_path / "again").symlink_to(root)
    for place in (root, tmp_path / "again"):
        assert_same(tuple(read_everything(place).values()), tuple(sound.values()))


def test_unicode_and_spaces_in_every_name_are_read(tmp_path: Path, tiny_root: Path):
    root = write_tiny_nuscenes(tmp_path / "мой ñ data\u3000 'set'")

    def rename(rows: list[dict]) -> None:
        for number, row in enumerate(rows):
            name = f"samples/with space/ü ñ 漢 {number}{Path(row['filename']).suffix}"
            (root / name).parent.mkdir(exist_ok=True)
            (root / row["filename"]).rename(root / name)
            row["filename"] = name

    edit_table(root, "sample_data", rename)
    sound = tuple(read_everything(tiny_root).values())
    assert_same(tuple(read_everything(root).values()), sound)
    build_index(root / VERSION)
    assert_same(tuple(read_everything(root).values()), sound)


# Tables ---------------------------------------------------------------------------------------------------------


def test_the_order_of_rows_does_not_matter(spoilt_root: Path):
    sound = read_everything(spoilt_root)
    for table in ("sample", "sample_data", "ego_pose", "calibrated_sensor", "sensor", "instance", "category"):
        edit_table(spoilt_root, table, list.reverse)
    found = read_everything(spoilt_root)
    assert list(found) == list(sound)
    assert_same(tuple(found.values()), tuple(sound.values()))


@pytest.mark.parametrize(
    "table", ["scene", "sample", "sample_data", "ego_pose", "sensor", "sample_annotation"]
)
@pytest.mark.parametrize("use_index", [True, False])
def test_a_token_that_occurs_twice_is_refused(spoilt_root: Path, table: str, use_index: bool):
    edit_table(spoilt_root, table, lambda rows: rows.append(rows[0]))
    with pytest.raises(DataError, match=rf"{table}\.json: token '.*' occurs more than once"):
        NuScenes(spoilt_root, use_index=use_index).sample(SAMPLE)
    assert any(finding.what == f"{table}: token occurs twice" for finding in check_dataset(spoilt_root))


def test_two_scenes_of_one_name_are_refused(spoilt_root: Path):
    edit_table(spoilt_root, "scene", lambda rows: rows[1].update(name="scene-a"))
    with pytest.raises(DataError, match=r"scene 'scene-a-token' has the name 'scene-a', too"):
        NuScenes(spoilt_root).sample_tokens()


def test_two_recordings_of_one_camera_are_refused(spoilt_root: Path):
    def copy_front(rows: list[dict]) -> None:
        row = next(row for row in rows if row["token"] == "scene-a-CAM_FRONT-1")
        rows.append(row | {"token": "another"})

    edit_table(spoilt_root, "sample_data", copy_front)
    with pytest.raises(DataError, match=r"'scene-a-CAM_FRONT-1' and 'another'.*are both of CAM_FRONT"):
        NuScenes(spoilt_root).sample(SAMPLE)


def test_an_absent_camera_is_told_by_the_check_and_not_batched_with_others(spoilt_root: Path):
    def lose_front(rows: list[dict]) -> None:
        rows.remove(next(row for row in rows if row["token"] == "scene-a-CAM_FRONT-0"))
        next(row for row in rows if row["token"] == "scene-a-CAM_FRONT-1")["prev"] = ""

    edit_table(spoilt_root, "sample_data", lose_front)
    assert [camera.channel for camera in NuScenes(spoilt_root).sample(FIRST).cameras] == [
        "CAM_BACK",
        "CAM_SIDE",
    ]
    assert any("with other cameras" in finding.what for finding in check_dataset(spoilt_root))
    config = DataConfig(image_size_px=(32, 16), cameras=("CAM_FRONT", "CAM_BACK"))
    with pytest.raises(DataError, match="scene-a-sample-0: no camera CAM_FRONT"):
        FrameDataset(NuScenes(spoilt_root), frames_of_tokens([FIRST]), config)[0, 0]


CIRCLES = {
    "sweep before itself": ("sample_data", "scene-a-lidar-5", {"prev": "scene-a-lidar-5"}),
    "sweeps in a circle": ("sample_data", "scene-a-lidar-3", {"prev": "scene-a-lidar-4"}),
    "sweep of a camera": ("sample_data", "scene-a-lidar-5", {"prev": "scene-a-CAM_FRONT-0"}),
    "sweep of another scene": ("sample_data", "scene-b-lidar-5", {"prev": "scene-a-lidar-4"}),
    "box before itself": ("sample_annotation", "scene-a-annotation-vehicle.car-1",
                          {"prev": "scene-a-annotation-vehicle.car-1"}),
    "box after its next": ("sample_annotation", "scene-a-annotation-vehicle.car-1",
                           {"next": "scene-a-annotation-vehicle.car-0"}),
    "box of another object": ("sample_annotation", "scene-a-annotation-vehicle.car-1",
                              {"prev": "scene-a-annotation-animal-0"}),
}  # fmt: skip


@pytest.mark.parametrize("circle", CIRCLES)
@pytest.mark.parametrize("use_index", [True, False])
def test_links_in_circles_or_to_what_does_not_belong_are_refused(
    spoilt_root: Path, circle: str, use_index: bool
):
    table, token, change = CIRCLES[circle]
    edit_table(spoilt_root, table, lambda rows: [row.update(change) for row in rows if row["token"] == token])
    field = next(iter(change))
    sample = token[:8] + "sample-1"
    with pytest.raises(DataError, match=rf"^{table}\.json, token '{token}': {field} is '{change[field]}'"):
        NuScenes(spoilt_root, use_index=use_index).sample(sample, num_sweeps=9)
    assert any(finding.severity == "error" for finding in check_dataset(spoilt_root))


@pytest.mark.parametrize("previous", [SAMPLE, "scene-a-sample-2", "scene-b-sample-0"])
def test_a_sample_before_itself_or_of_another_scene_is_refused(spoilt_root: Path, previous: str):
    edit_table(spoilt_root, "sample", lambda rows: rows[1].update(prev=previous))
    config = DataConfig(image_size_px=(32, 16), past=PastConfig(num_frames=2))
    with pytest.raises(
        DataError, match=rf"token '{SAMPLE}': prev is '{previous}'.*expected an earlier sample"
    ):
        FrameDataset(NuScenes(spoilt_root), frames_of_tokens([SAMPLE]), config)[0, 0]


def test_one_pose_of_another_place_is_refused(spoilt_root: Path):
    far = {"translation": [700.0, 1600.0, 0.0]}
    edit_table(spoilt_root, "ego_pose", lambda rows: [
        row.update(far) for row in rows if row["token"] == "pose-scene-a-CAM_BACK-1"])  # fmt: skip
    with pytest.raises(DataError, match=r"'scene-a-sample-1': the car is \d+\.?\d* m away from itself"):
        NuScenes(spoilt_root).sample(SAMPLE)


def test_a_recording_far_from_its_sample_is_refused(spoilt_root: Path):
    edit_table(spoilt_root, "sample", lambda rows: rows[1].update(timestamp=rows[1]["timestamp"] + 1_200_000))
    with pytest.raises(DataError, match=r"key frame -1\.2\d s after its sample"):
        NuScenes(spoilt_root).sample(SAMPLE)


# Hostile files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../outside.bin", "/etc/passwd", "samples/../../outside.bin", "..\\outside.bin", "C:\\outside.bin",
             "\\\\host\\share\\x", "", ".", "samples/a\0b", "samples/a\nb", "samples/\x1b[31m"],
)  # fmt: skip
def test_no_name_leaves_the_root_or_speaks_to_the_terminal(spoilt_root: Path, name: str):
    (spoilt_root.parent / "outside.bin").write_bytes(point_file(spoilt_root).read_bytes())
    edit_table(spoilt_root, "sample_data", lambda rows: rows[0].update(filename=name))
    with pytest.raises(DataError, match=r"filename '.*'; expected the name of a file below") as told:
        NuScenes(spoilt_root).sample(FIRST)
    assert str(told.value).isprintable()
    findings = [finding for finding in check_dataset(spoilt_root) if "leaves the dataset" in finding.what]
    assert len(findings) == 1 and findings[0].examples.isprintable()


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".hidden", "", "a\nb", "x" * 256])
@pytest.mark.parametrize(("table", "field"), [("scene", "name"), ("sensor", "channel")])
def test_names_that_become_file_names_are_plain(spoilt_root: Path, table: str, field: str, name: str):
    edit_table(spoilt_root, table, lambda rows: rows[0].update({field: name}))
    with pytest.raises(DataError, match=rf"{table}\.json"):
        NuScenes(spoilt_root).sample(FIRST)


def test_an_unknown_kind_of_sensor_does_not_hide_a_camera(spoilt_root: Path):
    edit_table(spoilt_root, "sensor", lambda rows: rows[0].update(modality="kamera"))
    with pytest.raises(DataError, match=r"sensor\.json, row 0, token 'sensor-CAM_BACK': .*modality"):
        NuScenes(spoilt_root).sample(FIRST)
    assert [finding.what for finding in check_dataset(spoilt_root)] == ["sensor.json: cannot be read"]


BOMBS = {
    "a deep list": b"[" * 200_000,
    "a deep row": b'[{"token": "a", "name": "b", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
    "a deep token": b'[{"token": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}]",
    "millions of lists": b"[" + b"[]," * 3_000_000 + b"[]]",
    "a row of millions of lists": b'[{"token": [' + b"[]," * 3_000_000 + b"[]]}]",
    "a long number": b'[{"token": ' + b"9" * 100_000 + b"}]",
    "a long text": b'[{"token": "' + b"9" * 1_000_000 + b'"}]',
    "half a character": b'[{"token": "\\ud800", "name": "b"}]',
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_json_bombs_end_in_one_line_and_little_memory(tmp_path: Path, bomb: str):
    path = tmp_path / "scene.json"
    path.write_bytes(BOMBS[bomb])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"scene\.json") as told:
        read_rows(path, SceneRow)
    assert "\n" not in str(told.value) and len(str(told.value)) < 600
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    )  # kB; plain lists take 400 MB


def test_rows_longer_than_any_honest_one_are_read_where_they_are_whole(tmp_path: Path):
    row = {"token": "a", "name": "b", "notes": "x" * LONGEST_ROW}
    (tmp_path / "scene.json").write_text(json.dumps([row]))
    assert read_rows(tmp_path / "scene.json", SceneRow) == [SceneRow("a", "b")]


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_in_splits_masks_and_results_end_in_one_line(spoilt_root: Path, bomb: str):
    for name in ("splits.json", "results.json", "masks/CAM_BACK/scene-a-CAM_BACK-0.json"):
        (spoilt_root / name).parent.mkdir(parents=True, exist_ok=True)
        (spoilt_root / name).write_bytes(BOMBS[bomb])
    Image.new("L", IMAGE_WH).save(spoilt_root / "masks/CAM_BACK/scene-a-CAM_BACK-0.png")
    nuscenes = NuScenes(spoilt_root)
    sample = nuscenes.sample(FIRST)
    back = [camera for camera in sample.cameras if camera.channel == "CAM_BACK"]
    for read in (
        nuscenes.splits,
        lambda: read_results(spoilt_root / "results.json", ground_truth_boxes([sample])),
        lambda: MaskFiles(spoilt_root / "masks")._read(back[0]),
    ):
        with pytest.raises(DataError) as told:
            read()
        assert "\n" not in str(told.value) and len(str(told.value)) < 1500


def test_a_mask_that_claims_a_gigantic_size_is_refused(spoilt_root: Path):
    camera = camera_of(spoilt_root)
    path = spoilt_root / "masks" / "CAM_FRONT" / f"{camera.path.stem}.png"
    path.parent.mkdir(parents=True)
    for side in (5000, 60_000):
        path.write_bytes(gigantic_png(side))
        with pytest.raises(DataError, match=r"scene-a-CAM_FRONT-0\.png"):
            MaskFiles(spoilt_root / "masks")._read(camera)


# The index ------------------------------------------------------------------------------------------------------


def list_again(place: Path) -> None:
    """Makes the list of an index fit what somebody did to its files."""
    listed = read_list(place)
    assert listed is not None
    files = {name: index._facts(place / name) for name in listed.files}
    (place / "index.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(listed, files=files)))


@pytest.mark.parametrize(
    ("old", "new"), [(b"'<f8'", b"'|O' "), (b"(52, 3)", b"(9999999999, 3)"), (b"'shape'", b"__import__")]
)
def test_a_header_of_an_index_file_is_not_believed(spoilt_root: Path, old: bytes, new: bytes):
    path = build_index(spoilt_root / VERSION) / "ego_pose.translation.npy"
    content = path.read_bytes()
    head = content[10:128].replace(b"(40, 3)", b"(52, 3)").replace(old, new)[:118].ljust(118)
    path.write_bytes(content[:10] + head + content[128:])
    assert not isinstance(open_tables(spoilt_root / VERSION), IndexedTables)  # its head is not as listed
    list_again(path.parent)
    with pytest.raises(DataError, match=r"the index is damaged.*delete this folder"):
        NuScenes(spoilt_root).sample(FIRST)


def test_row_numbers_below_zero_do_not_count_from_the_end(spoilt_root: Path):
    path = build_index(spoilt_root / VERSION) / "sample_data.ego_pose.npy"
    column = np.load(path)
    np.save(path, np.full_like(column, -2))
    list_again(path.parent)
    with pytest.raises(DataError, match="the index is damaged"):
        NuScenes(spoilt_root).sample(FIRST)


def test_a_changed_number_in_an_index_is_found_by_the_check(spoilt_root: Path):
    path = build_index(spoilt_root / VERSION) / "ego_pose.translation.npy"
    column = np.load(path)
    np.save(path, column + 0.1)
    assert [(f.severity, f.count) for f in check_dataset(spoilt_root) if f.what.startswith("index: ")] == [
        ("error", 1)
    ]


@pytest.mark.parametrize("bomb", ["a deep list", "a deep token", "millions of lists"])
def test_an_index_whose_list_is_a_bomb_is_not_used(spoilt_root: Path, bomb: str):
    place = build_index(spoilt_root / VERSION)
    (place / "index.json").write_bytes(BOMBS[bomb])
    assert not isinstance(open_tables(spoilt_root / VERSION), IndexedTables)
    assert ": built in " in prepare(spoilt_root)


# Machines -------------------------------------------------------------------------------------------------------


def test_a_read_only_root_is_indexed_in_the_users_cache(
    spoilt_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_folder = Path.mkdir

    def refuse_below_root(path: Path, *arguments: bool, **options: bool) -> None:
        if path.is_relative_to(spoilt_root):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        make_folder(path, *arguments, **options)

    sound = read_everything(spoilt_root)
    before = sorted(spoilt_root.rglob("*"))
    monkeypatch.setattr(Path, "mkdir", refuse_below_root)
    assert str(tmp_path / "cache") in prepare(spoilt_root)
    assert isinstance(open_tables(spoilt_root / VERSION), IndexedTables)
    assert_same(tuple(read_everything(spoilt_root).values()), tuple(sound.values()))
    assert sorted(spoilt_root.rglob("*")) == before


def test_a_full_disk_ends_prepare_in_one_line_and_leaves_nothing(spoilt_root: Path, tmp_path: Path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    ended = subprocess.run(
        [sys.executable, "-m", "distillbev", "prepare", str(spoilt_root)],
        env=environment, preexec_fn=small_files_only, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    *_, last = lines = ended.stderr.splitlines()
    assert last.startswith("error: ") and "no index" in last and "make room" in last
    assert all("indexing the tables, once" in line for line in lines[:-1])
    left = [
        p.name
        for p in (*(spoilt_root / index.FOLDER).iterdir(), *(tmp_path / "cache").rglob("*"))
        if p.is_file()
    ]
    assert all(name.endswith(".lock") for name in left)
    assert not any(p.is_dir() for p in (spoilt_root / index.FOLDER).iterdir())
    assert len(read_everything(spoilt_root)) == 6


SLOW_PREPARE = """
import os, sys, time
from pathlib import Path
from distillbev.data import index
from distillbev.data.prepare import prepare
def wait(*_):
    print("all but done", flush=True)
    time.sleep(60)
index.os.fsync = wait
prepare(Path(sys.argv[1]))
"""


def test_a_preparation_that_is_killed_leaves_no_index_and_is_made_up_for(spoilt_root: Path):
    process = subprocess.Popen([sys.executable, "-c", SLOW_PREPARE, str(spoilt_root)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"all but done\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert any(path.name.startswith(".building-") for path in (spoilt_root / index.FOLDER).iterdir())
    assert not isinstance(open_tables(spoilt_root / VERSION), IndexedTables)
    start = time.monotonic()
    assert ": built in " in prepare(spoilt_root)
    assert time.monotonic() - start < 30  # nobody waits for the lock of the dead
    assert not any(path.name.startswith(".building-") for path in (spoilt_root / index.FOLDER).iterdir())


# The source -----------------------------------------------------------------------------------------------------


def test_nothing_in_the_package_runs_what_a_file_says():
    package = Path(distillbev.__file__).parent
    for path in package.rglob("*.py"):
        where = str(path.relative_to(package))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {"pickle", "dill", "shelve", "marshal"} & {alias.name for alias in node.names}, (
                    where
                )
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                assert {alias.name for alias in node.names} == {"UnpicklingError"}, where
            if isinstance(node, ast.Call):
                name, options = (
                    ast.unparse(node.func),
                    {word.arg: ast.unparse(word.value) for word in node.keywords},
                )
                assert name not in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load"), where
                assert name != "torch.load" or options.get("weights_only") == "True", where
                assert name != "np.load" or options.get("allow_pickle") == "False", where
                assert name != "Image.open" or "formats" in options, where
