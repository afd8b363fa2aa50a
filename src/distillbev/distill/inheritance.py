"""Start a student's detection head from its teacher's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ConfigError
from ..models.center_head import CenterHead


@dataclass(frozen=True)
class InheritanceReport:
    """Names of the head's entries that were copied, and why others were not."""

    copied: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        left = "; ".join(f"{name}: {reason}" for name, reason in self.left.items()) or "nothing"
        return f"head: {len(self.copied)} entries copied from the teacher, left as they were: {left}"


@torch.no_grad()
def inherit_head(
    student: nn.Module, teacher: nn.Module, *, may_differ: tuple[str, ...] = ("shared",), strict: bool = True
) -> InheritanceReport:
    """Copies the teacher's detection head into the student's, part by part.

    Args:
        student, teacher: detectors with a `head`, or two heads.
        may_differ: parts of the head (their first name) that stay whole as they are when any of their entries
            differs in shape: the shared convolution, whose input channels are each network's own.
        strict: an entry elsewhere that differs or is missing raises; otherwise it is left and reported.

    Raises:
        ConfigError: nothing matches, or, when strict, an entry or the classes of the heads do not. The student
            is then as it was.
    """
    student_head, teacher_head = (getattr(module, "head", module) for module in (student, teacher))
    mine, theirs = student_head.state_dict(), teacher_head.state_dict()

    my_tasks, their_tasks = (_tasks_of(head) for head in (student_head, teacher_head))
    if strict and my_tasks != their_tasks:
        raise ConfigError(
            f"the student's head has the tasks {my_tasks}, the teacher's {their_tasks}; a branch would start "
            "from another class's weights: give both the same tasks, or pass strict=False"
        )
    reasons = {}
    for name, tensor in mine.items():
        if name not in theirs:
            reasons[name] = "the teacher has no such entry"
        elif theirs[name].shape != tensor.shape:
            reasons[name] = f"shape {tuple(tensor.shape)}, the teacher's {tuple(theirs[name].shape)}"
    excused = {part for part in may_differ if any(name.startswith(part) for name in reasons)}
    left = dict(reasons)
    for name in mine:
        part = next((part for part in excused if name.startswith(part)), None)
        if part is not None:
            left.setdefault(name, f"belongs to {part}, which differs")
        elif strict and name in reasons:
            raise ConfigError(
                f"head entry {name!r} cannot be inherited: {reasons[name]}; "
                "give both heads the same tasks and widths, or pass strict=False"
            )
    copied = tuple(name for name in mine if name not in left)
    if not copied:
        raise ConfigError("nothing of the teacher's head fits the student's; switch inherit_head off")
    for name in copied:
        mine[name].copy_(theirs[name])
    return InheritanceReport(copied, left)


def _tasks_of(head: nn.Module) -> object:
    """The classes of a centre head by task; None for other heads, of which only shapes can be compared."""
    return head.config.tasks if isinstance(head, CenterHead) else None
