import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import AUGMENTED, PLAIN, assert_equal, dataset_of
from tiny_nuscenes import edit_table

from distillbev.data import reader
from distillbev.data.frame_cache import FrameCache, FrameCacheConfig, pack, unpack
from distillbev.data.frames import frames_of_splits
from distillbev.data.loader import make_training_loader
from distillbev.data.samples import NuScenes
from distillbev.data.settings import DataConfig
from distillbev.errors import ConfigError, DataError

replace = msgspec.structs.replace
CONFIGS = [
    PLAIN,
    AUGMENTED,
    replace(AUGMENTED, exact_jpeg=True),
    replace(PLAIN, exact_jpeg=True, num_sweeps=4),
]


def with_cache(config: DataConfig, **options) -> DataConfig:
    return replace(config, frame_cache=FrameCacheConfig(**options))


def entries(root: Path) -> list[Path]:
    return sorted(root.rglob("frame_cache/*/*.array"))


def dtype_of(path: Path) -> np.dtype:
    array = unpack(path.read_bytes())
    assert array is not None
    return array.dtype


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args, **_kwargs):
        raise AssertionError("read again")

    monkeypatch.setattr(reader, "load_image", refuse)
    monkeypatch.setattr(reader, "load_points", refuse)


@pytest.mark.parametrize("config", CONFIGS)
def test_cached_frames_equal_uncached_ones_to_the_bit(
    spoilt_root: Path, monkeypatch: pytest.MonkeyPatch, config: DataConfig
):
    nuscenes = NuScenes(spoilt_root)
    plain = dataset_of(nuscenes, config, train=True)
    expected = [plain[index, draw] for index, draw in [(0, 1), (3, 2), (0, 3)]]
    first = dataset_of(nuscenes, with_cache(config), train=True)
    for batch, (index, draw) in zip(expected, [(0, 1), (3, 2), (0, 3)], strict=True):
        assert_equal(first[index, draw], batch)
    forbid_reading(monkeypatch)  # all of it is in the cache by now
    second = dataset_of(nuscenes, with_cache(config), train=True)
    for batch, (index, draw) in zip(expected, [(0, 1), (3, 2), (0, 3)], strict=True):
        assert_equal(second[index, draw], batch)


def test_entries_made_under_other_settings_are_not_used(spoilt_root: Path):
    nuscenes = NuScenes(spoilt_root)
    variants = [
        *CONFIGS,
        replace(PLAIN, image_size_px=(80, 40)),
        replace(PLAIN, image_resize_offset=0.04),
        replace(PLAIN, image_fit="whole"),
        replace(PLAIN, num_sweeps=0),
        replace(PLAIN, remove_ego_radius_m=3.0),
    ]
    for config in variants:
        cached = dataset_of(nuscenes, with_cache(config), train=True)[0, 5]
        assert_equal(cached, dataset_of(nuscenes, config, train=True)[0, 5])


def test_entries_of_changed_files_and_tables_are_not_used(spoilt_root: Path):
    dataset_of(NuScenes(spoilt_root), with_cache(PLAIN))[0, 0]
    before = len(entries(spoilt_root))
    sample = NuScenes(spoilt_root).sample("scene-b-sample-0", num_sweeps=1)
    shutil.copy(sample.cameras[1].path, sample.cameras[0].path)
    points = np.fromfile(sample.sweeps[0].path, dtype="<f4")
    (points * np.float32(0.5)).tofile(sample.sweeps[0].path)
    # A clock so coarse that it misses a change within one tick is not what is tested here.
    for path in (sample.cameras[0].path, sample.sweeps[0].path):
        os.utime(path, ns=(1, 1))
    changed = NuScenes(spoilt_root)
    assert_equal(dataset_of(changed, with_cache(PLAIN))[0, 0], dataset_of(changed)[0, 0])
    assert len(entries(spoilt_root)) == before + 2

    def turn(rows: list[dict]) -> None:
        for row in rows:
            row["translation"][0] += 1.0 if row["token"].endswith("-1") else 0.0

    edit_table(spoilt_root, "ego_pose", turn)
    moved = NuScenes(spoilt_root)
    for index in range(3):
        assert_equal(dataset_of(moved, with_cache(PLAIN))[index, 0], dataset_of(moved)[index, 0])


def test_a_dataset_that_moved_keeps_its_entries(spoilt_root: Path, monkeypatch: pytest.MonkeyPatch):
    expected = dataset_of(NuScenes(spoilt_root), with_cache(PLAIN))[0, 0]
    moved = spoilt_root.rename(spoilt_root.with_name("moved"))
    forbid_reading(monkeypatch)
    assert_equal(dataset_of(NuScenes(moved), with_cache(PLAIN))[0, 0], expected)


@pytest.mark.parametrize("keep_bytes", [0, 50, 1000])
def test_an_entry_cut_short_is_made_again(spoilt_root: Path, keep_bytes: int):
    nuscenes = NuScenes(spoilt_root)
    expected = dataset_of(nuscenes, with_cache(PLAIN))[0, 0]
    for path in entries(spoilt_root):
        path.write_bytes(path.read_bytes()[:keep_bytes])
    assert_equal(dataset_of(nuscenes, with_cache(PLAIN))[0, 0], expected)
    assert all(path.stat().st_size > keep_bytes for path in entries(spoilt_root))


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32 - 1))
def test_a_damaged_entry_is_never_used(seed: int):
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 256, (3, 5, 3)).astype(rng.choice(["u1", "<f4", "<i8"]))
    content = bytearray(pack(array))
    whole = unpack(bytes(content))
    assert whole is not None
    np.testing.assert_array_equal(whole, array)
    position, bit = int(rng.integers(len(content))), int(rng.integers(8))
    content[position] ^= 1 << bit
    assert unpack(bytes(content)) is None
    assert unpack(pack(array)[:position]) is None


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (2, 0, 3)])
def test_arrays_without_values_or_axes_come_back(shape: tuple[int, ...]):
    back = unpack(pack(np.zeros(shape, dtype=np.float32)))
    assert back is not None
    assert (back.shape, back.dtype) == (shape, np.float32)


def test_a_source_that_vanished_is_an_error_also_when_it_is_cached(spoilt_root: Path):
    nuscenes = NuScenes(spoilt_root)
    dataset_of(nuscenes, with_cache(PLAIN))[0, 0]
    nuscenes.sample("scene-b-sample-0").cameras[0].path.unlink()
    with pytest.raises(DataError, match="no such image"):
        dataset_of(nuscenes, with_cache(PLAIN))[0, 0]


def test_only_what_was_asked_for_is_kept(spoilt_root: Path):
    nuscenes = NuScenes(spoilt_root)
    dataset_of(nuscenes, with_cache(PLAIN, sweeps=False))[0, 0]
    assert [dtype_of(path) for path in entries(spoilt_root)] == [np.uint8] * 3
    shutil.rmtree(spoilt_root / "frame_cache")
    dataset_of(nuscenes, with_cache(PLAIN, images=False))[0, 0]
    assert [dtype_of(path) for path in entries(spoilt_root)] == [np.float32]


def test_workers_share_a_cache_and_give_the_same_batches(spoilt_root: Path):
    def batches(config: DataConfig, workers: int) -> list:
        nuscenes = NuScenes(spoilt_root)
        _, groups = frames_of_splits(nuscenes, ["train"], ["val"])
        dataset = dataset_of(nuscenes, config, seed=1, train=True)
        return list(make_training_loader(dataset, groups, (2, 1), steps=3, workers=workers))

    plain = batches(AUGMENTED, 0)
    for workers in (2, 0):  # cold, then warm
        for first, second in zip(plain, batches(with_cache(AUGMENTED), workers), strict=True):
            assert_equal(first, second)


def fill(folder: Path, first: int) -> None:
    cache = FrameCache(folder, FrameCacheConfig(folder="cache", max_gib=1e6 / 2**30))
    source = folder / "source"
    for number in range(first, first + 40):
        cache.array([source], (number,), lambda: np.zeros(24_961, dtype=np.uint8))  # 25 kB in all


def test_processes_together_stay_below_the_bound_and_say_so(tmp_path: Path, caplog):
    (tmp_path / "source").write_bytes(b"1")
    processes = [get_context("fork").Process(target=fill, args=(tmp_path, 100 * i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    sizes = [path.stat().st_size for path in (tmp_path / "cache").rglob("*.array")]
    assert sizes == [25_000] * 40
    assert not list((tmp_path / "cache").rglob(".*.array.*"))
    with caplog.at_level(logging.WARNING):
        fill(tmp_path, 500)
    assert [record.getMessage() for record in caplog.records] == [
        f"frame cache {tmp_path / 'cache'} holds 0.000931 GiB, as many as it may; "
        "the frames that it lacks are made each time"
    ]


@pytest.mark.parametrize("count", [None, b"", b"zero"])
def test_a_count_that_is_lost_is_taken_anew(tmp_path: Path, count: bytes | None):
    (tmp_path / "source").write_bytes(b"1")
    fill(tmp_path, 0)
    (tmp_path / "cache" / "bytes").unlink()
    if count is not None:
        (tmp_path / "cache" / "bytes").write_bytes(count)
    fill(tmp_path, 100)
    assert len(list((tmp_path / "cache").rglob("*.array"))) == 40


def test_threads_asking_for_the_same_entry_all_get_it(tmp_path: Path):
    (tmp_path / "source").write_bytes(b"1")
    cache = FrameCache(tmp_path, FrameCacheConfig())
    with ThreadPoolExecutor(8) as pool:
        arrays = list(
            pool.map(lambda _: cache.array([tmp_path / "source"], (), lambda: np.arange(9)), range(64))
        )
    assert all(array.tolist() == list(range(9)) for array in arrays)


def test_a_cache_that_cannot_be_written_costs_time_only(spoilt_root: Path, caplog):
    (spoilt_root / "frame_cache").write_text("a file is in the way")
    nuscenes = NuScenes(spoilt_root)
    with caplog.at_level(logging.WARNING):
        batch = dataset_of(nuscenes, with_cache(PLAIN))[0, 0]
    assert_equal(batch, dataset_of(nuscenes, PLAIN)[0, 0])
    assert len(caplog.records) == 1
    assert "cannot be written: " in caplog.records[0].getMessage()


@pytest.mark.parametrize("options", [{"max_gib": 0.0}, {"images": False, "sweeps": False}])
def test_a_cache_of_nothing_is_refused(options: dict):
    with pytest.raises(ConfigError, match="frame_cache=null"):
        FrameCacheConfig(**options)
