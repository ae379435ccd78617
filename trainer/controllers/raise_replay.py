"""A heuristic: replay more while the general loss is above where it began."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.controllers.protocol import History, KeepWeightsError


class RaiseReplay:
    """With L the mean loss of the watched sets and s the share of the replay sources, at each call:

    s <- max(s, min(limit, s x factor)) where L > L_0 + tolerance, else s <- max(s_0, s / factor). L_0 and s_0
    are those of the stage's first call with losses. Inside both groups the proportions stay. Sources that are
    left alone keep their share, and s is of what the others have. The rule is ours.
    """

    def __init__(
        self,
        watch: Sequence[str],
        replay: Sequence[str],
        *,
        tolerance: float,
        factor: float,
        limit: float,
        alone: Sequence[str] = (),
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Watch these validation sets.

        Args:
            alone: sources whose weight never changes.
            state: what `state` returned.
        """
        self._watch, self._replay, self._alone = watch, replay, alone
        self._tolerance, self._factor, self._limit = tolerance, factor, limit
        self._first_loss: float | None = state["first_loss"] if state else None
        self._first_share: float | None = state["first_share"] if state else None

    def weights(self, history: History) -> dict[str, float]:
        """As `MixtureController.weights`."""
        seen = [history.held_out(name) for name in self._watch]
        losses = [loss for loss in seen if loss is not None]
        if len(losses) < len(seen):
            raise KeepWeightsError(f"not all of {', '.join(self._watch)} have been evaluated yet")
        loss = math.fsum(losses) / len(losses)
        held = math.fsum(history.weights[name] for name in self._alone)
        share = math.fsum(history.weights[name] for name in self._replay) / (1.0 - held)
        if self._first_loss is None or self._first_share is None:
            self._first_loss, self._first_share = loss, share
            return dict(history.weights)
        if loss > self._first_loss + self._tolerance:
            share_now = max(share, min(self._limit, share * self._factor))
        else:
            share_now = max(self._first_share, share / self._factor)
        return self._with_share(history.weights, share, share_now)

    def state(self) -> dict[str, Any]:
        """What the stage began with."""
        return {"first_loss": self._first_loss, "first_share": self._first_share}

    def _with_share(self, weights: Mapping[str, float], share: float, wanted: float) -> dict[str, float]:
        up = wanted / share if share else 1.0
        down = (1.0 - wanted) / (1.0 - share) if share < 1.0 else 1.0
        factors = (
            dict.fromkeys(weights, down) | dict.fromkeys(self._replay, up) | dict.fromkeys(self._alone, 1.0)
        )
        return {name: one * factors[name] for name, one in weights.items()}
