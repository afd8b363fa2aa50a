"""Virtual points and pasted objects as training meets them: through the loader."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from PIL import Image
from tiny_nuscenes import edit_table

from distillbev.data.augment import BevAugConfig
from distillbev.data.frames import Frame, FrameDataset
from distillbev.data.object_pasting import ObjectPastingConfig
from distillbev.data.samples import NuScenes
from distillbev.data.settings import DataConfig
from distillbev.data.virtual_points import (
    ORIGIN_FILE,
    VirtualPointsConfig,
    VirtualPointsInput,
    prepare_folder,
    virtual_points_path,
)
from distillbev.errors import ConfigError, DataError

PASTING = DataConfig(load_images=False, object_pasting=ObjectPastingConfig(min_points=1))
SETTINGS = VirtualPointsConfig(points_per_instance=5)


def write_masks(nuscenes: NuScenes, folder: Path) -> Path:
    """The left half of every image is a car."""
    for token in nuscenes.sample_tokens():
        for camera in nuscenes.sample(token).cameras:
            width, height = camera.size_wh_px
            numbers = np.zeros((height, width), dtype=np.uint8)
            numbers[:, : width // 2] = 1
            stem = folder / camera.channel / camera.path.stem
            stem.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(numbers).save(stem.with_name(f"{stem.name}.png"))
            listing = {"instances": [{"id": 1, "class": "car", "score": 0.9}]}
            stem.with_name(f"{stem.name}.json").write_text(json.dumps(listing))
    return folder


@pytest.fixture
def prepared(spoilt_root: Path, tmp_path: Path) -> NuScenes:
    nuscenes = NuScenes(spoilt_root)
    masks = write_masks(nuscenes, tmp_path / "masks")
    assert prepare_folder(spoilt_root, SETTINGS, masks, processes=1) == spoilt_root / "virtual_points"
    return nuscenes


def with_hits(root: Path) -> NuScenes:
    """Every annotated object of the dataset is hit once, at its centre."""
    nuscenes = NuScenes(root)
    for token in nuscenes.sample_tokens():
        sample = nuscenes.sample(token)
        assert sample.annotations is not None
        hits = np.zeros((len(sample.annotations.boxes), 5), dtype="<f4")
        hits[:, :3] = sample.annotations.boxes[:, :3]
        with sample.sweeps[0].path.open("ab") as file:
            file.write(hits.tobytes())
    return nuscenes


def dataset_of(
    nuscenes: NuScenes, config: DataConfig, train: bool = True, labelled: bool = True
) -> FrameDataset:
    frames = [Frame(token, labelled) for token in nuscenes.sample_tokens()]
    return FrameDataset(nuscenes, frames, config, train=train)


def test_augmentation_moves_the_places_of_seventeen_columns_and_nothing_else(prepared: NuScenes) -> None:
    config = DataConfig(load_images=False, bev_aug=BevAugConfig(), virtual_points=VirtualPointsInput())
    moved, plain = (dataset_of(prepared, config, train)[0, 3] for train in (True, False))
    assert moved.points is not None and plain.points is not None
    expected = plain.points[0][:, :3] @ moved.bev_aug[0, :3, :3].T
    assert plain.points[0].shape[1] == 17 and (plain.points[0][:, 15] == -1).any()
    torch.testing.assert_close(moved.points[0][:, :3], expected)
    assert torch.equal(moved.points[0][:, 3:], plain.points[0][:, 3:])


def test_earlier_sweeps_without_virtual_points_are_an_error_or_counted(prepared: NuScenes) -> None:
    config = DataConfig(load_images=False, num_sweeps=3, virtual_points=VirtualPointsInput())
    with pytest.raises(DataError, match="no virtual points of this sweep"):
        dataset_of(prepared, config)[1, 0]
    dataset = dataset_of(prepared, replace(config, virtual_points=VirtualPointsInput(absent="measured_only")))
    assert dataset[1, 0].points is not None
    assert dataset.reader.sweeps_without_virtual_points > 0


def test_virtual_points_of_other_tables_or_masks_are_refused(prepared: NuScenes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="made from"):
        prepare_folder(prepared.root, SETTINGS, processes=1)  # the world's own masks instead of files
    with pytest.raises(ConfigError, match="made with"):
        prepare_folder(prepared.root, VirtualPointsConfig(), tmp_path / "masks", processes=1)
    edit_table(prepared.root, "calibrated_sensor", lambda rows: rows[0]["translation"].__setitem__(0, 9.0))
    with pytest.raises(DataError, match="virtual points of other tables"):
        dataset_of(
            NuScenes(prepared.root), DataConfig(load_images=False, virtual_points=VirtualPointsInput())
        )


def test_a_dataset_without_prepared_points_says_what_to_type(spoilt_root: Path) -> None:
    with pytest.raises(DataError, match="distillbev virtual-points"):
        dataset_of(NuScenes(spoilt_root), DataConfig(load_images=False, virtual_points=VirtualPointsInput()))


def test_a_first_try_that_failed_does_not_bind_the_folder(spoilt_root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only a world simulated with masks"):
        prepare_folder(spoilt_root, SETTINGS, processes=1)
    masks = write_masks(NuScenes(spoilt_root), tmp_path / "masks")
    assert any(prepare_folder(spoilt_root, SETTINGS, masks, processes=1).glob("*/*.npz"))


def test_a_mask_of_another_size_is_told_in_one_line(prepared: NuScenes, tmp_path: Path) -> None:
    sample = prepared.sample(prepared.sample_tokens()[0])
    camera = sample.cameras[0]
    Image.new("L", (3, 2)).save(tmp_path / "masks" / camera.channel / f"{camera.path.stem}.png")
    virtual_points_path(prepared.root / "virtual_points", sample.sweeps[0]).unlink()
    with pytest.raises(DataError, match="rows by") as caught:
        prepare_folder(prepared.root, SETTINGS, tmp_path / "masks", processes=1)
    assert "\n" not in str(caught.value)
    assert (prepared.root / "virtual_points" / ORIGIN_FILE).exists()


def test_pasting_depends_on_seed_and_draw_alone_and_keeps_the_augmentation(spoilt_root: Path) -> None:
    config = replace(PASTING, bev_aug=BevAugConfig())
    nuscenes = with_hits(spoilt_root)
    first, again = dataset_of(nuscenes, config), dataset_of(nuscenes, config)
    plain = dataset_of(nuscenes, replace(config, object_pasting=None))
    added = 0
    for draw in range(4):
        one, two, bare = (dataset[2, draw] for dataset in (first, again, plain))
        assert one.points and two.points and one.boxes[0] and two.boxes[0] and bare.boxes[0]
        assert torch.equal(one.points[0], two.points[0])
        assert torch.equal(one.boxes[0].labels, two.boxes[0].labels)
        assert torch.equal(one.bev_aug, bare.bev_aug)
        own = len(bare.boxes[0])
        torch.testing.assert_close(one.boxes[0].boxes[:own], bare.boxes[0].boxes, equal_nan=True)
        added += len(one.boxes[0]) - own
    assert added > 0


def test_nothing_is_pasted_into_unlabelled_frames_outside_training_or_at_the_end(spoilt_root: Path) -> None:
    nuscenes = with_hits(spoilt_root)
    plain = dataset_of(nuscenes, replace(PASTING, object_pasting=None))
    stopped = replace(PASTING, object_pasting=ObjectPastingConfig(min_points=1, stop_after_samples=2))
    expected = plain[2, 2].points
    assert expected is not None
    for dataset in (
        dataset_of(nuscenes, PASTING, train=False),
        dataset_of(nuscenes, PASTING, labelled=False),
        dataset_of(nuscenes, stopped),
    ):
        points = dataset[2, 2].points
        assert points is not None and torch.equal(points[0], expected[0])
    pasted = dataset_of(nuscenes, PASTING)[2, 2].points
    assert pasted is not None and len(pasted[0]) > len(expected[0])
