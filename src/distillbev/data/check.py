"""Examines a whole dataset and lists everything that is wrong, where reading stops at the first fault."""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError
from .check_recordings import check_files, check_frames, check_points_in_boxes
from .check_tables import check_boxes, check_intrinsics, check_links, check_poses, check_time, rows_by_token
from .findings import Finding, Findings
from .index import damaged_files, find_index
from .samples import NuScenes
from .tables import find_version_folder

FRAMES_WITHOUT_LIMIT = 200  # of those whose points are counted in boxes, where all files are decoded


def check_dataset(
    root: Path, version: str | None = None, files_per_channel: int | None = None
) -> list[Finding]:
    """Everything that is wrong with a dataset, errors first; an empty list where nothing is.

    What joined tables show (splits, cameras, boxes on images, points in boxes) is looked at where the tables
    themselves have no errors.

    Args:
        root: as of `NuScenes`.
        version: as of `NuScenes`.
        files_per_channel: how many files of each channel are decoded, spread over time; None for all. That files
            exist is looked up for all of them.
    """
    folder = find_version_folder(root, version)
    findings = Findings()
    tables = rows_by_token(folder, findings)
    if tables is None:
        return findings.listed()
    for check in (check_links, check_time, check_poses, check_intrinsics, check_boxes):
        check(tables, findings)
    tables_are_right = not findings.has_errors
    check_files(folder.parent, tables, files_per_channel, findings)
    del tables
    index = find_index(folder)
    if index is not None:
        for name in damaged_files(index):
            what = "index: a file is damaged; delete its folder, and it is built anew"
            findings.add("error", what, str(index / name))
    if tables_are_right:
        nuscenes = NuScenes(folder, use_index=False)
        check_splits(nuscenes, findings)
        check_frames(nuscenes, findings)
        check_points_in_boxes(nuscenes, files_per_channel or FRAMES_WITHOUT_LIMIT, findings)
    return findings.listed()


def check_splits(nuscenes: NuScenes, findings: Findings) -> None:
    """Names of `splits.json` that nothing has, splits without frames, frames both trained on and scored on."""
    try:
        frames = {split: set(nuscenes.sample_tokens(split)) for split in nuscenes.splits()}
    except DataError as error:
        findings.add("error", "splits.json: cannot be used", str(error))
        return
    for split, tokens in frames.items():
        if not tokens:
            findings.add("warning", "splits.json: a split without key frames", split)
    for one, other in (("train", "val"), ("train", "test"), ("val", "test"), ("mini_train", "mini_val")):
        for token in frames.get(one, set()) & frames.get(other, set()):
            findings.add("warning", f"splits.json: a key frame is both in {one} and {other}", token)
