"""Start a student's detection head from its teacher's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ConfigError


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
        ConfigError: nothing matches, or, when strict, an entry does not.
    """
    student_head, teacher_head = (getattr(module, "head", module) for module in (student, teacher))
    mine, theirs = student_head.state_dict(), teacher_head.state_dict()

    reasons = {}
    for name, tensor in mine.items():
        if name not in theirs:
            reasons[name] = "the teacher has no such entry"
        elif theirs[name].shape != tensor.shape:
            reasons[name] = f"shape {tuple(tensor.shape)}, the teacher's {tuple(theirs[name].shape)}"
    excused = {part for part in may_differ if any(name.startswith(part) for name in reasons)}
    left, copied = {}, []
    for name, tensor in mine.items():
        excuse = next((part for part in excused if name.startswith(part)), None)
        if excuse is not None:
            left[name] = reasons.get(name, f"belongs to {excuse}, which differs")
        elif name in reasons:
            if strict:
                raise ConfigError(
                    f"head entry {name!r} cannot be inherited: {reasons[name]}; "
                    "give both heads the same tasks and widths, or pass strict=False"
                )
            left[name] = reasons[name]
        else:
            tensor.copy_(theirs[name])
            copied.append(name)
    if not copied:
        raise ConfigError("nothing of the teacher's head fits the student's; switch inherit_head off")
    return InheritanceReport(tuple(copied), left)
