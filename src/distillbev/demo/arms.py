"""From a plan to experiments: every arm is the same student, changed in what teaches it and nothing else."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from ..distill.settings import DistillConfig
from ..recipes import (
    depth_first,
    large_bevdet,
    large_centerpoint,
    tiny_bevdet,
    tiny_centerpoint,
    tiny_distillation,
)
from ..train.experiment import Experiment
from ..train.loop import WEIGHTS_FILE
from .plan import Arm, DemoPlan

LABELLED, UNLABELLED = "labelled", "unlabelled"


def base_experiments(plan: DemoPlan) -> tuple[Experiment, Experiment]:
    """Teacher and student alone, at the plan's size."""
    if plan.size == "large":
        return large_centerpoint(), large_bevdet()
    return tiny_centerpoint(), tiny_bevdet()


def depth_experiment(plan: DemoPlan, world: Path) -> Experiment:
    """Where all students start from: depth learned on every recorded frame, which needs no labels."""
    base = depth_first(base_experiments(plan)[1], (LABELLED, UNLABELLED))
    optim = replace(base.optim, steps=plan.depth_steps)
    return replace(base, name="depth", data_root=str(world), optim=optim, seed=plan.seeds[0])


def arm_experiment(
    arm: Arm, plan: DemoPlan, seed: int, world: Path, teacher_run: Path, depth_run: Path
) -> Experiment:
    """The experiment of one arm and seed.

    The teacher and the common start are trained once, with the plan's first seed, for the students of all seeds.
    """
    teacher, student = base_experiments(plan)
    steps = plan.teacher_steps if arm is Arm.TEACHER else plan.student_steps
    base = teacher if arm is Arm.TEACHER else student
    base = replace(
        base,
        name=str(arm),
        data_root=str(world),
        labelled_splits=(LABELLED,),
        optim=replace(base.optim, steps=steps),
        seed=seed,
    )
    if arm is Arm.TEACHER:
        return base
    alone = replace(base, start_weights=str(depth_run / WEIGHTS_FILE))
    if arm is Arm.ALONE:
        return alone
    if arm is Arm.ALONE_ALL_LABELS:
        return replace(alone, labelled_splits=(LABELLED, UNLABELLED))

    with_head = replace(
        alone,
        teacher=teacher.teacher,
        teacher_weights=str(teacher_run / WEIGHTS_FILE),
        inherit_head=True,
    )
    distill = demo_distillation(plan)
    if arm is Arm.ALONE_TEACHER_HEAD:
        return with_head
    if arm is Arm.DISTILLED:
        return replace(with_head, distill=distill)
    if arm is Arm.TARGETS_UNLABELLED:
        distill = DistillConfig(pseudo_labels=distill.pseudo_labels, cache=distill.cache)
    half = with_head.optim.labelled_per_step // 2
    return replace(
        with_head,
        distill=distill,
        unlabelled_splits=(UNLABELLED,),
        optim=replace(with_head.optim, labelled_per_step=half, unlabelled_per_step=half),
    )


def demo_distillation(plan: DemoPlan) -> DistillConfig:
    """The recipe's imitation; with BEV augmentation, as at the large size, the teacher looks anew each time."""
    distill = tiny_distillation()
    return replace(distill, cache=None) if plan.size == "large" else distill
