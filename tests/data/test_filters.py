"""What is trained on: boxes by the number of their points, key frames by split."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_nuscenes import edit_table

from distillbev.classes import CATEGORY_TO_CLASS, CLASSES
from distillbev.data.frames import FrameDataset, frames_of_tokens
from distillbev.data.samples import NuScenes, official_splits
from distillbev.data.settings import DataConfig

POINTS = [(0, 0), (1, 0), (0, 1), (2, 1), (4, 0), (0, 5)]


def rows_with_points(root: Path) -> list[dict[str, Any]]:
    """The annotations of all key frames, with numbers of LiDAR and radar returns of many kinds."""
    kept: list[dict[str, Any]] = []

    def edit(rows: list[dict[str, Any]]) -> None:
        for number, row in enumerate(rows):
            row["num_lidar_pts"], row["num_radar_pts"] = POINTS[number % len(POINTS)]
        kept.extend(rows)

    edit_table(root, "sample_annotation", edit)
    return kept


@pytest.mark.parametrize("use_index", [False, True])
@pytest.mark.parametrize("min_points", [0, 1, 3, 5, 6])
def test_targets_have_as_many_returns_of_lidar_and_radar_as_asked(
    spoilt_root: Path, min_points: int, use_index: bool
):
    rows = rows_with_points(spoilt_root)
    nuscenes = NuScenes(spoilt_root, use_index=use_index)
    config = DataConfig(load_images=False, load_points=False, min_points_in_box=min_points)
    tokens = nuscenes.sample_tokens()
    dataset = FrameDataset(nuscenes, frames_of_tokens(tokens, labelled=True), config)
    for index, token in enumerate(tokens):
        # The reference: valid_flag is num_lidar_pts + num_radar_pts > 0, a filter by points asks for a minimum.
        expected = sorted(
            CLASSES.index(CATEGORY_TO_CLASS[category])
            for row in rows
            if (category := row["instance_token"].split("-instance-")[1]) in CATEGORY_TO_CLASS
            and row["sample_token"] == token
            and row["num_lidar_pts"] + row["num_radar_pts"] >= min_points
        )
        [boxes] = dataset[index, 0].boxes
        assert boxes is not None
        assert sorted(boxes.labels.tolist()) == expected
        assert nuscenes.labels_in(token, min_points) == set(expected)


def tables_of_scenes(root: Path, names: list[str]) -> NuScenes:
    """A dataset of which only scenes and one key frame of each are known."""
    scenes = [{"token": f"of-{name}", "name": name} for name in names]
    samples = [
        {"token": f"first-{name}", "timestamp": 1, "scene_token": f"of-{name}", "prev": "", "next": ""}
        for name in names
    ]
    folder = root / "v1.0-any"
    folder.mkdir()
    (folder / "scene.json").write_text(json.dumps(scenes))
    (folder / "sample.json").write_text(json.dumps(samples))
    return NuScenes(root)


@pytest.mark.parametrize(
    ("there", "splits"),
    [
        (("train", "val"), {"train", "val", "mini_train", "mini_val"}),
        (("test",), {"test"}),
        (("mini_train", "mini_val"), {"mini_train", "mini_val"}),
    ],
)
def test_the_official_splits_of_a_download_are_built_in(
    tmp_path: Path, there: tuple[str, ...], splits: set[str]
):
    names = sorted(name for split in there for name in official_splits()[split])
    nuscenes = tables_of_scenes(tmp_path, names)
    assert set(nuscenes.splits()) == splits | {"all"}
    for split in splits:
        assert nuscenes.sample_tokens(split) == [f"first-{name}" for name in official_splits()[split]]


def test_a_split_may_mix_scenes_and_samples(tmp_path: Path):
    (tmp_path / "splits.json").write_text(json.dumps({"mine": ["b", "first-d"], "val": ["c"]}))
    nuscenes = tables_of_scenes(tmp_path, ["a", "b", "c", "d"])
    assert nuscenes.sample_tokens("mine") == ["first-b", "first-d"]
    assert nuscenes.sample_tokens("val") == ["first-c"]
