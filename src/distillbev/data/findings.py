"""What a check has found: kinds of faults, counted, with examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]
NUM_EXAMPLES = 3
LONGEST_EXAMPLE = 1000  # characters


@dataclass(frozen=True)
class Finding:
    """One kind of fault: an "error" stops or spoils training, a "warning" wants a look."""

    severity: Severity
    what: str
    count: int
    examples: str


class Findings:
    """Collects faults one by one."""

    def __init__(self) -> None:
        self._counts: dict[tuple[Severity, str], int] = {}
        self._examples: dict[tuple[Severity, str], list[str]] = {}

    @property
    def has_errors(self) -> bool:
        return any(severity == "error" for severity, _ in self._counts)

    def add(self, severity: Severity, what: str, where: str) -> None:
        where = where if where.isprintable() else ascii(where)  # a terminal obeys control characters
        where = where[:LONGEST_EXAMPLE]
        kind = (severity, what)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if self._counts[kind] <= NUM_EXAMPLES:
            self._examples.setdefault(kind, []).append(where)

    def listed(self) -> list[Finding]:
        """Errors first."""
        return [
            Finding(severity, what, count, ", ".join(self._examples[severity, what]))
            for (severity, what), count in sorted(self._counts.items())
        ]
