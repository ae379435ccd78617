"""Velocitune: what learns slowly gets more weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from trainer.controllers.protocol import History, KeepWeightsError
from trainer.controllers.shares import exponentiated

SMALLEST_DISTANCE = 1e-3
"""A source that began nearer to its target than so many nats has nothing left to learn: V = 0."""


class Velocitune:
    """w_i <- w_i exp(eta V_i), normalised, with V_i = (l_t,i - target_i) / (l_0,i - target_i).

    V is the fraction of the way to the target that a source has still to go: 1 at the start, 0 at the target,
    negative beyond it. l_0 is the first loss that is seen in the stage. From Velocitune (Luo et al. 2024,
    arXiv 2411.14318), where the update is that of Group DRO and eta is 1.
    """

    def __init__(
        self,
        targets: Mapping[str, float],
        sets: Mapping[str, str],
        *,
        eta: float,
        loss: Literal["validation", "training"],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the targets in nats, by source; those without one keep their weight up to normalisation.

        Args:
            sets: by source, the validation set of its held-out loss.
            state: what `state` returned.
        """
        self._targets, self._sets, self._eta, self._loss = targets, sets, eta, loss
        self._first: dict[str, float] = dict(state["first"]) if state else {}
        self._newest: dict[str, float] = dict(state["newest"]) if state else {}

    def weights(self, history: History) -> dict[str, float]:
        """As `MixtureController.weights`."""
        for name in self._targets:
            loss = self._loss_of(name, history)
            if loss is not None:
                self._first.setdefault(name, loss)
                self._newest[name] = loss
        if not self._first:
            raise KeepWeightsError("no source has a loss yet")
        return exponentiated(history.weights, {n: self._eta * v for n, v in self.velocities().items()})

    def velocities(self) -> dict[str, float]:
        """V by source, of every source that a loss has been seen of."""
        found = {}
        for name, first in self._first.items():
            way = first - self._targets[name]
            left = self._newest[name] - self._targets[name]
            found[name] = left / way if way >= SMALLEST_DISTANCE else 0.0
        return found

    def state(self) -> dict[str, Any]:
        """First and newest losses, by source."""
        return {"first": dict(self._first), "newest": dict(self._newest)}

    def _loss_of(self, name: str, history: History) -> float | None:
        if self._loss == "training":
            return history.losses.get(name)
        return history.held_out(self._sets[name])
