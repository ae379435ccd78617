"""The hooks of a run: made before a checkpoint is loaded, begun after it, saved with the run.

With all of them off a run is the same, bit for bit, as one that knows of none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from parallel.engine import Engine
from trainer.config import RunConfig
from trainer.data.stream import TokenStream
from trainer.model.architecture import Architecture
from trainer.start import Start


@dataclass(frozen=True)
class Beginning:
    """What there is when the hooks begin: the weights are in place, and no step has been made.

    Attributes:
        origin: the checkpoint that weights came from; None for a run that starts from nothing.
        new_stage: the run begins a stage here, rather than goes on in its middle.
    """

    config: RunConfig
    model: Architecture
    engine: Engine
    stream: TokenStream
    start: Start
    origin: Path | None

    @property
    def new_stage(self) -> bool:
        return not self.start.resumed


class Hook(Protocol):
    """One part that changes a run."""

    def begin(self, beginning: Beginning, state: Mapping[str, Any] | None) -> list[str]:
        """Take up the work. Every rank calls it.

        Args:
            state: what `state` returned when the checkpoint was saved; None where it has none.

        Returns:
            Sentences about what was done, for whoever watches the run.
        """

    def state(self) -> dict[str, Any]:
        """What is not a tensor: JSON, the same on every rank."""


@dataclass
class Hooks:
    """All hooks of a run that are on, by the name under which a checkpoint keeps them."""

    by_name: dict[str, Hook] = field(default_factory=dict)

    def begin(self, beginning: Beginning) -> list[str]:
        """`Hook.begin` of all, in the order in which they were made."""
        saved = beginning.start.hooks
        return [
            note for name, hook in self.by_name.items() for note in hook.begin(beginning, saved.get(name))
        ]

    def state(self) -> dict[str, Any]:
        """`Hook.state` by name."""
        return {name: hook.state() for name, hook in self.by_name.items()}
