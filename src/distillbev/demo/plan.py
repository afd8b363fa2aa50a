"""What the demo does: worlds, sizes, arms."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

from ..config import Config
from ..errors import ConfigError


class Arm(StrEnum):
    """One way of training the same student (or the teacher itself); all share budget, order and seed."""

    TEACHER = "teacher"
    ALONE = "alone"
    ALONE_TEACHER_HEAD = "alone_teacher_head"
    DISTILLED = "distilled"
    TARGETS_UNLABELLED = "targets_unlabelled"
    DISTILLED_UNLABELLED = "distilled_unlabelled"
    ALONE_ALL_LABELS = "alone_all_labels"

    @property
    def meaning(self) -> str:
        return MEANINGS[self]


MEANINGS = {
    Arm.TEACHER: "the LiDAR detector, trained on the labelled frames",
    Arm.ALONE: "camera student, labelled frames only",
    Arm.ALONE_TEACHER_HEAD: "the same, its head started from the teacher's",
    Arm.DISTILLED: "teacher's head, and imitates the teacher's features and answers on the labelled frames",
    Arm.TARGETS_UNLABELLED: "teacher's head, and the teacher's detections as targets on the unlabelled frames",
    Arm.DISTILLED_UNLABELLED: "the same targets, and imitates features and answers on all frames",
    Arm.ALONE_ALL_LABELS: "camera student with labels on every frame: what drawing all boxes would give",
}

DEFAULT_ARMS = tuple(arm for arm in Arm if arm is not Arm.ALONE_TEACHER_HEAD)


class DemoPlan(Config, frozen=True):
    """Sizes of the demo. `teacher_steps` and `student_steps` are optimizer steps; frames are scenes x key frames."""

    size: Literal["tiny", "large"] = "tiny"
    labelled_scenes: int = 16
    unlabelled_scenes: int = 64
    held_out_scenes: int = 25
    key_frames_per_scene: int = 4
    teacher_steps: int = 800
    depth_steps: int = 1000
    student_steps: int = 1000
    arms: tuple[Arm, ...] = DEFAULT_ARMS
    seeds: tuple[int, ...] = (0,)
    held_out_split: str = "held_out"
    world_seed: int = 0

    def __post_init__(self) -> None:
        if Arm.TEACHER not in self.arms:
            raise ConfigError("the demo needs its teacher; keep `teacher` among the arms")
        if not self.seeds or min(self.seeds) < 0:
            raise ConfigError(f"seeds={list(self.seeds)}; the demo needs at least one, and none below 0")


def choose_plan(
    quick: bool, full: bool, large: bool, arms: str | None, seeds: int | None, first_seed: int
) -> DemoPlan:
    """The plan that the command line's flags ask for.

    Raises:
        ConfigError: flags that exclude one another, or an arm that does not exist.
    """
    if quick + full + large > 1:
        given = [f"--{name}" for name, on in (("quick", quick), ("full", full), ("large", large)) if on]
        raise ConfigError(f"{' and '.join(given)} exclude one another; give at most one")
    plan = DemoPlan()
    if quick:
        plan = msgspec.structs.replace(
            plan,
            labelled_scenes=8,
            unlabelled_scenes=16,
            held_out_scenes=10,
            teacher_steps=200,
            depth_steps=250,
            student_steps=250,
        )
    if full:
        plan = msgspec.structs.replace(plan, held_out_scenes=75, arms=tuple(Arm), seeds=(0, 1, 2))
    if large:
        plan = msgspec.structs.replace(
            plan,
            size="large",
            labelled_scenes=60,
            unlabelled_scenes=240,
            held_out_scenes=50,
            teacher_steps=3000,
            depth_steps=3000,
            student_steps=4000,
        )
    if arms is not None:
        names = [name.strip() for name in arms.split(",") if name.strip()]
        unknown = [name for name in names if name not in list(Arm)]
        if unknown:
            raise ConfigError(f"--arms names {', '.join(unknown)}; choose from {', '.join(Arm)}")
        chosen = {Arm.TEACHER, *map(Arm, names)}
        plan = msgspec.structs.replace(plan, arms=tuple(arm for arm in Arm if arm in chosen))
    count = seeds if seeds is not None else len(plan.seeds)
    return msgspec.structs.replace(plan, seeds=tuple(range(first_seed, first_seed + count)))
