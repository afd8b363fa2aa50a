"""Each fault that a results file can have is listed, in one line that says what and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_cases import Found, Scene, box, flat_poses, random_scenes, results_json, samples_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distillbev.data.findings import Finding
from distillbev.errors import DataError
from distillbev.evaluation.check import check_results
from distillbev.evaluation.eval_boxes import ground_truth_boxes
from distillbev.evaluation.results import read_results

SCENES = [Scene(t, *flat_poses(), [], [Found(box(5.0), "car", 0.5)] * 2) for t in ("a", "b", "c")]
TOKENS = ("a", "b", "c")
NAN, INF = float("nan"), float("inf")


def findings(content: str, folder: Path) -> list[Finding]:
    path = folder / "results.json"
    path.write_text(content)
    return check_results(path, TOKENS)


def is_refused(folder: Path) -> bool:
    """Whether the reader refuses the file that `findings` has written."""
    try:
        read_results(folder / "results.json", ground_truth_boxes(samples_of(SCENES)))
    except DataError:
        return True
    return False


def test_a_good_file_has_no_findings(tmp_path: Path) -> None:
    assert findings(results_json(SCENES), tmp_path) == []
    random = random_scenes(np.random.default_rng(0), 3, 20, 5)
    for scene, token in zip(random, TOKENS, strict=True):
        scene.token = token
    assert findings(results_json(random), tmp_path) == []  # unknown velocities are allowed


@pytest.mark.parametrize(
    ("field", "value", "severity", "told"),
    [
        ("sample_token", "other", "error", "sample_token is not that of its entry"),
        ("translation", [1.0, 2.0], "error", "translation is not 3 numbers"),
        ("translation", [NAN, 0.0, 0.0], "error", "translation is not finite"),
        ("size", [1.0, -1.0, 1.0], "error", "size is not positive"),
        ("size", [1.0, INF, 1.0], "error", "size is not positive"),
        ("rotation", [0.0, 0.0, 0.0, 0.0], "error", "rotation is not a quaternion"),
        ("rotation", [NAN, 0.0, 0.0, 1.0], "error", "rotation is not a quaternion"),
        ("rotation", 0.3, "error", "rotation is not 4 numbers"),
        ("rotation", [0.5, 0.0, 0.0, 0.5], "warning", "rotation is not of unit length"),
        ("rotation", [0.0, 0.0, 0.6, 0.8], "warning", "expected as w, x, y, z"),
        ("size", [1e200, 1.0, 1.0], "error", "size is not positive"),
        ("translation", [10**400, 0, 0], "error", "translation is not 3 numbers"),
        ("num_pts", 2**70, "error", "num_pts is not a whole number"),
        ("velocity", [INF, 0.0], "error", "velocity is infinite"),
        ("velocity", [0.0, 0.0, 0.0], "error", "velocity is not 2 numbers"),
        ("detection_name", "lorry", "error", "detection_name is none of car, truck"),
        ("detection_name", None, "error", "detection_name is not text"),
        ("detection_score", "0.5", "error", "detection_score is not a number"),
        ("detection_score", NAN, "error", "detection_score is not a number"),
        ("detection_score", 7.5, "warning", "detection_score is not in 0 to 1"),
        ("attribute_name", "vehicle.flying", "error", "attribute_name is none of vehicle.moving"),
    ],
)
def test_a_faulty_value_is_told_with_its_place_and_refused_if_it_is_an_error(
    field: str, value: object, severity: str, told: str, tmp_path: Path
) -> None:
    content = json.loads(results_json(SCENES))
    content["results"]["b"][1][field] = value
    (finding,) = findings(json.dumps(content), tmp_path)
    assert (finding.severity, finding.count) == (severity, 1)
    assert told in finding.what
    assert finding.examples.startswith("b[1] ")
    assert is_refused(tmp_path) == (severity == "error")


def lose_a_sample(content: dict[str, Any]) -> None:
    del content["results"]["b"]


def add_a_sample(content: dict[str, Any]) -> None:
    content["results"]["d"] = []


def too_many(content: dict[str, Any]) -> None:
    content["results"]["b"] = content["results"]["b"] * 251


def no_list(content: dict[str, Any]) -> None:
    content["results"]["b"] = {}


def no_box(content: dict[str, Any]) -> None:
    content["results"]["b"][0] = 3


def lose_a_field(content: dict[str, Any]) -> None:
    del content["results"]["b"][0]["size"]


def no_meta(content: dict[str, Any]) -> None:
    del content["meta"]


def no_results(content: dict[str, Any]) -> None:
    del content["results"]


@pytest.mark.parametrize(
    ("spoil", "told", "example"),
    [
        (lose_a_sample, "a sample of the split is missing", "b"),
        (add_a_sample, "a sample is not in the split", "d"),
        (too_many, "more than 500 boxes", "b (502)"),
        (no_list, "no list of boxes", "b"),
        (no_box, "no object", "b[0] 3"),
        (lose_a_field, "size is not 3 numbers", "b[0] 'absent'"),
        (no_meta, "sensors", "use_camera, use_lidar"),
        (no_results, "expected {'meta'", "results.json"),
    ],
)
def test_a_faulty_form_is_told_and_refused(
    spoil: Callable[[dict[str, Any]], None], told: str, example: str, tmp_path: Path
) -> None:
    content = json.loads(results_json(SCENES))
    spoil(content)
    found = [f for f in findings(json.dumps(content), tmp_path) if f.severity == "error"]
    assert len(found) == 1
    assert told in found[0].what and example in found[0].examples
    assert is_refused(tmp_path)


def test_all_faults_are_listed_at_once_with_their_counts(tmp_path: Path) -> None:
    content = json.loads(results_json(SCENES))
    lose_a_sample(content)
    for row in content["results"]["a"]:
        row["detection_name"] = "lorry"
    content["results"]["c"][0]["detection_score"] = 2
    found = findings(json.dumps(content), tmp_path)
    assert [(f.severity, f.count) for f in found] == [("error", 1), ("error", 2), ("warning", 1)]


def test_a_token_given_twice_is_told(tmp_path: Path) -> None:
    content = results_json(SCENES).replace('"c": [', '"b": [')
    told = {finding.what: finding.examples for finding in findings(content, tmp_path)}
    assert told["a key occurs twice, of which only the last would count"] == "b"
    assert told["a sample of the split is missing"] == "c"


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "[" * 100_000, "\x00"])
def test_what_is_no_results_file_is_told_in_one_line(content: str, tmp_path: Path) -> None:
    (finding,) = findings(content, tmp_path)
    assert finding.severity == "error"
    assert is_refused(tmp_path)
    (absent,) = check_results(tmp_path / "absent.json", TOKENS)
    assert "cannot be read" in absent.what


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (*json.loads(results_json(SCENES))["results"]["a"][0], "num_pts")
PLACES = (("meta",), ("results",), ("results", "a"), ("results", "b", 0))


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    place=st.sampled_from(PLACES) | st.sampled_from(FIELDS).map(lambda field: ("results", "c", 1, field)),
    value=json_values,
)
def test_whatever_stands_in_the_file_the_check_and_the_reader_agree(
    place: tuple, value: Any, tmp_path: Path
) -> None:
    content = json.loads(results_json(SCENES))
    target = content
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    found = findings(json.dumps(content), tmp_path)
    assert any(finding.severity == "error" for finding in found) == is_refused(tmp_path), (found, value)
