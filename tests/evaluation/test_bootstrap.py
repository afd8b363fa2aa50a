from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from eval_cases import Scene, detections_of, random_scenes, samples_of, with_found

from distillbev.classes import CLASSES
from distillbev.errors import ConfigError, DataError
from distillbev.evaluation import bootstrap as bootstrap_module
from distillbev.evaluation.bootstrap import (
    bootstrap,
    paired_bootstrap,
    repeated_metrics,
    scene_indices,
    weighted_metrics,
)
from distillbev.evaluation.eval_boxes import detected_boxes, ground_truth_boxes
from distillbev.evaluation.metrics import DetectionEvalConfig, Matches, compute_metrics, match_boxes


def matched(scenes: list[Scene]) -> Matches:
    samples = samples_of(scenes)
    return match_boxes(
        ground_truth_boxes(samples), detected_boxes(detections_of(scenes), samples), DetectionEvalConfig()
    )


def world(seed: int, num_samples: int = 18, equal_scores: bool = False) -> list[Scene]:
    rng = np.random.default_rng(seed)
    scenes = random_scenes(rng, num_samples, 25, 6, samples_per_scene=3, shake=0.4)
    if equal_scores:
        for scene in scenes:
            for found in scene.found:
                found.score = round(found.score * 4) / 4
    return scenes


@pytest.mark.parametrize(("seed", "equal_scores"), [(0, False), (1, False), (2, True), (3, True)])
def test_weighing_scenes_equals_repeating_their_boxes(seed: int, equal_scores: bool) -> None:
    matches = matched(world(seed, 6 + 6 * seed, equal_scores))
    count = len(set(matches.scenes))
    rng = np.random.default_rng(seed)
    times = np.concatenate([np.zeros((1, count), dtype=np.int64), np.eye(count, dtype=np.int64)])
    times = np.concatenate([times, rng.integers(0, 5, (20, count))])
    ap, tp_errors = weighted_metrics(matches, times)
    for draw, row in enumerate(times):
        expected = repeated_metrics(matches, row)
        np.testing.assert_allclose(ap[draw], expected.ap, rtol=0, atol=1e-12)
        np.testing.assert_allclose(tp_errors[draw], expected.tp_errors, rtol=0, atol=1e-12)


def test_a_scene_drawn_twice_is_a_data_set_that_holds_it_twice() -> None:
    scenes = world(4)
    copies = [
        replace(s, token=f"{s.token}-again", scene=f"{s.scene}-again") for s in scenes if s.scene == "scene-1"
    ]
    doubled = compute_metrics(matched(scenes + copies))
    times = np.ones((1, 6), dtype=np.int64)
    times[0, 1] = 2
    ap, tp_errors = weighted_metrics(matched(scenes), times)
    np.testing.assert_allclose(ap[0], doubled.ap, rtol=0, atol=1e-12)
    np.testing.assert_allclose(tp_errors[0], doubled.tp_errors, rtol=0, atol=1e-12)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matches = matched(world(5))
    whole = bootstrap(matches, repeats=20)
    monkeypatch.setattr(bootstrap_module, "ENTRIES_PER_CHUNK", 50)
    np.testing.assert_array_equal(bootstrap(matches, repeats=20).nds.resampled, whole.nds.resampled)


def test_the_value_is_the_metric_and_lies_in_its_interval() -> None:
    matches = matched(world(6))
    metrics, result = compute_metrics(matches), bootstrap(matches, repeats=200)
    assert result.mean_ap.value == pytest.approx(metrics.mean_ap, abs=1e-12)
    assert result.nds.value == pytest.approx(metrics.nds, abs=1e-12)
    for name in CLASSES:
        assert result.class_ap[name].value == pytest.approx(metrics.class_ap[name], abs=1e-12)
    assert result.mean_ap.low < result.mean_ap.value < result.mean_ap.high


def test_the_same_seed_draws_the_same_and_another_seed_does_not() -> None:
    matches = matched(world(6))
    first, again, other = (bootstrap(matches, repeats=10, seed=s).mean_ap.resampled for s in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_pair_of_equals_differs_by_nothing() -> None:
    matches = matched(world(7))
    result = paired_bootstrap(matches, matches, repeats=20)
    assert (result.mean_ap.low, result.mean_ap.high, result.nds.low, result.nds.high) == (0, 0, 0, 0)


def test_pairing_shows_a_difference_that_two_intervals_hide() -> None:
    scenes = world(8, 36)
    # The weaker detector is a little off, in every scene alike.
    rng = np.random.default_rng(0)
    weaker = [
        with_found(
            s, [replace(f, box=f.box + np.array([*rng.normal(0, 0.2, 2), *[0.0] * 7])) for f in s.found]
        )
        for s in scenes
    ]
    strong, weak = matched(scenes), matched(weaker)
    alone, other = bootstrap(strong, repeats=300).mean_ap, bootstrap(weak, repeats=300).mean_ap
    assert other.high > alone.low  # the intervals overlap
    difference = paired_bootstrap(weak, strong, repeats=300).mean_ap
    assert difference.value == pytest.approx(alone.value - other.value, abs=1e-12)
    assert difference.low > 0
    assert difference.share_above_zero > 0.95


def test_sets_over_other_samples_or_other_truth_cannot_be_paired() -> None:
    scenes = world(9)
    whole = matched(scenes)
    with pytest.raises(DataError, match="differ in samples or settings"):
        paired_bootstrap(whole, matched(scenes[:-1]))
    fewer = [replace(s, truths=s.truths[1:]) for s in scenes]
    with pytest.raises(DataError, match="ground-truth boxes"):
        paired_bootstrap(whole, matched(fewer))


def test_one_scene_and_no_repeat_are_refused() -> None:
    matches = matched(world(10, 3))
    assert set(scene_indices(matches)) == {0}
    with pytest.raises(DataError, match="at least two"):
        bootstrap(matches)
    with pytest.raises(ConfigError, match="repeats=0"):
        bootstrap(matches, repeats=0)
