"""Which source a sequence comes from: every prefix of the order keeps to the weights, within one sequence.

Sequence n goes to one source. Writing c_s(n) for the sequences of source s among the first n, and w_s for its
weight (all weights adding up to 1), the order satisfies |c_s(n) - n w_s| < 1 for every n and every s. For
that, occurrence i = 0, 1, ... of source s must fall between slot floor(i / w_s) and slot ceil((i + 1) / w_s)
- 1; taking in each slot the occurrence whose window closes first meets every window (proportionate fairness:
Baruah, Cohen, Plaxton, Varvel 1996, sections 2 and 3; the bound goes back to Tijdeman 1980, the chairman
assignment problem). Weights are exact integer ratios, so the order is the same on every machine, and the
counts are the whole state.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import lcm

import numpy as np
from numpy.typing import NDArray


class Mixture:
    """The order in which sources take turns: a pure function of the weights and the position."""

    REMEMBERED = 16

    def __init__(self, weights: Sequence[float]) -> None:
        """Weights are relative and positive; their sum does not matter."""
        ratios = [float(weight).as_integer_ratio() for weight in weights]
        scale = lcm(*(denominator for _, denominator in ratios))
        self._parts = [numerator * (scale // denominator) for numerator, denominator in ratios]
        self._whole = sum(self._parts)
        self._counts: dict[int, list[int]] = {0: [0] * len(ratios)}

    def counts(self, position: int) -> list[int]:
        """How many of the first `position` sequences come from each source."""
        self.deal(position, 0)
        return list(self._counts[position])

    def resume(self, position: int, counts: Sequence[int]) -> None:
        """Spare the walk from 0 to `position`: these are its counts, as `counts` once returned them."""
        if sum(counts) != position or len(counts) != len(self._parts):
            raise ValueError(
                f"counts {list(counts)} are not those of {len(self._parts)} sources at {position}"
            )
        self._counts[position] = list(counts)

    def deal(self, first: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Source of each of the sequences first, ..., first + count - 1, and its number inside that source.

        Neighbouring calls are cheap: the walk starts at the nearest position before `first` that is
        remembered.
        """
        start = max(position for position in self._counts if position <= first)
        counts = list(self._counts[start])
        _walk(self._parts, self._whole, counts, range(start, first))
        self._remember(first, counts)
        before = np.array(counts, dtype=np.int64)
        sources = np.array(
            _walk(self._parts, self._whole, counts, range(first, first + count)), dtype=np.int32
        )
        self._remember(first + count, counts)
        return sources, before[sources] + _rank_among_equals(sources)

    def _remember(self, position: int, counts: Sequence[int]) -> None:
        self._counts.pop(position, None)
        self._counts[position] = list(counts)
        if len(self._counts) > self.REMEMBERED:
            del self._counts[
                next(p for p in self._counts if p != 0)
            ]  # the oldest; 0 serves every other position


def _walk(parts: Sequence[int], whole: int, counts: list[int], slots: range) -> list[int]:
    """Fill the slots, earliest deadline first among the occurrences that are released; updates `counts`."""
    if len(parts) == 1:
        counts[0] += len(slots)
        return [0] * len(slots)
    pairs = enumerate(zip(counts, parts, strict=True))
    waiting = [(count * whole // part, source) for source, (count, part) in pairs]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    chosen: list[int] = []
    for slot in slots:
        while waiting and waiting[0][0] <= slot:
            _, source = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(counts[source] + 1) * whole // parts[source]), source))
        _, source = heapq.heappop(ready)
        counts[source] += 1
        heapq.heappush(waiting, (counts[source] * whole // parts[source], source))
        chosen.append(source)
    return chosen


def _rank_among_equals(values: NDArray[np.int32]) -> NDArray[np.int64]:
    """How often each value has occurred before its place."""
    order = np.argsort(values, kind="stable")
    grouped = values[order]
    starts = np.searchsorted(grouped, grouped, side="left")
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[order] = np.arange(len(values)) - starts
    return ranks
