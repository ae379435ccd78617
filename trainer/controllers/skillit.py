"""Skill-it: sources that lower the losses which are still high get more weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainer.controllers.protocol import History, KeepWeightsError


class SkillIt:
    """p_i ~ exp(eta_t x sum over the last w calls, sum over j, of A_ij L_j), with eta_t = eta x eta_decay^t.

    A_ij is how much training on source i lowers the loss L_j, relatively; see `trainer.controllers.graph`.
    The weights do not depend on those before, so a stage begins with p of its first losses. From Skill-it
    (Chen et al. 2023, arXiv 2307.14430, algorithm 1).
    """

    def __init__(
        self,
        graph: Mapping[str, Mapping[str, float]],
        sets: Mapping[str, str],
        *,
        eta: float,
        eta_decay: float,
        window: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the graph A.

        Args:
            graph: rows are sources; sources without a row are frozen.
            sets: by column of the graph, the validation set of its loss.
            state: what `state` returned.
        """
        self._graph, self._sets = graph, sets
        self._eta, self._eta_decay, self._window = eta, eta_decay, window
        self._round: int = state["round"] if state else 0
        self._losses: list[dict[str, float]] = [*state["losses"]] if state else []

    def weights(self, history: History) -> dict[str, float]:
        """As `MixtureController.weights`; what a source without a row gets is replaced by what it has."""
        seen = {column: history.held_out(name) for column, name in self._sets.items()}
        losses = {column: loss for column, loss in seen.items() if loss is not None}
        if not losses:
            raise KeepWeightsError("nothing has been evaluated yet")
        self._losses = [*self._losses, losses][-self._window :]
        eta = self._eta * self._eta_decay**self._round
        self._round += 1
        powers = {source: eta * self._pull(row) for source, row in self._graph.items()}
        highest = max(powers.values())
        raw = {source: math.exp(one - highest) for source, one in powers.items()}
        total = math.fsum(raw.values())
        return {name: raw.get(name, 0.0) / total for name in history.weights}

    def state(self) -> dict[str, Any]:
        """Calls so far, and the losses in the window."""
        return {"round": self._round, "losses": [dict(one) for one in self._losses]}

    def _pull(self, row: Mapping[str, float]) -> float:
        """The sum over the window and over j of A_ij L_j."""
        return math.fsum(
            edge * losses[column]
            for losses in self._losses
            for column, edge in row.items()
            if column in losses
        )
