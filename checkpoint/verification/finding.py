"""One thing that is wrong with a checkpoint, or worth knowing, and the report of all."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
Check = Literal[
    "open",
    "file",
    "coverage",
    "hash",
    "checksum",
    "finite",
    "replicas",
    "rounding",
    "steps",
    "groups",
    "shapes",
]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        severity: "error" is damage: it must not be loaded. "warning" may be right, "note" is right.
        check: that found it.
        what: in words, with numbers and places.
        tensor, state, file: that it is about.
        cause: the likeliest one.
        tensors: all that it is about, as "name (state)", where these are many.
    """

    severity: Severity
    check: Check
    what: str
    tensor: str | None = None
    state: str | None = None
    file: str | None = None
    cause: str | None = None
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        subject = f"{self.tensor} ({self.state})" if self.state is not None else self.tensor
        told = ": ".join(part for part in (subject, self.file, self.what) if part is not None)
        return told if self.cause is None else f"{told}. Likely cause: {self.cause}"


@dataclass
class Report:
    """What verification has found.

    Attributes:
        path, format, step: of the checkpoint.
        num_tensors, num_pieces, num_bytes: of the logical tensors.
        checks: check -> what was compared, in words, also where there was nothing to compare.
        findings: errors first.
        notes: what was recognised and chosen.
        left_out: what the files hold that was not looked at.
    """

    path: str
    format: str
    step: int = 0
    num_tensors: int = 0
    num_pieces: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    checks: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """What must not be loaded."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found that forbids to load."""
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        """JSON-able; numbers that are infinite are words."""
        tree = dataclasses.asdict(self)
        return {"sound": self.is_sound, **tree}


def number(value: float) -> str:
    """A number as people read it."""
    return f"{value:.6g}" if math.isfinite(value) else str(value)
