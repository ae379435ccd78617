"""What a mixture controller sees, and what it is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Call:
    """One earlier call: the steps done before it, and the weights that came of it, which sum to 1."""

    step: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Mean held-out losses in nats after `step` steps, by validation set, each over all of it."""

    step: int
    losses: Mapping[str, float]


@dataclass(frozen=True)
class History:
    """All that a controller may base its weights on: the same on every layout, as far as losses are.

    Attributes:
        step: optimizer steps done, counted through the whole run.
        first_step: those that were done before the stage began.
        last_step: those that are done when it ends.
        weights: in force, by source; they sum to 1.
        calls: the earlier calls in this stage, oldest first.
        losses: mean training loss in nats since the last call, of every source that had tokens since then.
        tokens: that each of these means is over.
        evaluations: in this stage, oldest first.
    """

    step: int
    first_step: int
    last_step: int
    weights: Mapping[str, float]
    calls: Sequence[Call] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, float] = field(default_factory=dict)
    evaluations: Sequence[Evaluation] = ()

    def held_out(self, name: str) -> float | None:
        """The newest loss of a validation set; None where it has not been evaluated in this stage."""
        return next((one.losses[name] for one in reversed(self.evaluations) if name in one.losses), None)


class MixtureController(Protocol):
    """Decides the weights. Deterministic: what it answers depends on the history and its own state alone."""

    def weights(self, history: History) -> Mapping[str, float]:
        """The relative weight of every source from `history.step` on.

        Called on the first rank only, before the first step of a stage and then at its borders.

        Raises:
            KeepWeightsError: it has no answer this time.
        """

    def state(self) -> dict[str, Any]:
        """What it has to be opened with to go on as if nothing had happened: JSON."""


class KeepWeightsError(Exception):
    """A controller has no answer: the weights stay as they are, and the message says why."""


def as_json(state: object) -> dict[str, Any]:
    """`state` as it comes back from a checkpoint.

    Raises:
        ValueError: it is no dictionary, or holds what JSON does not have.
    """
    if not isinstance(state, dict):
        raise ValueError(f"state() is to return a dictionary, found {type(state).__name__}")
    try:
        found: dict[str, Any] = json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"state() is to return what JSON can hold: {error}") from None
    return found
