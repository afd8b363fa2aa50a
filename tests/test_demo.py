import json
from pathlib import Path

import pytest

from distillbev.demo import Arm, DemoPlan, choose_plan, run_demo
from distillbev.demo.arms import arm_experiment
from distillbev.demo.outcome import Spread
from distillbev.errors import ConfigError

PLAN = DemoPlan(
    labelled_scenes=2,
    unlabelled_scenes=2,
    held_out_scenes=2,
    key_frames_per_scene=1,
    teacher_steps=3,
    depth_steps=3,
    student_steps=3,
    arms=(Arm.TEACHER, Arm.ALONE, Arm.DISTILLED_UNLABELLED),
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo"
    run_demo(PLAN, out)
    return out


def test_a_small_demo_runs_the_whole_way_and_sums_up(demo: Path):
    summary = json.loads((demo / "summary.json").read_text())
    assert set(summary["arms"]) == {"teacher", "alone", "distilled_unlabelled"}
    for arm in summary["arms"].values():
        low, high = arm["mAP_interval"]
        assert 0 <= low <= high <= 1
        assert 0 <= arm["NDS"] <= 1
    assert (summary["labelled_frames"], summary["unlabelled_frames"], summary["held_out_frames"]) == (2, 2, 2)
    assert {"simulate", "depth", "teacher", "alone-seed0", "report"} <= set(summary["seconds"])


def test_the_page_is_one_file_with_table_curves_pictures_and_guidance(demo: Path):
    page = (demo / "report.html").read_text()
    for expected in ("Scores on the held-out scenes", "<svg", "data:image/jpeg", "What guided the student"):
        assert expected in page
    assert "http://" not in page and "https://" not in page  # nothing is fetched


def test_a_finished_demo_is_not_run_again(demo: Path):
    weights = demo / "runs" / "teacher" / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    run_demo(PLAN, demo)
    assert weights.stat().st_mtime_ns == before


def test_arms_differ_in_what_teaches_them_and_nothing_else(tmp_path: Path):
    students = [
        arm_experiment(arm, DemoPlan(), 0, tmp_path, tmp_path, tmp_path)
        for arm in Arm
        if arm is not Arm.TEACHER
    ]
    for name in ("student", "start_weights", "data", "seed", "evaluation", "cache", "log"):
        assert len({repr(getattr(experiment, name)) for experiment in students}) == 1, name
    for name in ("steps", "learning_rate", "schedule", "weight_decay", "ema_decay", "precision", "clip_norm"):
        assert len({repr(getattr(experiment.optim, name)) for experiment in students}) == 1, name
    per_step = {e.optim.labelled_per_step + e.optim.unlabelled_per_step for e in students}
    assert per_step == {students[0].optim.labelled_per_step}


def test_held_out_scenes_are_no_split_that_an_arm_trains_on(tmp_path: Path):
    plan = DemoPlan()
    for arm in Arm:
        experiment = arm_experiment(arm, plan, 0, tmp_path, tmp_path, tmp_path)
        assert plan.held_out_split not in (*experiment.labelled_splits, *experiment.unlabelled_splits)


def test_flags_that_exclude_one_another_are_refused():
    with pytest.raises(ConfigError, match="exclude one another"):
        choose_plan(quick=True, full=True, large=False, arms=None, seeds=None, first_seed=0)


def test_an_unknown_arm_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="alone_all_labels"):
        choose_plan(quick=False, full=False, large=False, arms="alone,clone", seeds=None, first_seed=0)


def test_a_spread_over_seeds_pairs_the_draws():
    import numpy as np

    spread = Spread.of([0.1, 0.3], [np.array([0.0, 0.2, 0.1]), np.array([0.4, 0.2, 0.3])])
    assert spread.mean == pytest.approx(0.2)
    assert spread.low == spread.high == pytest.approx(0.2)  # the two seeds' draws cancel, draw by draw
