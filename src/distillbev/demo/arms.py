"""From a plan to experiments: every arm is the same student, changed in what teaches it and nothing else."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from ..distill.settings import DistillConfig
from ..recipes import tiny_bevdet, tiny_bevdet_depth, tiny_bevdet_from_centerpoint, tiny_centerpoint
from ..train.experiment import Experiment
from ..train.loop import WEIGHTS_FILE
from .plan import Arm, DemoPlan

LABELLED, UNLABELLED = "labelled", "unlabelled"


def depth_experiment(plan: DemoPlan, world: Path) -> Experiment:
    """Where all students start from: depth learned on every recorded frame, which needs no labels."""
    base = tiny_bevdet_depth()
    return replace(
        base,
        name="depth",
        data_root=str(world),
        unlabelled_splits=(LABELLED, UNLABELLED),
        optim=replace(base.optim, steps=plan.depth_steps),
        seed=plan.seeds[0],
    )


def arm_experiment(
    arm: Arm, plan: DemoPlan, seed: int, world: Path, teacher_run: Path, depth_run: Path
) -> Experiment:
    """The experiment of one arm and seed.

    The teacher and the common start are trained once, with the plan's first seed, for the students of all seeds.
    """
    if arm is Arm.TEACHER:
        base = tiny_centerpoint()
        return replace(
            base,
            name=str(arm),
            data_root=str(world),
            labelled_splits=(LABELLED,),
            optim=replace(base.optim, steps=plan.teacher_steps),
            seed=seed,
        )
    alone = replace(
        tiny_bevdet(),
        name=str(arm),
        data_root=str(world),
        labelled_splits=(LABELLED,),
        start_weights=str(depth_run / WEIGHTS_FILE),
        optim=replace(tiny_bevdet().optim, steps=plan.student_steps),
        seed=seed,
    )
    if arm is Arm.ALONE:
        return alone
    if arm is Arm.ALONE_ALL_LABELS:
        return replace(alone, labelled_splits=(LABELLED, UNLABELLED))

    taught = tiny_bevdet_from_centerpoint()
    assert taught.distill is not None
    with_head = replace(
        alone,
        teacher=taught.teacher,
        teacher_weights=str(teacher_run / WEIGHTS_FILE),
        inherit_head=True,
    )
    if arm is Arm.ALONE_TEACHER_HEAD:
        return with_head
    if arm is Arm.DISTILLED:
        return replace(with_head, distill=taught.distill)
    targets_only = DistillConfig(pseudo_labels=taught.distill.pseudo_labels, cache=taught.distill.cache)
    return replace(
        with_head,
        distill=targets_only if arm is Arm.TARGETS_UNLABELLED else taught.distill,
        unlabelled_splits=(UNLABELLED,),
        optim=replace(
            with_head.optim,
            labelled_per_step=with_head.optim.labelled_per_step // 2,
            unlabelled_per_step=with_head.optim.labelled_per_step // 2,
        ),
    )
