"""Which source a sequence comes from: every prefix of the order keeps to the weights, within one sequence.

Sequence n goes to one source. Write w_s for the weight of source s (all adding up to 1), a_s for what it has
been asked for and c_s for what it has been dealt; its lag is a_s - c_s, and every sequence adds w_s to a_s.
Beginning with no lag, the order satisfies |a_s - c_s| < 1 at every prefix and for every source. For that,
occurrence i = 0, 1, ... of source s must fall between slot floor(i / w_s) and slot ceil((i + 1) / w_s) - 1;
taking in each slot the occurrence whose window closes first meets every window (proportionate fairness:
Baruah, Cohen, Plaxton, Varvel 1996, sections 2 and 3; the bound goes back to Tijdeman 1980, the chairman
assignment problem).

When the weights change, the lags are carried over and the windows are moved by them. No order keeps within
one sequence then, whatever the weights become: several sources may be due at once. What holds is -1 < lag,
since no occurrence is dealt before its window opens, and so lag < the number of sources, since lags sum to 0.
Only where a source's weight has become 0, its lag waits until it has a weight again, and the others may go
further ahead by so much.

Everything is counted in whole units of 2^-32 sequences, so the order is the same on every machine, and the
lags are its whole state.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.data.weights import WHOLE


def deal(weights: Sequence[int], lags: Sequence[int], count: int) -> NDArray[np.int32]:
    """The sources of the next `count` sequences, [count].

    Args:
        weights: by source, in units; they sum to WHOLE, and those of weight 0 are never dealt.
        lags: by source, what it has been asked for and not yet been dealt, in units; below 0 when it has been
            dealt more.
        count: sequences.
    """
    active = [source for source, weight in enumerate(weights) if weight]
    if len(active) == 1:
        return np.full(count, active[0], dtype=np.int32)
    dealt = [0] * len(weights)
    waiting = [(-lags[source] // weights[source], source) for source in active]
    heapq.heapify(waiting)
    due: list[tuple[int, int]] = []
    chosen = np.empty(count, dtype=np.int32)
    for slot in range(count):
        while waiting and (waiting[0][0] <= slot or not due):
            _, source = heapq.heappop(waiting)
            closes = -((lags[source] - (dealt[source] + 1) * WHOLE) // weights[source])
            heapq.heappush(due, (closes, source))
        _, source = heapq.heappop(due)
        dealt[source] += 1
        chosen[slot] = source
        heapq.heappush(waiting, ((dealt[source] * WHOLE - lags[source]) // weights[source], source))
    return chosen


def spread_out(count: int, places: int) -> NDArray[np.int64]:
    """`count` of so many places, evenly from the first to the last, int64 [count].

    Sequences are given to data ranks in turn, in blocks of a micro-batch, so from two on they never are all
    on one rank where all places are free: the first place is the first rank's, the last one the last rank's.
    """
    if count == 1:
        return np.zeros(1, dtype=np.int64)
    gaps = count - 1
    return (2 * np.arange(count, dtype=np.int64) * (places - 1) + gaps) // (2 * gaps)


def rank_among_equals(values: NDArray[np.int32]) -> NDArray[np.int64]:
    """How often each value has occurred before its place."""
    order = np.argsort(values, kind="stable")
    grouped = values[order]
    starts = np.searchsorted(grouped, grouped, side="left")
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[order] = np.arange(len(values)) - starts
    return ranks
