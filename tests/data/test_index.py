import dataclasses
import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_FRAME
from tiny_nuscenes import edit_table

from distillbev.data import index, index_writer, table_columns, token_keys
from distillbev.data.index import build_index, index_folders
from distillbev.data.index_reader import IndexedTables
from distillbev.data.samples import NuScenes
from distillbev.data.table_columns import NotIndexableError
from distillbev.errors import DataError


def assert_same(left: object, right: object) -> None:
    assert type(left) is type(right)
    if dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            assert_same(getattr(left, field.name), getattr(right, field.name))
    elif isinstance(left, np.ndarray):
        np.testing.assert_array_equal(left, right)
        assert left.dtype == right.dtype
    elif isinstance(left, tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def assert_equal_to_json(root: Path) -> None:
    plain = NuScenes(root, use_index=False)
    indexed = NuScenes(root, use_index=True)
    assert isinstance(indexed._tables, IndexedTables)
    assert indexed.scenes() == plain.scenes()
    assert indexed.splits() == plain.splits()
    assert indexed.sample_tokens() == plain.sample_tokens()
    for token in plain.sample_tokens():
        assert_same(indexed.sample(token, num_sweeps=10), plain.sample(token, num_sweeps=10))
        assert indexed.labels_in(token) == plain.labels_in(token)
        for one, other in zip(indexed.annotation_poses(token), plain.annotation_poses(token), strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_index_of_a_rig_equals_its_tables(spoilt_root: Path):
    assert_equal_to_json(spoilt_root)


def test_the_index_of_a_simulated_world_equals_its_tables(tmp_path: Path):
    from distillbev.world import SplitConfig, WorldConfig, simulate

    config = WorldConfig(
        splits=(SplitConfig(name="train", scenes=2),), key_frames_per_scene=2, image_size_px=(64, 36)
    )
    simulate(config, tmp_path / "world", processes=1)
    assert_equal_to_json(tmp_path / "world")


def test_the_index_of_the_real_frame_equals_its_tables(tmp_path: Path):
    if not REAL_FRAME.is_dir():
        pytest.skip("the real nuScenes frame is not there")
    (tmp_path / "v1.0-mini").mkdir()
    for path in (REAL_FRAME / "v1.0-mini").glob("*.json"):
        (tmp_path / "v1.0-mini" / path.name).write_bytes(path.read_bytes())
    assert_equal_to_json(tmp_path)


def test_tables_read_in_many_chunks_equal_those_read_in_one(
    spoilt_root: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(table_columns, "_CHUNK_BYTES", 700)
    assert_equal_to_json(spoilt_root)


def test_a_text_that_looks_like_the_end_of_a_row_is_read_whole(
    spoilt_root: Path, monkeypatch: pytest.MonkeyPatch
):
    edit_table(spoilt_root, "sample_data", lambda rows: [row.update(fileformat='"},{"') for row in rows])
    monkeypatch.setattr(table_columns, "_CHUNK_BYTES", 1)
    assert_equal_to_json(spoilt_root)


def test_a_row_of_over_64_kb_is_read_without_an_index(spoilt_root: Path, monkeypatch: pytest.MonkeyPatch):
    edit_table(spoilt_root, "sample_data", lambda rows: rows[3].update(comment="long " * 20_000))
    monkeypatch.setattr(table_columns, "_CHUNK_BYTES", 700)
    with pytest.raises(NotIndexableError, match=r"sample_data\.json: a row of over 65536 bytes"):
        build_index(spoilt_root / "v1.0-mini")
    assert len(NuScenes(spoilt_root, use_index=True).sample("scene-a-sample-1", num_sweeps=2).sweeps) == 3


def test_small_tables_are_read_without_an_index_until_one_is_prepared(spoilt_root: Path):
    assert not isinstance(NuScenes(spoilt_root)._tables, IndexedTables)
    build_index(spoilt_root / "v1.0-mini")
    assert isinstance(NuScenes(spoilt_root)._tables, IndexedTables)


def test_changed_tables_are_indexed_again_and_the_old_index_goes(
    spoilt_root: Path, caplog: pytest.LogCaptureFixture
):
    first = build_index(spoilt_root / "v1.0-mini")
    opened = NuScenes(spoilt_root)
    before = opened.sample("scene-a-sample-1", num_sweeps=3)
    edit_table(
        spoilt_root, "sample_annotation", lambda rows: rows[0].update(translation=[600.0, 1600.0, 9.0])
    )
    assert_equal_to_json(spoilt_root)
    folder = spoilt_root / "v1.0-mini"
    changed = f"{folder}: sample_annotation.json changed since the tables were indexed; indexing them again"
    assert caplog.messages[1] == changed
    assert caplog.messages[2].startswith(f"{folder}: indexing the tables, once; the index is kept in ")
    assert not first.exists()
    assert_same(opened.sample("scene-a-sample-1", num_sweeps=3), before)  # who had it open keeps it


def test_small_tables_that_changed_are_read_from_json_and_a_line_says_so(
    spoilt_root: Path, caplog: pytest.LogCaptureFixture
):
    build_index(spoilt_root / "v1.0-mini")
    edit_table(spoilt_root, "ego_pose", lambda rows: rows[0].update(translation=[601.0, 1602.0, 3.0]))
    nuscenes = NuScenes(spoilt_root)
    assert not isinstance(nuscenes._tables, IndexedTables)
    assert nuscenes.sample("scene-a-sample-0").ego2global[:3, 3].tolist() == [601.0, 1602.0, 3.0]
    [_, line] = caplog.messages
    assert "ego_pose.json changed since the tables were indexed, so JSON is read" in line


def test_versions_whose_names_begin_alike_keep_their_indices(spoilt_root: Path):
    shutil.copytree(spoilt_root / "v1.0-mini", spoilt_root / "v1.0-mini-half")
    other = build_index(spoilt_root / "v1.0-mini-half")
    building = spoilt_root / index.FOLDER / ".building-v1.0-mini-half-1"
    building.mkdir()
    assert other != build_index(spoilt_root / "v1.0-mini")
    assert other.is_dir()
    assert building.is_dir()


def test_tables_without_annotations_are_indexed(spoilt_root: Path):
    for name in ("sample_annotation", "instance", "category", "attribute"):
        (spoilt_root / "v1.0-mini" / f"{name}.json").write_text("[]")
    assert_equal_to_json(spoilt_root)


def test_a_second_process_writes_the_same_columns(spoilt_root: Path, monkeypatch: pytest.MonkeyPatch):
    def content(place: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in place.iterdir()}

    alone = content(build_index(spoilt_root / "v1.0-mini"))
    shutil.rmtree(spoilt_root / index.FOLDER)
    monkeypatch.setattr(index_writer, "SECOND_PROCESS_FROM_BYTES", 0)
    written_here: list[str] = []
    write_table = index_writer._write_table

    def write(folder: Path, place: Path, name: str) -> None:
        written_here.append(name)
        write_table(folder, place, name)

    monkeypatch.setattr(index_writer, "_write_table", write)
    assert content(build_index(spoilt_root / "v1.0-mini")) == alone
    assert "sample_data" not in written_here


@pytest.mark.parametrize("program", ["/nowhere/python", "/bin/false"])
def test_where_no_second_process_works_this_one_does_its_part(
    spoilt_root: Path, monkeypatch: pytest.MonkeyPatch, program: str
):
    monkeypatch.setattr(index_writer, "SECOND_PROCESS_FROM_BYTES", 0)
    monkeypatch.setattr(index_writer.sys, "executable", program)
    assert_equal_to_json(spoilt_root)


def test_a_half_written_index_is_not_used(spoilt_root: Path):
    place = build_index(spoilt_root / "v1.0-mini")
    path = place / "ego_pose.translation.npy"
    path.write_bytes(path.read_bytes()[:-8])
    assert not isinstance(NuScenes(spoilt_root)._tables, IndexedTables)


def test_a_damaged_index_is_told_in_one_line(spoilt_root: Path):
    place = build_index(spoilt_root / "v1.0-mini")
    path = place / "sample.order.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-24] + b"\x7f" * 24)
    with pytest.raises(DataError, match=r"the index is damaged .* delete this folder"):
        for token in [f"scene-{scene}-sample-{i}" for scene in "ab" for i in range(3)]:
            NuScenes(spoilt_root).sample(token)
    path.write_bytes(b"?" * len(content))  # no head of a column: as good as no index
    assert not isinstance(NuScenes(spoilt_root)._tables, IndexedTables)


BUILD_UNTIL_KILLED = """
import sys, time
from pathlib import Path
from distillbev.data import index, index_writer
index_writer._link_table = lambda place, name: print("half", flush=True) or time.sleep(60)
index.build_index(Path(sys.argv[1]))
"""


def test_a_build_that_is_killed_leaves_nothing_that_is_used(spoilt_root: Path):
    folder = spoilt_root / "v1.0-mini"
    command = [sys.executable, "-c", BUILD_UNTIL_KILLED, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.kill()
    [half] = (spoilt_root / index.FOLDER).glob(".building-*")
    assert (half / "sample_data.token.npy").is_file()
    assert not isinstance(NuScenes(spoilt_root)._tables, IndexedTables)
    place = build_index(folder)
    assert sorted(path.name for path in place.parent.iterdir()) == [place.name, "v1.0-mini.lock"]
    assert_equal_to_json(spoilt_root)


def test_a_build_that_fails_leaves_nothing(spoilt_root: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(spoilt_root / "cache"))
    monkeypatch.setattr(index_writer, "_save", full_disk)
    with pytest.raises(OSError, match="No space"):
        build_index(spoilt_root / "v1.0-mini")
    assert sorted(path.name for path in (spoilt_root / index.FOLDER).iterdir()) == ["v1.0-mini.lock"]
    assert len(NuScenes(spoilt_root, use_index=True).sample_tokens()) == 6  # reads JSON


def test_a_root_that_cannot_be_written_is_indexed_in_the_users_cache(
    spoilt_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (spoilt_root / index.FOLDER).write_text("a file where the folder should be")  # root ignores permissions
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build_index(spoilt_root / "v1.0-mini").is_relative_to(tmp_path / "cache")
    assert_equal_to_json(spoilt_root)


def test_where_nothing_can_be_written_json_is_read_and_a_line_says_so(
    spoilt_root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (spoilt_root / index.FOLDER).write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(spoilt_root / index.FOLDER))
    assert len(NuScenes(spoilt_root, use_index=True).sample_tokens()) == 6
    [line] = caplog.messages
    assert "reading the JSON tables at every start, for there is no index: " in line


@pytest.mark.parametrize("field", ["ego_pose_token", "sample_token", "prev"])
def test_tables_with_broken_links_are_not_indexed_but_told_as_ever(spoilt_root: Path, field: str):
    edit_table(spoilt_root, "sample_data", lambda rows: [row.update({field: "lost"}) for row in rows])
    with pytest.raises(NotIndexableError, match="'lost' leads nowhere"):
        build_index(spoilt_root / "v1.0-mini")
    with pytest.raises(DataError, match=rf"^sample_data\.json, token '[^']+': {field} 'lost' is not in"):
        NuScenes(spoilt_root, use_index=True).sample("scene-a-sample-1", num_sweeps=1)


def test_a_token_that_occurs_twice_is_not_indexed(spoilt_root: Path):
    edit_table(spoilt_root, "ego_pose", lambda rows: rows.append(rows[0]))
    with pytest.raises(NotIndexableError, match=r"ego_pose\.json has 1 tokens more than once"):
        build_index(spoilt_root / "v1.0-mini")


def test_keys_of_many_texts_equal_those_of_each():
    texts = [b"a", b"12345678", b"123456789", "ä ö".encode(), b"0123456789abcdef" * 2, b""]
    keys = token_keys.keys_of(np.array(texts))
    assert [int(key) for key in keys] == [int(token_keys.key_of(text)) for text in texts]
    assert len(set(keys.tolist())) == len(texts)


def _build(folder: Path) -> str:
    return str(build_index(folder))


def test_several_processes_may_build_at_once(spoilt_root: Path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        places = set(pool.map(_build, [spoilt_root / "v1.0-mini"] * 8))
    assert places == {str(index_folders(spoilt_root / "v1.0-mini")[0])}
    left = sorted(path.name for path in (spoilt_root / index.FOLDER).iterdir())
    assert left == [Path(*places).name, "v1.0-mini.lock"]


def test_workers_get_paths_not_copies(spoilt_root: Path):
    nuscenes = NuScenes(spoilt_root, use_index=True)
    token = nuscenes.sample_tokens()[1]
    sample = nuscenes.sample(token, 3)
    sent = pickle.dumps(nuscenes._tables)
    assert len(sent) < 1000
    received = pickle.loads(sent)
    assert received.sample_data.get("nobody") is None
    assert_same(nuscenes.sample(token, 3), sample)


def test_the_list_of_an_index_names_format_and_tables(spoilt_root: Path):
    content = json.loads((build_index(spoilt_root / "v1.0-mini") / "index.json").read_text())
    assert content["format"] == index.FORMAT
    assert "sample_data" in content["tables"]
