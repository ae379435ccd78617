"""Where a schedule begins. It is the only state of a learning rate, and lies in the checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Anchor:
    """The first step that a schedule governs, and the learning rate that it starts from."""

    step: int = 0
    lr: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """What the checkpoint keeps."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Anchor:
        """Read back what `to_json` wrote."""
        return cls(step=int(value["step"]), lr=float(value["lr"]))
