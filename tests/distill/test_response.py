import math

import pytest
import torch

from distillbev.distill.response import ResponseConfig, box_response, heatmap_response, response_terms
from distillbev.distill.settings import DistillConfig
from distillbev.distill.teacher import heads_per_second
from distillbev.errors import ConfigError
from distillbev.models.outputs import DetectorOutput

WIDTHS = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2, "heatmap": 2}


def heads(seed: int, size: int = 6, samples: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(samples, width, size, size, generator=generator) for name, width in WIDTHS.items()}
        for _ in range(2)
    ]


def test_a_student_that_says_what_the_teacher_says_has_no_response_loss():
    terms = response_terms(heads(0), heads(0), ResponseConfig())
    assert {name: term.tolist() for name, term in terms.items()} == {"heatmap": [0, 0], "boxes": [0, 0]}


def test_heatmap_response_of_one_cell_is_the_focal_cross_entropy_by_hand():
    p, q = 0.3, 0.9
    logits = torch.full((1, 1, 1, 1), math.log(p / (1 - p)))
    expected = (p - q) ** 2 * -(q * math.log(p) + (1 - q) * math.log(1 - p))  # mass is at least one
    assert heatmap_response(logits, torch.full((1, 1, 1, 1), q)).item() == pytest.approx(expected, rel=1e-5)


def test_boxes_are_compared_only_where_the_teacher_sees_an_object():
    student, teacher = heads(1), heads(2)
    for task in teacher:
        task["heatmap"][:] = -9.0
        task["heatmap"][0, 1, 2, 3] = 2.0
    moved = [dict(task) for task in student]
    for task in moved:
        task["reg"] = task["reg"].clone()
        task["reg"][:, :, 0, 0] += 5.0  # far from the object
    before, after = (box_response(ours, teacher, 0.1) for ours in (student, moved))
    assert torch.equal(before, after)
    assert before[0] > 0 and before[1] == 0
    for task in moved:
        task["reg"][:, :, 2, 3] = teacher[0]["reg"][:, :, 2, 3] + 10.0
    assert box_response(moved, teacher, 0.1)[0] > before[0]


def test_a_student_of_displacements_that_moves_as_the_teacher_says_has_no_box_response():
    teacher = heads(5)
    gaps_s = torch.tensor([0.5, 1 / 12])
    student = [{**maps, "vel": maps["vel"] * gaps_s[:, None, None, None]} for maps in teacher]
    config = ResponseConfig(heatmap=None)
    assert response_terms(student, teacher, config, gaps_s)["boxes"].tolist() == [0, 0]
    assert (response_terms(student, teacher, config)["boxes"] > 0).all()


def test_a_teacher_of_displacements_is_asked_for_metres_per_second():
    maps, gaps_s = heads(6), torch.tensor([0.5, 0.25])
    answer = heads_per_second(DetectorOutput(bev={}, heads=maps, displacement_s=gaps_s))
    assert torch.equal(answer[1]["vel"][1], 4 * maps[1]["vel"][1])
    assert torch.equal(answer[0]["reg"], maps[0]["reg"])
    assert heads_per_second(DetectorOutput(bev={}, heads=maps))[0] is maps[0]


def test_velocities_of_no_weight_are_not_imitated():
    student, teacher = heads(7), heads(8)
    other = [{**maps, "vel": maps["vel"] + 3.0} for maps in student]
    without = [box_response(ours, teacher, 0.1, velocity=0.0) for ours in (student, other)]
    assert torch.equal(*without)
    assert (box_response(other, teacher, 0.1) > without[0]).all()


def test_gradients_pull_the_student_towards_the_teacher_and_leave_the_teacher_alone():
    student, teacher = heads(3), heads(4)
    for task in student:
        for maps in task.values():
            maps.requires_grad_()
    first = sum(term.sum() for term in response_terms(student, teacher, ResponseConfig()).values())
    first.backward()
    with torch.no_grad():
        for task in student:
            for maps in task.values():
                assert maps.grad is not None and maps.grad.isfinite().all()
                maps -= 0.1 * maps.grad
    second = sum(term.sum() for term in response_terms(student, teacher, ResponseConfig()).values())
    assert second < first


def test_heads_on_different_grids_are_refused():
    with pytest.raises(ConfigError, match="same tasks and grid"):
        response_terms(heads(0), heads(0, size=4), ResponseConfig())


def test_a_response_needs_a_term_of_positive_weight():
    with pytest.raises(ConfigError, match="without terms"):
        ResponseConfig(heatmap=None, boxes=None)
    with pytest.raises(ConfigError, match="positive"):
        ResponseConfig(heatmap=0.0)


def test_imitation_fades_from_all_to_nothing():
    config = DistillConfig(fade_steps=100)
    assert [round(config.fade(step), 6) for step in (0, 50, 100, 500)] == [1.0, 0.5, 0.0, 0.0]
    assert DistillConfig().fade(50) == 1.0
    assert config.has_schedule
