from __future__ import annotations

import numpy as np
import pytest
from eval_cases import (
    Found,
    Scene,
    Truth,
    box,
    detections_of,
    flat_poses,
    random_scenes,
    samples_of,
    with_found,
)

from distillbev.classes import CLASSES
from distillbev.evaluation.compare import Comparison, Group, compare, operating_score
from distillbev.evaluation.eval_boxes import detected_boxes, ground_truth_boxes
from distillbev.evaluation.metrics import (
    DetectionEvalConfig,
    compute_metrics,
    evaluate,
    gather_matches,
    pair_boxes,
)


def compared(scenes: list[Scene], others: list[Scene], repeats: int = 20) -> Comparison:
    """The detections of `scenes` and those of `others`, against the truth of the former."""
    samples = samples_of(scenes)
    first, second = (detected_boxes(detections_of(found), samples) for found in (scenes, others))
    return compare(ground_truth_boxes(samples), first, second, repeats=repeats)


def world(seed: int = 0, shake: float = 0.4) -> list[Scene]:
    """Two detectors of the same seed see the same world."""
    return random_scenes(np.random.default_rng(seed), 8, 25, 6, shake=shake, samples_per_scene=2)


def worse(scenes: list[Scene]) -> list[Scene]:
    """Every second detection is lost."""
    return [with_found(scene, scene.found[::2]) for scene in scenes]


def group(comparison: Comparison, aspect: str, name: str) -> Group:
    (found,) = [g for g in comparison.groups if (g.aspect, g.name) == (aspect, name)]
    return found


def test_each_side_has_the_metrics_of_its_own_evaluation_and_differences_lie_in_their_intervals() -> None:
    scenes, others = world(), worse(world())
    samples = samples_of(scenes)
    comparison = compared(scenes, others, repeats=200)
    for side, found in ((comparison.first, scenes), (comparison.second, others)):
        alone = evaluate(ground_truth_boxes(samples), detected_boxes(detections_of(found), samples))
        np.testing.assert_array_equal(side.metrics.ap, alone.ap)
        np.testing.assert_array_equal(side.metrics.tp_errors, alone.tp_errors)
    for difference in (comparison.headline["mAP"], comparison.class_ap["car"]):
        assert difference.interval is not None
        assert difference.value == pytest.approx(difference.interval.value, abs=1e-12)
        assert difference.interval.low <= difference.value <= difference.interval.high
    assert comparison.headline["mAP"].value < 0


def test_sides_exchanged_give_the_opposite() -> None:
    scenes, others = world(), worse(world())
    there, back = compared(scenes, others), compared(others, scenes)
    assert there.headline["NDS"].value == -back.headline["NDS"].value
    for one, other in zip(there.groups, back.groups, strict=True):
        assert one.found.value == -other.found.value
        assert one.found.interval is not None and other.found.interval is not None
        assert one.found.interval.low == pytest.approx(-other.found.interval.high, abs=1e-12)
    assert [f.value for f in there.frames] == [-f.value for f in back.frames]


def test_equals_do_not_differ_in_anything() -> None:
    comparison = compared(world(), world())
    assert comparison.most_different_frames(5) == []
    assert all(
        g.found.value == 0 and g.found.interval.low == 0 for g in comparison.groups if g.found.interval
    )


def test_groups_of_each_aspect_hold_every_box_once() -> None:
    comparison = compared(world(), worse(world()))
    counted = len(comparison.first.paired.truth)
    for aspect in ("distance", "size", "visibility"):
        assert sum(g.num_boxes for g in comparison.groups if g.aspect == aspect) == counted


def test_a_part_that_holds_everything_is_the_whole() -> None:
    samples = samples_of(world())
    paired = pair_boxes(
        ground_truth_boxes(samples), detected_boxes(detections_of(world()), samples), DetectionEvalConfig()
    )
    everything = (np.ones(len(paired.truth), dtype=bool), np.ones(len(paired.detections), dtype=bool))
    whole = compute_metrics(gather_matches(paired))
    for d, threshold in enumerate(paired.config.dist_ths_m):
        part = compute_metrics(gather_matches(paired.part(threshold, *everything)))
        np.testing.assert_array_equal(part.ap[:, 0], whole.ap[:, d])


def car(x: float) -> Truth:
    return Truth(box(x), "vehicle.car", "vehicle.parked")


def test_near_boxes_that_are_found_and_far_ones_that_are_not_are_told_apart() -> None:
    scene = Scene("a", *flat_poses(), [car(5.0), car(25.0)], [Found(box(5.0), "car", 0.9)])
    comparison = compared([scene], [with_found(scene, [Found(box(25.0), "car", 0.9)])])
    near, far = group(comparison, "distance", "0 to 10 m"), group(comparison, "distance", "20 to 30 m")
    assert near.mean_ap is not None and far.mean_ap is not None
    assert (near.found.first, near.found.second) == (1, 0)
    assert (near.mean_ap.first, near.mean_ap.second) == (pytest.approx(1), 0)
    assert (far.mean_ap.first, far.mean_ap.second) == (0, pytest.approx(1))


def test_a_detection_just_beyond_the_edge_of_its_box_s_group_is_no_false_one_there() -> None:
    truths = [car(9.75), car(15.0)]
    found = [Found(box(10.25), "car", 0.9), Found(box(15.0), "car", 0.5)]
    scene = Scene("a", *flat_poses(), truths, found)
    middle = group(compared([scene], [scene]), "distance", "10 to 20 m")
    # At 0.5 m the first detection takes no box. There, and only there, it is a false one before the true one:
    # precision rises to 1/2, AP is 0.2.
    assert middle.mean_ap is not None
    assert middle.mean_ap.first == pytest.approx((3 + 0.2) / 4)


def test_false_detections_count_in_the_group_of_their_own_size() -> None:
    truths = [car(10.0), Truth(box(20.0, length=8.0), "vehicle.truck")]
    right = [Found(box(10.0), "car", 0.5), Found(box(20.0, length=8.0), "truck", 0.5)]
    false = Found(box(15.0, length=8.0), "truck", 0.9)
    scene = Scene("a", *flat_poses(), truths, right)
    comparison = compared([scene], [with_found(scene, [*right, false])])
    middle, large = group(comparison, "size", "3 to 6 m"), group(comparison, "size", "over 6 m")
    assert middle.mean_ap is not None and large.mean_ap is not None
    assert middle.mean_ap.value == 0 and large.mean_ap.value < -0.3


def test_boxes_are_grouped_by_their_visibility() -> None:
    scene = Scene("a", *flat_poses(), [car(10.0), car(20.0)], [Found(box(10.0), "car", 0.5)])
    samples = samples_of([scene])
    assert samples[0].annotations is not None
    samples[0].annotations.visibility[:] = [4, 1]
    boxes = detected_boxes(detections_of([scene]), samples)
    comparison = compare(ground_truth_boxes(samples), boxes, boxes)
    seen, hidden = group(comparison, "visibility", "over 80 %"), group(comparison, "visibility", "up to 40 %")
    assert (seen.num_boxes, seen.found.first, hidden.found.first) == (1, 1, 0)
    assert seen.mean_ap is None  # a false detection has no visibility


def test_the_operating_score_has_the_best_f1_and_takes_equal_scores_together() -> None:
    truths = [car(10.0), car(20.0), car(30.0)]
    found = [Found(box(10.0), "car", 0.9), Found(box(20.0), "car", 0.5), Found(box(40.0), "car", 0.5)]
    found += [Found(box(x), "car", 0.1) for x in (-10.0, -20.0, -30.0)]
    scene = Scene("a", *flat_poses(), truths, found)

    def score_of(scene: Scene) -> float:
        samples = samples_of([scene])
        boxes = detected_boxes(detections_of([scene]), samples)
        return operating_score(pair_boxes(ground_truth_boxes(samples), boxes, DetectionEvalConfig()))

    assert score_of(scene) == 0.5  # F1 is 2/4 from 0.9 on, 4/6 from 0.5 on, 4/9 with all
    assert score_of(with_found(scene, found[3:])) == np.inf


def test_frames_are_ranked_by_the_difference_in_mistakes() -> None:
    def scene(token: str, *found: float) -> Scene:
        boxes = [Found(box(x), "car", 0.5) for x in found]
        return Scene(token, *flat_poses(), [car(10.0), car(20.0)], boxes, token)

    first = [scene("a", 10.0, 20.0), scene("b", 10.0), scene("c", 10.0, 20.0)]
    second = [scene("a", 10.0, 20.0), scene("b", 10.0, 20.0), scene("c", 10.0, 30.0, 40.0)]
    comparison = compared(first, second)
    assert [(f.first_mistakes, f.second_mistakes) for f in comparison.frames] == [(0, 0), (1, 0), (0, 3)]
    assert [f.token for f in comparison.most_different_frames(5)] == ["c", "b"]
    assert len(comparison.most_different_frames(1)) == 1


def test_one_scene_and_nothing_found_are_compared_without_intervals() -> None:
    scene = Scene("a", *flat_poses(), [car(10.0)], [])
    comparison = compared([scene], [scene])
    assert comparison.headline["NDS"].interval is None and comparison.groups[0].found.interval is None
    assert comparison.first.operating_score == np.inf
    nothing = Scene("a", *flat_poses(), [], [])
    assert compared([nothing], [nothing]).groups == ()
    assert set(comparison.class_ap) == set(CLASSES)
