"""Where the bytes of a shifted buffer are: the arithmetic of `fully_reshardable` in megatron-core up to 0.19.

A buffer's buckets are packed into one array without the padding at their ends; then each parameter is cut out
of that array at the place where it lies with the padding. So what was saved as a parameter that begins at `s`
are the elements from `s` on of the array, while its own begin at `s` less the padding of all buckets before:
they were saved as the end of the parameter before, and as all of itself but the end. What would lie in
padding, or between parameters, was not saved at all: the start of a bucket's first parameter is lost.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from checkpoint.boxes import Box
from checkpoint.manifest import Piece
from checkpoint.readers.megatron_buffers import ALIGNMENT
from checkpoint.readers.torch_dist_shards import Shard, ShardRun, Whole, part_of
from checkpoint.streaming.bits import Bits, rounded
from checkpoint.streaming.panels import Files

_COMPARED = 1024  # elements of each run
_PATIENCE = 64  # places tried for each parameter before a search is given up
Savings = Mapping[str, Whole]
"""Stored name -> a state of the parameter, as it was saved."""


class Start(NamedTuple):
    """Where a parameter begins.

    Attributes:
        padded: in the buffer, padding included: where it was cut out.
        packed: in the array: where its own elements begin.
    """

    padded: int
    packed: int

    @property
    def shift(self) -> int:
        return self.padded - self.packed


@dataclass
class Packed:
    """What is known of the array: parameters' cuts, in ascending order."""

    _firsts: list[int] = field(default_factory=list)
    _pieces: list[Piece] = field(default_factory=list)

    def add(self, shard: Shard, start: int, states: Savings) -> None:
        """The elements from `start` on were saved as this parameter, if this rank saved it at all.

        Raises:
            ValueError: they are not stored as this rank had them.
        """
        if shard.is_copy:
            return
        for whole, box in shard.parts:
            self._firsts.append(start)
            self._pieces.append(_chunk(states[whole.name], box))
            start += box.numel

    def keep(self, count: int) -> None:
        """Forget all but the first pieces."""
        del self._firsts[count:], self._pieces[count:]

    def __len__(self) -> int:
        return len(self._firsts)

    def between(self, start: int, end: int) -> Iterator[tuple[int, Piece]]:
        """(first element, bytes) of those elements from `start` to `end` that were saved."""
        number = max(0, bisect_right(self._firsts, start) - 1)
        while number < len(self._firsts) and self._firsts[number] < end:
            first, piece = self._firsts[number], self._pieces[number]
            low, high = max(start, first), min(end, first + piece.box.numel)
            if low < high:
                yield low, part_of(piece, low - first, Box((low,), (high - low,)))
            number += 1


def _chunk(state: Whole, box: Box) -> Piece:
    chunk = state.chunk(box)
    if chunk is None:
        raise ValueError(f"{state.name}: {box} is not stored as one chunk")
    return chunk


@dataclass
class Search:
    """Finds where the buckets of a buffer end, so that all weights are rounded masters.

    Attributes:
        shards: in registration order.
        masters: by stored name.
        divisor: of the ends of buckets.
    """

    shards: Sequence[Shard]
    masters: Savings
    divisor: int
    files: Files

    def run(self, *, eager: bool) -> list[Start] | None:
        """Where each parameter begins, the last registered first; None where no buckets fit.

        Args:
            eager: whether a bucket is rather taken to end than to go on, where both fits.
        """
        reverse, packed = self.shards[::-1], Packed()
        starts: list[Start] = []
        sizes: list[int] = []
        trail = [self._options(0, 0, eager=eager)]
        tried = 0
        while trail and tried < _PATIENCE * (len(reverse) + 1):
            start = next(trail[-1], None)
            if start is None:
                trail.pop()
                if starts:
                    starts.pop()
                    packed.keep(sizes.pop())
                continue
            tried += 1
            shard, size = reverse[len(starts)], len(packed)
            packed.add(shard, start.padded, self.masters)
            if not self._fits(shard, start, packed):
                packed.keep(size)
                continue
            starts.append(start)
            sizes.append(size)
            if len(starts) == len(reverse):
                return starts
            trail.append(self._options(start.padded + shard.numel, start.shift, eager=eager))
        return None

    def _options(self, position: int, shift: int, *, eager: bool) -> Iterator[Start]:
        """Where the parameter behind `position` can begin: in the same bucket, or in a new one."""
        same = position + -position % ALIGNMENT
        new = position + -position % self.divisor
        options = [Start(same, same - shift)]
        if new != position:
            options.append(Start(new, position - shift))
        yield from options[::-1] if eager else options

    def _fits(self, shard: Shard, start: Start, packed: Packed) -> bool:
        """Whether what was saved of a parameter's own elements, and compared, is its weight when rounded."""
        return all(
            expected is not None and np.array_equal(expected, weight)
            for expected, weight in self._compared(shard, start, packed)
        )

    def proves(self, shard: Shard, start: Start, packed: Packed) -> bool:
        """Whether it fits by values that are not all the same, as those of new norms are."""
        runs = [weight for _, weight in self._compared(shard, start, packed)]
        return bool(runs) and any(np.any(run != runs[0][0]) for run in runs)

    def _compared(self, shard: Shard, start: Start, packed: Packed) -> Iterator[tuple[Bits | None, Bits]]:
        """(rounded masters, weights) from the middle of each run that was saved."""
        weight = ShardRun(self.files, shard)
        for first, piece in packed.between(start.packed, start.packed + shard.numel):
            count = min(_COMPARED, piece.box.numel)
            skipped = (piece.box.numel - count) // 2
            middle = part_of(piece, skipped, Box((0,), (count,)))
            expected = rounded(self.files.read(middle, middle.box), piece.dtype, weight.dtype)
            yield expected, weight.read(first + skipped - start.packed, count)


def packed_of(shards: Sequence[Shard], starts: Sequence[Start], states: Savings) -> Packed:
    """The array of a state, as far as it was saved; shards and their starts in the buffer's order."""
    packed = Packed()
    for shard, start in zip(shards, starts, strict=True):
        packed.add(shard, start.padded, states)
    return packed
