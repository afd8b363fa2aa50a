"""The folder: complete, linked, reproducible, and safe against interruption and mistakes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from world.small_world import SMALL

from distillbev.config import read_config
from distillbev.data.table_writer import TABLES
from distillbev.errors import ConfigError, DataError
from distillbev.world import SplitConfig, WorldConfig, simulate

TINY = WorldConfig(
    splits=(SplitConfig(name="all", scenes=3),), key_frames_per_scene=2, image_size_px=(48, 27), lidar_sweeps=0,
    lidar_azimuth_steps=90, write_masks=False, camera_hz=None,
)  # fmt: skip


def table(root: Path, name: str) -> list[dict]:
    return json.loads((root / "v1.0-sim" / f"{name}.json").read_text())


def digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_all_thirteen_tables_are_there_and_tokens_are_unique(world: Path):
    assert sorted(path.stem for path in (world / "v1.0-sim").iterdir()) == sorted(TABLES)
    for name in TABLES:
        tokens = [row["token"] for row in table(world, name)]
        assert tokens and len(set(tokens)) == len(tokens), name


def test_every_link_between_tables_leads_to_a_row(world: Path):
    tokens = {name: {row["token"] for row in table(world, name)} for name in TABLES}
    targets = {
        "sample": {"scene_token": "scene"},
        "scene": {"log_token": "log", "first_sample_token": "sample", "last_sample_token": "sample"},
        "sample_data": {
            "sample_token": "sample", "ego_pose_token": "ego_pose", "calibrated_sensor_token": "calibrated_sensor",
        },
        "calibrated_sensor": {"sensor_token": "sensor"},
        "instance": {
            "category_token": "category", "first_annotation_token": "sample_annotation",
            "last_annotation_token": "sample_annotation",
        },
        "sample_annotation": {"sample_token": "sample", "instance_token": "instance", "visibility_token": "visibility"},
    }  # fmt: skip
    for name, links in targets.items():
        for row in table(world, name):
            for field, target in links.items():
                assert row[field] in tokens[target], (name, field, row)
    for row in table(world, "sample_annotation"):
        assert set(row["attribute_tokens"]) <= tokens["attribute"]
    for row in table(world, "map"):
        assert set(row["log_tokens"]) <= tokens["log"] and (world / row["filename"]).exists()


@pytest.mark.parametrize("name", ["sample", "sample_data", "sample_annotation"])
def test_prev_and_next_are_mirrors_and_go_forward_in_time(world: Path, name: str):
    rows = {row["token"]: row for row in table(world, name)}
    times = {row["token"]: row["timestamp"] for row in table(world, "sample")}
    links = 0
    for row in rows.values():
        if row["next"]:
            after = rows[row["next"]]
            assert after["prev"] == row["token"]
            when = [r.get("timestamp") or times[r["sample_token"]] for r in (row, after)]
            assert when[0] < when[1]
            links += 1
    assert links


def test_files_of_every_recording_exist_with_the_size_that_the_tables_say(world: Path):
    for row in table(world, "sample_data"):
        path = world / row["filename"]
        assert row["filename"].startswith("samples/" if row["is_key_frame"] else "sweeps/")
        if row["fileformat"] == "jpg":
            with Image.open(path) as image:
                assert image.size == (row["width"], row["height"]) == SMALL.image_size_px
        else:
            points = np.fromfile(path, dtype=np.float32).reshape(-1, 5)
            assert len(points) > 1000 and np.isfinite(points).all()
            assert points[:, 3].min() >= 0 and points[:, 3].max() <= 255
            assert set(np.unique(points[:, 4])) <= set(range(32))


def test_each_key_frame_has_six_cameras_with_times_and_poses_of_their_own(world: Path):
    poses = {row["token"]: row for row in table(world, "ego_pose")}
    by_sample: dict[str, list[dict]] = {}
    for row in table(world, "sample_data"):
        if row["is_key_frame"]:
            by_sample.setdefault(row["sample_token"], []).append(row)
    assert len(by_sample) == SMALL.num_scenes * SMALL.key_frames_per_scene
    for sample in table(world, "sample"):
        rows = by_sample[sample["token"]]
        assert len(rows) == 7 and len({row["timestamp"] for row in rows}) == 7
        assert max(row["timestamp"] for row in rows) == sample["timestamp"]
        assert all(poses[row["ego_pose_token"]]["timestamp"] == row["timestamp"] for row in rows)


def test_as_many_sweeps_lie_before_each_key_frame_as_were_asked_for(world: Path):
    lidar = [row for row in table(world, "sample_data") if row["fileformat"] == "pcd"]
    assert len(lidar) == SMALL.num_scenes * SMALL.key_frames_per_scene * (1 + SMALL.lidar_sweeps)
    times = sorted({row["timestamp"] for row in lidar})
    assert np.diff(times).min() == 50_000


def test_splits_name_every_scene_once(world: Path):
    splits = json.loads((world / "splits.json").read_text())
    assert {name: len(scenes) for name, scenes in splits.items()} == {"train": 2, "val": 1}
    assert sorted(name for scenes in splits.values() for name in scenes) == sorted(
        row["name"] for row in table(world, "scene")
    )


def test_masks_name_the_instances_that_are_annotated(world: Path):
    samples = {row["token"]: row["scene_token"] for row in table(world, "sample")}
    scenes = {row["token"]: row["name"] for row in table(world, "scene")}
    annotated = {(row["sample_token"], row["instance_token"]) for row in table(world, "sample_annotation")}
    shown = 0
    for row in table(world, "sample_data"):
        if row["fileformat"] == "jpg" and row["is_key_frame"]:
            _, channel, name = row["filename"].split("/")
            mask = np.asarray(Image.open(world / "instance_masks" / channel / f"{Path(name).stem}.png"))
            assert mask.shape == (row["height"], row["width"])
            mapping = json.loads(
                (world / "instance_masks" / f"{scenes[samples[row['sample_token']]]}.json").read_text()
            )
            for number in np.unique(mask[mask > 0]):
                shown += (row["sample_token"], mapping[str(number)]) in annotated
    assert shown > 50


def test_two_processes_write_the_same_bytes_as_one(tmp_path: Path):
    simulate(TINY, tmp_path / "one", processes=1, progress=False)
    simulate(TINY, tmp_path / "two", processes=2, progress=False)
    one, two = digest(tmp_path / "one"), digest(tmp_path / "two")
    assert len(one) > 30
    assert one == two


def test_a_scene_does_not_depend_on_how_many_there_are(tmp_path: Path):
    fewer = msgspec.structs.replace(TINY, splits=(SplitConfig(name="all", scenes=1),))
    more = msgspec.structs.replace(TINY, splits=(SplitConfig(name="all", scenes=2),))
    simulate(fewer, tmp_path / "fewer", processes=1, progress=False)
    simulate(more, tmp_path / "more", processes=1, progress=False)
    fewer_files = {
        name: value for name, value in digest(tmp_path / "fewer").items() if name.startswith("samples/")
    }
    more_files = digest(tmp_path / "more")
    assert fewer_files and all(more_files[name] == value for name, value in fewer_files.items())


def test_another_seed_gives_another_world(tmp_path: Path):
    one = msgspec.structs.replace(TINY, splits=(SplitConfig(name="all", scenes=1),))
    simulate(one, tmp_path / "a", processes=1, progress=False)
    simulate(msgspec.structs.replace(one, seed=1), tmp_path / "b", processes=1, progress=False)
    a, b = digest(tmp_path / "a"), digest(tmp_path / "b")
    same = [name for name in a if name.startswith("samples/") and a[name] == b.get(name)]
    assert not same


def test_killed_in_the_middle_it_goes_on_and_writes_the_same_bytes(tmp_path: Path):
    config, out = msgspec.structs.replace(TINY, splits=(SplitConfig(name="all", scenes=6),)), tmp_path / "cut"
    code = (
        "import sys, msgspec; from pathlib import Path; from distillbev.world import WorldConfig, simulate\n"
        "simulate(msgspec.json.decode(sys.argv[1], type=WorldConfig), Path(sys.argv[2]), processes=1, progress=False)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, msgspec.json.encode(config).decode(), str(out)])
    deadline = time.monotonic() + 60
    while (
        not list((out / ".scenes").glob("*.json")) and time.monotonic() < deadline and worker.poll() is None
    ):
        time.sleep(0.005)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    finished = {path: path.stat().st_mtime_ns for path in (out / ".scenes").glob("*.json")}
    assert 1 <= len(finished) < 6 and not (out / "v1.0-sim").exists()
    first = next(iter((out / "samples" / "LIDAR_TOP").glob("sim-scene-0001__*")))
    written = first.stat().st_mtime_ns

    simulate(config, out, processes=1, progress=False)

    assert first.stat().st_mtime_ns == written
    simulate(config, tmp_path / "whole", processes=1, progress=False)
    assert digest(out) == digest(tmp_path / "whole")


def test_a_finished_folder_of_the_same_world_is_left_alone(world: Path):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    start = time.perf_counter()
    simulate(SMALL, world, processes=1, progress=False)
    assert time.perf_counter() - start < 0.5
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


def test_a_folder_of_another_world_is_refused_in_one_line_that_names_the_difference(world: Path):
    with pytest.raises(DataError) as caught:
        simulate(msgspec.structs.replace(SMALL, seed=5), world, processes=1, progress=False)
    message = str(caught.value)
    assert "\n" not in message and "seed 4 there, 5 asked for" in message and str(world) in message


def test_a_folder_with_other_files_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="empty or new folder"):
        simulate(TINY, tmp_path, processes=1, progress=False)


def test_the_config_beside_the_data_reads_back_equal(world: Path):
    assert read_config(world / "world.yaml", WorldConfig) == SMALL


@pytest.mark.parametrize(
    "wrong",
    [
        {"lidar_sweeps": 10},
        {"camera_hz": 13},
        {"classes": ("car", "tank")},
        {"image_size_px": (8, 8)},
        {"splits": ()},
        {"seed": -1},
    ],
)
def test_impossible_settings_are_refused(wrong: dict):
    with pytest.raises(ConfigError, match="expected"):
        msgspec.structs.replace(TINY, **wrong).__post_init__()


def test_cameras_run_at_twelve_hertz_when_asked(tmp_path: Path):
    config = msgspec.structs.replace(TINY, splits=(SplitConfig(name="all", scenes=1),), camera_hz=12)
    simulate(config, tmp_path / "w", processes=1, progress=False)
    front = [
        row["timestamp"] for row in table(tmp_path / "w", "sample_data") if "/CAM_FRONT/" in row["filename"]
    ]
    assert len(front) == 6 * config.key_frames_per_scene
    np.testing.assert_allclose(np.diff(sorted(front)), 1e6 / 12, atol=2)


def test_only_the_classes_that_were_asked_for_occur(tmp_path: Path):
    config = msgspec.structs.replace(TINY, classes=("pedestrian", "bus"), key_frames_per_scene=1)
    simulate(config, tmp_path / "w", processes=1, progress=False)
    categories = {row["token"]: row["name"] for row in table(tmp_path / "w", "category")}
    found = {categories[row["category_token"]] for row in table(tmp_path / "w", "instance")}
    assert found <= {
        "vehicle.bus.rigid",
        *(name for name in categories.values() if name.startswith("human.pedestrian")),
    }
    assert "vehicle.bus.rigid" in found and len(found) >= 2
