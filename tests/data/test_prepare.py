import json
from pathlib import Path

import pytest
from tiny_nuscenes import edit_table

from distillbev.data.prepare import prepare
from distillbev.data.samples import NuScenes, official_splits
from distillbev.errors import DataError


def test_preparing_twice_builds_once(spoilt_root: Path):
    assert ": built in " in prepare(spoilt_root)
    assert ": up to date, " in prepare(spoilt_root)


def test_preparing_faulty_tables_tells_what_is_wrong(spoilt_root: Path):
    edit_table(spoilt_root, "sample_data", lambda rows: rows[0].update(ego_pose_token="lost"))
    with pytest.raises(DataError, match=r"ego_pose_token 'lost' leads nowhere.*--check"):
        prepare(spoilt_root)


def test_official_splits_have_their_known_sizes_and_do_not_overlap():
    splits = official_splits()
    assert {name: len(scenes) for name, scenes in splits.items()} == {
        "train": 700,
        "val": 150,
        "test": 150,
        "mini_train": 8,
        "mini_val": 2,
    }
    assert len({scene for name in ("train", "val", "test") for scene in splits[name]}) == 1000


def test_an_official_split_is_there_where_all_its_scenes_are(spoilt_root: Path):
    names = official_splits()["mini_val"]
    edit_table(
        spoilt_root,
        "scene",
        lambda rows: [row.update(name=name) for row, name in zip(rows, names, strict=True)],
    )
    (spoilt_root / "splits.json").unlink()
    assert set(NuScenes(spoilt_root).splits()) == {"all", "mini_val"}


def test_a_split_may_list_sample_tokens(spoilt_root: Path):
    (spoilt_root / "splits.json").write_text(json.dumps({"few": ["scene-b-sample-2", "scene-a-sample-0"]}))
    assert NuScenes(spoilt_root).sample_tokens("few") == ["scene-b-sample-2", "scene-a-sample-0"]
