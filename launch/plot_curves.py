"""What is drawn of a run: the learning rate and the sources' shares of every stage."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from trainer.schedule import Anchor, Phase, Schedule

MOST_POINTS = 4_000
"""Of a stage: more than a picture has pixels."""
MOST_SOURCES = 8
"""To tell apart by name; what is left is drawn as one."""
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In the order in which the steps of a stage go through them."""


@dataclass(frozen=True)
class StageCurve:
    """One stage.

    Attributes:
        first_step: number of its first step.
        steps: how many it has.
        points: (step, learning rate), among them the first and the last step and the borders of the phases.
        phases: phase -> (its first step, its last).
        shares: source -> share of the sequences, when the stage begins; they add up to 1.
        changes: (step, shares from that step on), where they change during the stage.
        note: what is to be said about changes of the shares.
    """

    name: str
    first_step: int
    steps: int
    points: tuple[tuple[int, float], ...]
    phases: Mapping[Phase, tuple[int, int]]
    shares: Mapping[str, float]
    changes: tuple[tuple[int, Mapping[str, float]], ...] = ()
    note: str = ""

    @property
    def spans(self) -> list[tuple[int, Mapping[str, float]]]:
        """(first step, shares) of every part of the stage with shares of its own."""
        return [(self.first_step, self.shares), *self.changes]

    @property
    def peak(self) -> float:
        """Highest learning rate."""
        return max(rate for _, rate in self.points)


def stage_curve(
    name: str, plan: Schedule, anchor: Anchor, *, steps: range, weights: Mapping[str, float]
) -> StageCurve:
    """The curve of a stage with these `steps`; `weights` of the sources are relative."""
    phases = _phases(plan, anchor, steps)
    borders = {step for ends in phases.values() for step in ends}
    drawn = sorted(borders | set(steps[:: max(1, len(steps) // MOST_POINTS)]))
    whole = sum(weights.values())
    return StageCurve(
        name,
        steps.start,
        len(steps),
        tuple((step, plan.lr(step, anchor)) for step in drawn),
        phases,
        {source: weight / whole for source, weight in weights.items()},
    )


def _phases(plan: Schedule, anchor: Anchor, steps: range) -> dict[Phase, tuple[int, int]]:
    """First and last step of each phase; they come in one order, so that a bisection finds each beginning."""

    def order(step: int) -> int:
        return PHASES.index(plan.phase(step, anchor))

    begins = [bisect_left(steps, number, key=order) for number in range(len(PHASES))]
    ends = [*begins[1:], len(steps)]
    return {
        phase: (steps[begin], steps[end - 1])
        for phase, begin, end in zip(PHASES, begins, ends, strict=True)
        if begin < end
    }


@dataclass(frozen=True)
class Axis:
    """The horizontal axis: stages side by side in the order they run, each as wide as it has steps.

    Where a stage goes on from an earlier step than the last stage's end, the numbers of the steps jump back.
    """

    curves: Sequence[StageCurve]

    @property
    def starts(self) -> list[int]:
        """Position of the beginning of every stage, and of the end of the last."""
        found = [0]
        for curve in self.curves:
            found.append(found[-1] + curve.steps)
        return found

    @property
    def spans(self) -> list[tuple[int, Mapping[str, float]]]:
        """(position, shares) of every part of a stage with shares of its own."""
        return [
            (start + step - curve.first_step, shares)
            for start, curve in zip(self.starts, self.curves, strict=False)
            for step, shares in curve.spans
        ]

    def ticks(self, most: int) -> list[tuple[int, int]]:
        """(position, step) of what to number on the axis, far enough apart for about `most` numbers.

        Beginnings of stages come first, those of long ones before those of short ones; then the end; then
        round numbers of steps.
        """
        starts, total = self.starts, self.starts[-1]
        stages = list(zip(starts, self.curves, strict=False))
        begins = [(start, curve.first_step) for start, curve in sorted(stages, key=lambda one: -one[1].steps)]
        end = (total, self.curves[-1].first_step + self.curves[-1].steps)
        spacing = next(size for size in _round_sizes() if total / size <= most)
        round_steps = [
            (start + step - curve.first_step, step)
            for start, curve in stages
            for step in range(
                -(-curve.first_step // spacing) * spacing, curve.first_step + curve.steps, spacing
            )
        ]
        kept: list[tuple[int, int]] = []
        for tick in [*begins, end, *round_steps]:
            if all(abs(tick[0] - other[0]) >= 0.6 * total / most for other in kept):
                kept.append(tick)
        return sorted(kept)


def _round_sizes() -> list[int]:
    return [factor * 10**power for power in range(18) for factor in (1, 2, 5)]


def main_sources(curves: Sequence[StageCurve], most: int) -> tuple[list[str], int]:
    """The sources to show by name, those largest in any stage, and how many others there are."""
    names = list(dict.fromkeys(source for curve in curves for source in curve.shares))
    if len(names) <= most:
        return names, 0
    shares = [one for curve in curves for _, one in curve.spans]
    size = {name: max(one.get(name, 0.0) for one in shares) for name in names}
    largest = set(sorted(names, key=lambda name: -size[name])[: most - 1])
    return [name for name in names if name in largest], len(names) - len(largest)


def shares_by_name(given: Mapping[str, float], names: Sequence[str], others: int) -> dict[str, float]:
    """Shares of the named sources, and of all others together under one name."""
    shares = {name: given.get(name, 0.0) for name in names}
    if others:
        shares[f"{others} others"] = max(0.0, 1.0 - sum(shares.values())) if given else 0.0
    return shares


def share_notes(curves: Sequence[StageCurve]) -> list[str]:
    """What is to be said about changes of the shares, with the stage's name where there are several."""
    return [
        f"{curve.name}: {curve.note}" if len(curves) > 1 else curve.note for curve in curves if curve.note
    ]
