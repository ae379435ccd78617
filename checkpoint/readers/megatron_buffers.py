"""Where parameters lie in the flat buffers of megatron-core's distributed optimizer, which no file says.

A buffer holds parameters in the reverse order of their registration. Each begins at a multiple of 64 elements
from where its bucket began; a bucket ends behind its last parameter, and files leave the padding at its end
out (megatron-core 0.16: `distributed/param_and_grad_buffer.py`, `optimizer/distrib_optimizer.py`). Neither
the size of buckets nor the number of data ranks is needed: at each parameter either the bucket goes on or the
next begins, and which of these is true shows in the values, since a weight is its rounded master.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from checkpoint.streaming.bits import Bits, rounded

ALIGNMENT = 64
"""Elements; a parameter's start counted from its bucket's."""
_PANEL = 1024  # elements compared at a time
_PATIENCE = 16  # states of a search, for each parameter; one that succeeds needs little more than one
_PANELS = 16  # of one parameter: enough to tell positions apart; every element is compared in verification


class Flat(Protocol):
    """Elements that lie one behind the other, read on demand.

    Attributes:
        numel: how many.
        dtype: torch's name, without "torch.".
    """

    @property
    def numel(self) -> int: ...

    @property
    def dtype(self) -> str: ...

    def read(self, start: int, count: int) -> Bits:
        """`count` elements from element `start` on, as unsigned integers of their size."""


class Doubt(NamedTuple):
    """A parameter whose weight is not its rounded master, where its master should be.

    Attributes:
        parameter: its number in registration order.
        start: element of the buffer where its master begins, or should.
        differing: of the compared elements.
        compared: elements.
    """

    parameter: int
    start: int
    differing: int
    compared: int


@dataclass(frozen=True)
class Located:
    """Parameters found in a buffer.

    Attributes:
        starts: parameter's number in registration order -> element where it begins. Parameters that the
            buffer does not have (frozen ones) are absent. Empty if no order fits.
        doubts: where values contradict; of an order that does not fit at all, the place it failed at, if
            that was for the values.
        reached: elements up to which the order fits.
    """

    starts: dict[int, int] = field(default_factory=dict)
    doubts: tuple[Doubt, ...] = ()
    reached: int = 0


def locate(weights: Sequence[Flat], masters: Flat, bucket_starts: Sequence[int] | None = None) -> Located:
    """Find every parameter of a buffer.

    If no order fits exactly, one is taken in which each weight equals its master in at least half of the
    compared elements, and what differs is in `doubts`.

    Args:
        weights: of the parameters that may be in it, in registration order.
        masters: the whole buffer, of float32.
        bucket_starts: elements where its buckets begin, ascending, the first at 0; None: not known.
    """
    walk = _Walk(weights, masters, bucket_starts)
    for share in (1.0, 0.5):
        starts = walk.run(share)
        if starts is not None:
            doubts = [Doubt(number, start, *walk.compare(number, start)) for number, start in starts.items()]
            return Located(starts, tuple(doubt for doubt in doubts if doubt.differing), masters.numel)
    return Located({}, walk.stuck(), walk.furthest.position)


class _State(NamedTuple):
    """A partial walk: the next parameter (counted from the last registered), and where the buffer stands."""

    following: int
    position: int
    bucket: int


_Step = tuple[_State, tuple[int, int] | None]
"""What comes next, and the parameter that was placed for it and its start."""


class _Walk:
    """A depth-first search over "the bucket goes on", "a new bucket begins" and "is not in here"."""

    def __init__(self, weights: Sequence[Flat], masters: Flat, bucket_starts: Sequence[int] | None) -> None:
        self._weights = weights
        self._masters = masters
        self._bucket_starts = bucket_starts
        self._compared: dict[tuple[int, int], tuple[int, int]] = {}
        self.furthest = _State(0, 0, 0)

    def run(self, share: float) -> dict[int, int] | None:
        """Parameter -> start, where at least this share of the elements agree; None where nothing fits."""
        path: list[tuple[int, int] | None] = []
        trail: list[Iterator[_Step]] = [self._next(_State(0, 0, 0), share)]
        seen: set[_State] = set()
        while trail and len(seen) < _PATIENCE * (len(self._weights) + 100):
            step = next(trail[-1], None)
            if step is None:
                trail.pop()
                if path:
                    path.pop()
                continue
            state, found = step
            if state in seen:
                continue
            seen.add(state)
            path.append(found)
            if state.position > self.furthest.position:
                self.furthest = state
            if state.following == len(self._weights) and self._complete(state):
                return dict(entry for entry in path if entry is not None)
            trail.append(self._next(state, share))
        return None

    def stuck(self) -> tuple[Doubt, ...]:
        """The parameter that should come next where the search got furthest."""
        if self.furthest.following == len(self._weights):
            return ()
        number = len(self._weights) - 1 - self.furthest.following
        candidates = self._candidates(self.furthest, self._weights[number].numel)
        return tuple(Doubt(number, start, *self.compare(number, start)) for start, _ in candidates)[:1]

    def compare(self, number: int, start: int) -> tuple[int, int]:
        """How many of the compared elements of a weight are not the rounded master that begins at `start`."""
        key = (number, start)
        if key not in self._compared:
            self._compared[key] = compare(self._weights[number], self._masters, start)
        return self._compared[key]

    def _next(self, state: _State, share: float) -> Iterator[_Step]:
        if state.following == len(self._weights):
            return
        number = len(self._weights) - 1 - state.following
        numel = self._weights[number].numel
        for start, bucket in self._candidates(state, numel):
            differing, compared = self.compare(number, start)
            if compared - differing >= share * compared:
                yield _State(state.following + 1, start + numel, bucket), (number, start)
        yield state._replace(following=state.following + 1), None

    def _candidates(self, state: _State, numel: int) -> Iterator[tuple[int, int]]:
        """(start, start of its bucket) where the next parameter can lie."""
        aligned = state.position + (state.bucket - state.position) % ALIGNMENT
        options = [(aligned, state.bucket)]
        if self._bucket_starts is not None:
            end = next((start for start in self._bucket_starts if start > state.bucket), self._masters.numel)
            if aligned + numel > end:
                options = [(end, end)]
        elif aligned != state.position:
            options.append((state.position, state.position))
        for start, bucket in options:
            if start + numel <= self._masters.numel:
                yield start, bucket

    def _complete(self, state: _State) -> bool:
        """Whether only alignment is left; a bucket before a tied embedding ends with it."""
        return self._masters.numel - state.position < ALIGNMENT


def compare(weight: Flat, masters: Flat, start: int = 0) -> tuple[int, int]:
    """How many sampled elements of a weight are not the rounded masters from `start` on, and of how many."""
    differing = compared = 0
    for first, count in _panels(weight.numel):
        expected = rounded(masters.read(start + first, count), masters.dtype, weight.dtype)
        if expected is None:
            return weight.numel, weight.numel
        differing += int(np.count_nonzero(expected != weight.read(first, count)))
        compared += count
        if differing == compared:  # another parameter's values: no need to read on
            break
    return differing, compared


def _panels(numel: int) -> Iterator[tuple[int, int]]:
    """(first element, elements) of samples: a small parameter whole, else evenly spread, both ends in."""
    if numel <= _PANEL * _PANELS:
        for first in range(0, numel, _PANEL):
            yield first, min(_PANEL, numel - first)
        return
    for index in range(_PANELS):
        yield (numel - _PANEL) * index // (_PANELS - 1), _PANEL
