"""Auxiliary losses of a step: which are on, what they add on the last stage, and what is reported of them.

A loss gives a number to every token. It is multiplied by the token's loss weight, is zero on tokens of other
sources, and is summed; like the cross-entropy it is divided once, by the tokens of the global batch, so that
neither an empty micro-batch nor a step without any of its tokens needs a case of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from parallel.forward import Batch, LastStage
from trainer.losses.config import AuxLossConfig


class TokenLoss(Protocol):
    """A loss of every token."""

    def prepare(self, step: int, batches: Sequence[Batch]) -> None:
        """Before the training pass, on all ranks together: this data rank's micro-batches of the step."""

    def __call__(self, seen: LastStage) -> Tensor:
        """fp32 [b, s/CP], finite for every token. On the last stage, in the order of micro-batches."""

    def state(self) -> dict[str, Any]:
        """What a resumed run must know: JSON, the same on every rank."""


@dataclass(frozen=True)
class AuxLossReport:
    """One auxiliary loss of a step, without its weight.

    Attributes:
        loss: mean over the valid tokens of its sources; NaN where the step had none.
        by_source: mean of each of its sources that the step had tokens of.
    """

    name: str
    weight: float
    loss: float
    by_source: Mapping[str, float]


@dataclass(frozen=True)
class Term:
    """A loss, its settings, and for each source whether its tokens are in it."""

    config: AuxLossConfig
    loss: TokenLoss
    chosen: tuple[bool, ...]


class AuxLosses:
    """All auxiliary losses of a run."""

    def __init__(self, terms: Sequence[Term] = ()) -> None:
        self._terms = tuple(terms)

    def at(self, step: int) -> StepLosses | None:
        """The losses that are on in the step after `step` steps; None where none is."""
        terms = tuple(term for term in self._terms if term.config.covers(step))
        return StepLosses(step, terms) if terms else None

    def notes(self) -> list[str]:
        """What is added to the loss, a sentence each."""
        return [_sentence(term) for term in self._terms]

    def state(self) -> dict[str, Any]:
        """By name: JSON, the same on every rank."""
        return {term.config.label: state for term in self._terms if (state := term.loss.state())}


@dataclass(frozen=True)
class StepLosses:
    """The losses that are on in one step; a `parallel.forward.LogitsLoss`."""

    step: int
    terms: tuple[Term, ...]

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Run what must run before the training pass. A collective."""
        for term in self.terms:
            term.loss.prepare(self.step, batches)

    def __call__(self, seen: LastStage) -> tuple[Tensor, Tensor]:
        """The sum over tokens and losses with their weights; without them, float64 [num_sources, losses]."""
        total = seen.logits.new_zeros((), dtype=torch.float32)
        columns = []
        for term in self.terms:
            with torch.set_grad_enabled(torch.is_grad_enabled() and term.config.weight > 0):
                added, column = _sum(term, seen)
            columns.append(column)
            if term.config.weight > 0:
                total = total + term.config.weight * added
        return total, torch.stack(columns, 1)

    def reports(self, sums: Tensor, tokens: Tensor, names: Sequence[str]) -> tuple[AuxLossReport, ...]:
        """From sums over the mesh, [num_sources, losses], and the valid tokens of every source."""
        return tuple(_report(term, sums[:, at], tokens, names) for at, term in enumerate(self.terms))


def _sentence(term: Term) -> str:
    config, state = term.config, term.loss.state()
    sources = "all sources" if all(term.chosen) else ", ".join(config.sources)
    about = f" to {state['path'] or 'the initial weights'}" if "path" in state else ""
    return f"auxiliary loss {config.label!r}: {config.weight} x {config.kind}{about} on {sources}"


def _sum(term: Term, seen: LastStage) -> tuple[Tensor, Tensor]:
    sources = seen.sources.long()
    chosen = torch.tensor(term.chosen, device=seen.logits.device)
    weighted = term.loss(seen) * (seen.loss_weights * chosen[sources])
    column = torch.zeros(len(term.chosen), dtype=torch.float64, device=seen.logits.device)
    column.index_add_(0, sources.reshape(-1), weighted.detach().reshape(-1).double())
    return weighted.sum(), column


def _report(term: Term, sums: Tensor, tokens: Tensor, names: Sequence[str]) -> AuxLossReport:
    present = [at for at, chosen in enumerate(term.chosen) if chosen and float(tokens[at])]
    count = sum(float(tokens[at]) for at in present)
    total = sum(float(sums[at]) for at in present)
    by_source = {names[at]: float(sums[at]) / float(tokens[at]) for at in present}
    return AuxLossReport(
        term.config.label, term.config.weight, total / count if count else math.nan, by_source
    )
