"""Results files as a user scores and compares them: what is printed, and what lies in the folder afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_nuscenes import write_tiny_nuscenes

from distillbev import cli
from distillbev.data.samples import NuScenes
from distillbev.errors import DataError
from distillbev.evaluation.eval_boxes import EvalBoxes, ground_truth_boxes
from distillbev.evaluation.results import write_results
from distillbev.scoring import annotated_samples, compare_results

MISTAKE = "the true one is yaw + pi/2"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small dataset with a split of both its scenes."""
    root = write_tiny_nuscenes(tmp_path_factory.mktemp("data") / "tiny")
    (root / "splits.json").write_text(json.dumps({"all": ["scene-a", "scene-b"], "val": ["scene-a"]}))
    return root


def quarter_turned(boxes: EvalBoxes) -> EvalBoxes:
    half = (boxes.yaw_rad() - np.pi / 2) / 2
    zero = np.zeros_like(half)
    return replace(boxes, quat_wxyz=np.stack([np.cos(half), zero, zero, np.sin(half)], axis=-1))


def half_lost(boxes: EvalBoxes) -> EvalBoxes:
    return boxes[np.arange(len(boxes)) % 2 == 0]


def results_file(root: Path, path: Path, change: Callable[[EvalBoxes], EvalBoxes] | None = None) -> Path:
    """What a perfect detector would write, changed."""
    boxes = ground_truth_boxes(annotated_samples(NuScenes(root), "all")).boxes
    boxes = boxes[boxes.num_points > 0]
    boxes = replace(boxes, scores=np.linspace(0.5, 1, len(boxes)), num_points=np.full(len(boxes), -1))
    write_results(path, boxes if change is None else change(boxes))
    return path


def command(*args: str | Path) -> None:
    cli.app([str(arg) for arg in args], standalone_mode=False)


def test_evaluate_scores_a_results_file_and_names_its_mistake(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command("evaluate", results_file(root, tmp_path / "r.json"), "--data", root, "--split", "all")
    good = capsys.readouterr().out
    assert "mAP: 0.2000" in good and MISTAKE not in good  # two of ten classes are there
    assert (tmp_path / "r-all" / "metrics_summary.json").exists()
    wrong = results_file(root, tmp_path / "wrong.json", quarter_turned)
    command("evaluate", wrong, "--data", root, "--split", "all", "--out", tmp_path / "out")
    assert MISTAKE in capsys.readouterr().out
    assert MISTAKE in (tmp_path / "out" / "table.txt").read_text()


def test_settings_of_the_evaluation_can_be_changed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = results_file(root, tmp_path / "r.json")
    command("evaluate", file, "--data", root, "--split", "all", "--set", "max_range_m=1")
    assert "mAP: 0.0000" in capsys.readouterr().out


def test_check_lists_the_faults_of_a_file(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = results_file(root, tmp_path / "r.json")
    command("evaluate", file, "--data", root, "--split", "all", "--check")
    file.write_text(file.read_text().replace('"car"', '"lorry"'))
    ended = cli.app(
        ["evaluate", str(file), "--data", str(root), "--split", "all", "--check"], standalone_mode=False
    )
    assert ended == 1
    assert "lorry" in capsys.readouterr().out


def test_compare_prints_tables_and_leaves_a_page_with_pictures_and_the_numbers(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first = results_file(root, tmp_path / "half.json", half_lost)
    second = results_file(root, tmp_path / "turned.json", quarter_turned)
    out = tmp_path / "out"
    command(
        *("compare", first, second, "--data", root, "--split", "all", "--out", out),
        *("--frames", "2", "--repeats", "20"),
    )
    printed = capsys.readouterr().out
    assert f"B: headings are in another convention: {MISTAKE}" in printed
    assert printed.startswith((out / "table.txt").read_text())
    for row in ("mAP", "mAOE", "car", "mAP, distance 10 to 20 m", "found, visibility over 80 %"):
        assert f"\n{row} " in printed
    page = (out / "comparison.html").read_text()
    assert page.count("<img ") == 2 * 3  # cameras, and a view from above of either
    assert "http" not in page  # nothing is fetched
    assert MISTAKE in page
    numbers = json.loads((out / "comparison.json").read_text())
    assert numbers["headline"]["mAP"]["difference"] > 0
    assert numbers["first"]["metrics"]["label_tp_errors"]["barrier"]["vel_err"] is None  # no NaN in JSON
    assert "wrong" not in numbers and numbers["second"]["diagnosis"]
    assert max(abs(a - b) for a, b in (frame["mistakes"] for frame in numbers["frames"])) >= 1


def test_files_of_other_samples_are_not_compared(root: Path, tmp_path: Path) -> None:
    file = results_file(root, tmp_path / "r.json")
    with pytest.raises(DataError, match="are not evaluated"):
        compare_results(file, file, root, "val", tmp_path / "out")
    with pytest.raises(DataError, match="no such results file"):
        compare_results(file, tmp_path / "absent.json", root, "all", tmp_path / "out")
