"""Dealing a run's sequences to its sources, step by step, through changes of the weights and caps.

All of it is a pure function of where the dealing began and of the weights set since, in whole numbers. Layout
and restarts do not come in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from trainer.data.mixture import deal, spread_out
from trainer.data.segments import Segment
from trainer.data.weights import WHOLE, check_names, pass_on, quantise


class CapsReachedError(ValueError):
    """Every source that sequences could come from has been read as often as it may be."""


@dataclass(frozen=True)
class Terms:
    """What the run file asks of the dealing; where one of these changes, a new segment begins.

    Attributes:
        seed: of the sources' orders.
        stage: name of the stage.
        sequence_length: tokens in a sequence.
        global_batch: sequences in a step.
        weights: by source, in its order, in units that sum to WHOLE: of the sequences that are not fixed.
        sizes: by source, tokens in an epoch.
        caps: by source, the most tokens that may be read of it; None where there is no cap.
        fixed: of sources with a fixed number of sequences in every step, that number; their weight is 0.
        moving: sources whose documents change, so that their size does not say which these are.
    """

    seed: int
    stage: str
    sequence_length: int
    global_batch: int
    weights: dict[str, int]
    sizes: dict[str, int]
    caps: dict[str, int | None]
    fixed: dict[str, int] = field(default_factory=dict)
    moving: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """The sources, in their order."""
        return tuple(self.weights)


@dataclass(frozen=True)
class Cursor:
    """All that has been dealt before a step. Sequences of numbers are by source, in the order of the terms.

    Attributes:
        step: nothing of it has been dealt.
        began: the first step of the segment under way.
        weights: in force, in units, of the sequences that are not fixed.
        asked: since the segment began, in units.
        dealt: sequences since the segment began.
        read: tokens since the run began.
        left: sources whose cap has been reached.
        closed: the segments before.
    """

    step: int
    began: int
    weights: tuple[int, ...]
    asked: tuple[int, ...]
    dealt: tuple[int, ...]
    read: tuple[int, ...]
    left: frozenset[str]
    closed: tuple[Segment, ...]

    @classmethod
    def beginning(
        cls, terms: Terms, step: int, read: Mapping[str, int], closed: tuple[Segment, ...] = ()
    ) -> Cursor:
        """A new segment: nobody is owed anything."""
        nothing = (0,) * len(terms.weights)
        places = tuple(read.get(name, 0) for name in terms.names)
        weights = tuple(terms.weights.values())
        return cls(step, step, weights, nothing, nothing, places, frozenset(), closed)

    @property
    def lags(self) -> list[int]:
        """What each source has been asked for and not yet been dealt, in units."""
        return [asked - dealt * WHOLE for asked, dealt in zip(self.asked, self.dealt, strict=True)]

    def segment(self, terms: Terms) -> Segment:
        """The segment under way, so far."""
        asked, dealt = (dict(zip(terms.names, one, strict=True)) for one in (self.asked, self.dealt))
        return Segment(self.began, self.step - self.began, terms.stage, terms.sequence_length, asked, dealt)

    def segments(self, terms: Terms) -> tuple[Segment, ...]:
        """All of them; the one under way only when something of it has been dealt."""
        return self.closed if self.step == self.began else (*self.closed, self.segment(terms))


class Dealer:
    """Deals step after step, and goes back to any step since it began."""

    REMEMBERED = 16

    def __init__(self, terms: Terms, start: Cursor, groups: Mapping[str, str | None]) -> None:
        """Deal from `start` on; `groups` says who takes over the weight of a source that leaves."""
        self.terms = terms
        self.start = start
        self._groups = groups
        self._changes: dict[int, dict[str, int]] = {}
        self._cursors: dict[int, Cursor] = {start.step: start}

    def set_weights(self, step: int, weights: Mapping[str, float]) -> None:
        """From `step` on, deal with these weights; what the sources are owed is carried over.

        Sources whose cap has been reached stay out, whatever weight they are given; and those with a fixed
        number of sequences keep it, while the others divide the rest by their weights.

        Raises:
            ValueError: the step is before this dealer's first, or before an earlier change; the sources are
                not those of the mixture; or nothing is left to deal.
        """
        if step < self.newest_change:
            raise ValueError(
                f"the weights of step {step} cannot change: those of step {self.newest_change} are set"
            )
        check_names(weights, self.terms.names)
        fixed = self.terms.fixed
        units = quantise({name: 0.0 if name in fixed else one for name, one in weights.items()})
        pass_on(units, self.at(step).left, self._groups)  # raises now rather than when the step is dealt
        self._changes[step] = units
        self._cursors = {at: cursor for at, cursor in self._cursors.items() if at <= step}

    def shares(self, cursor: Cursor) -> dict[str, float]:
        """Of all sequences, by source, as the weights at this cursor ask for them; they sum to 1."""
        batch, fixed = self.terms.global_batch, self._fixed(cursor)
        free = batch - sum(fixed.values())
        return {
            name: (fixed.get(name, 0) * WHOLE + free * one) / (batch * WHOLE)
            for name, one in zip(self.terms.names, cursor.weights, strict=True)
        }

    @property
    def newest_change(self) -> int:
        """The step from which the newest weights are in force."""
        return next(reversed(self._changes), self.start.step)  # `set_weights` takes them in their order

    def at(self, step: int) -> Cursor:
        """All that is dealt before `step`, with the weights that were set for it."""
        return self._changed(self._before(step))

    def deal(self, step: int) -> tuple[Cursor, NDArray[np.int32]]:
        """The cursor that `step` is dealt from, caps seen to, and the source of each of its sequences.

        Raises:
            CapsReachedError: no source that is left has a weight.
        """
        cursor, sources, counts = self._fitting(self.at(step))
        self._remember(self._advanced(cursor, counts))
        return cursor, sources

    def _before(self, step: int) -> Cursor:
        if step < self.start.step:
            raise ValueError(
                f"step {step}: this mixture began at step {self.start.step}; load the checkpoint of "
                "that step with the [data] it was written under"
            )
        cursor = self._cursors[max(at for at in self._cursors if at <= step)]
        while cursor.step < step:
            dealt, _, counts = self._fitting(self._changed(cursor))
            cursor = self._advanced(dealt, counts)
            self._remember(cursor)
        return cursor

    def _changed(self, cursor: Cursor) -> Cursor:
        """With the weights that were set for its step."""
        if (units := self._changes.get(cursor.step)) is None:
            return cursor
        kept = pass_on(units, cursor.left, self._groups)
        return replace(cursor, weights=tuple(kept.values()))

    def _fitting(self, cursor: Cursor) -> tuple[Cursor, NDArray[np.int32], list[int]]:
        """Deal the step, again without the sources that it would take beyond their caps."""
        while True:
            sources = self._dealt(cursor)
            counts = np.bincount(sources, minlength=len(cursor.weights)).tolist()
            full = self._beyond_caps(cursor, counts)
            if not full:
                return cursor, sources, counts
            cursor = self._without(cursor, full)

    def _fixed(self, cursor: Cursor) -> dict[str, int]:
        """Sequences of every step that are not dealt by weight, of the sources that have not left."""
        return {name: count for name, count in self.terms.fixed.items() if name not in cursor.left}

    def _dealt(self, cursor: Cursor) -> NDArray[np.int32]:
        """The source of each sequence: fixed ones in places of their own, the rest by weight."""
        batch, fixed = self.terms.global_batch, self._fixed(cursor)
        if not fixed:
            return deal(cursor.weights, cursor.lags, batch)
        sources = np.full(batch, -1, dtype=np.int32)
        for name, count in fixed.items():
            free = np.flatnonzero(sources < 0)
            sources[free[spread_out(count, len(free))]] = self.terms.names.index(name)
        free = np.flatnonzero(sources < 0)
        sources[free] = deal(cursor.weights, cursor.lags, len(free))
        return sources

    def _beyond_caps(self, cursor: Cursor, counts: list[int]) -> list[str]:
        places = zip(self.terms.caps.items(), cursor.read, counts, strict=True)
        length = self.terms.sequence_length
        return [
            name
            for (name, cap), read, more in places
            if cap is not None and more and read + more * length > cap
        ]

    def _without(self, cursor: Cursor, full: list[str]) -> Cursor:
        """A new segment, which these sources are not in."""
        units = dict(zip(self.terms.names, cursor.weights, strict=True))
        who = "every source" if not self.terms.fixed else "every source without per_batch"
        problem = CapsReachedError(
            f"step {cursor.step}: {who} has reached its max_epochs ({', '.join(self.terms.names)}); raise "
            "data.sources max_epochs, add a source, or lower train.steps"
        )
        try:
            kept = pass_on(units, full, self._groups)
        except ValueError:
            raise problem from None
        if not any(kept.values()):  # a source with per_batch leaves its places to nobody
            raise problem
        nothing = (0,) * len(units)
        return replace(
            cursor,
            began=cursor.step,
            weights=tuple(kept.values()),
            asked=nothing,
            dealt=nothing,
            left=cursor.left | set(full),
            closed=cursor.segments(self.terms),
        )

    def _advanced(self, cursor: Cursor, counts: list[int]) -> Cursor:
        """One step further."""
        terms, fixed = self.terms, self._fixed(cursor)
        length, free = terms.sequence_length, terms.global_batch - sum(fixed.values())
        more = (
            fixed.get(name, 0) * WHOLE + free * one
            for name, one in zip(terms.names, cursor.weights, strict=True)
        )
        return replace(
            cursor,
            step=cursor.step + 1,
            asked=tuple(a + m for a, m in zip(cursor.asked, more, strict=True)),
            dealt=tuple(d + n for d, n in zip(cursor.dealt, counts, strict=True)),
            read=tuple(r + length * n for r, n in zip(cursor.read, counts, strict=True)),
        )

    def _remember(self, cursor: Cursor) -> None:
        self._cursors.pop(cursor.step, None)
        self._cursors[cursor.step] = cursor
        if len(self._cursors) > self.REMEMBERED:
            serving = {self.start.step, self.newest_change}  # the first serves any step, the second `shares`
            oldest = next(at for at in self._cursors if at not in serving)
            del self._cursors[oldest]
