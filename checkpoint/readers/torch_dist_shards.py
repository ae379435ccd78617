"""Parameters as ranks of megatron-core held them, in boxes of the whole tensors that `torch_dist` stores.

A stored tensor is whole; its chunks are what ranks held. So the chunks tell where a rank's parameter lay: one
box, or two where gate and up are one parameter of each rank (megatron-core, `apply_swiglu_sharded_factory`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from checkpoint.boxes import Box, BoxIndex
from checkpoint.manifest import ITEM_SIZES, Piece
from checkpoint.streaming.bits import Bits, bits_type
from checkpoint.streaming.panels import Files
from parallel.slices import flat_range_boxes


@dataclass(frozen=True)
class Whole:
    """A stored tensor: its name, whole shape, and the pieces of all ranks."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @cached_property
    def index(self) -> BoxIndex:
        return BoxIndex([piece.box for piece in self.pieces], len(self.shape))

    @cached_property
    def cuts(self) -> list[list[tuple[int, int]]]:
        """Of every axis: (first, extent) of the chunks along it, ascending."""
        return [
            sorted({(piece.box.offset[axis], piece.box.size[axis]) for piece in self.pieces})
            for axis in range(len(self.shape))
        ]

    @cached_property
    def _chunks(self) -> dict[Box, Piece]:
        return {piece.box: piece for piece in self.pieces if piece.strides is None}

    def chunk(self, box: Box) -> Piece | None:
        """The piece that is this very box, row-major without gaps, if there is one."""
        return self._chunks.get(box)

    def read(self, files: Files, box: Box) -> Bits:
        """A box of it, put together from the pieces."""
        found = np.empty(box.size, bits_type(self.dtype))
        filled = 0
        for number, shared in self.index.meeting(box):
            inside = tuple(
                slice(s - b, s - b + n)
                for s, b, n in zip(shared.offset, box.offset, shared.size, strict=True)
            )
            found[inside] = files.read(self.pieces[number], shared)
            filled += shared.numel
        if filled != box.numel:
            raise ValueError(f"{self.name}: {box} is not stored whole")
        return found


class Region(NamedTuple):
    """Elements of a parameter that are a box of a stored tensor.

    Attributes:
        first: of the elements, counted in the rank's parameter.
        name: of the stored tensor.
    """

    first: int
    name: str
    box: Box


@dataclass(frozen=True)
class Shard:
    """A parameter as one rank held it.

    Attributes:
        name: of the stored tensor.
        parts: (stored tensor, box), which follow each other in the rank's memory, each row-major.
        is_copy: another rank holds the same.
    """

    name: str
    parts: tuple[tuple[Whole, Box], ...]
    is_copy: bool = False

    @property
    def numel(self) -> int:
        return sum(box.numel for _, box in self.parts)

    @property
    def dtype(self) -> str:
        return self.parts[0][0].dtype

    def between(self, start: int, end: int) -> Iterator[Region]:
        """The elements from `start` to `end` as boxes, in their order."""
        first = 0
        for whole, box in self.parts:
            low, high = max(start, first), min(end, first + box.numel)
            at = low
            for offset, size in flat_range_boxes(box.size, low - first, high - first):
                inside = Box(tuple(o + b for o, b in zip(offset, box.offset, strict=True)), size)
                yield Region(at, whole.name, inside)
                at += inside.numel
            first += box.numel


@dataclass(frozen=True)
class ShardRun:
    """A shard's elements one behind the other, for `megatron_buffers`."""

    files: Files
    shard: Shard

    @property
    def numel(self) -> int:
        return self.shard.numel

    @property
    def dtype(self) -> str:
        return self.shard.dtype

    def read(self, start: int, count: int) -> Bits:
        runs, first = [], 0
        for whole, box in self.shard.parts:
            low, high = max(start, first), min(start + count, first + box.numel)
            if low < high:
                runs.append(self._read(whole, box, low - first, high - first))
            first += box.numel
        return runs[0] if len(runs) == 1 else np.concatenate(runs)

    def _read(self, whole: Whole, box: Box, start: int, end: int) -> Bits:
        """Elements of a box, which mostly is what a rank saved as one chunk."""
        chunk = whole.chunk(box)
        if chunk is not None:
            flat = part_of(chunk, start, Box((0,), (end - start,)))
            return self.files.read(flat, flat.box)
        regions = Shard(whole.name, ((whole, box),)).between(start, end)
        return np.concatenate([whole.read(self.files, region.box).reshape(-1) for region in regions])


def cut(whole: Whole, lead: tuple[int, ...], rank: int, ranks: int) -> tuple[tuple[Box, ...], bool]:
    """The boxes that a tensor rank held.

    Args:
        lead: position on each of the first axes (layer, expert), of which ranks hold one element.
        ranks: tensor ranks.

    Returns:
        The boxes, and whether the tensor is split at all.

    Raises:
        ValueError: the chunks are not those of so many ranks.
    """
    axes = range(len(lead), len(whole.shape))
    split = [axis for axis in axes if len(whole.cuts[axis]) > 1]
    offset = [*lead, *(0 for _ in axes)]
    size = [*(1 for _ in lead), *(whole.shape[axis] for axis in axes)]
    if not split:
        return (Box(tuple(offset), tuple(size)),), False
    axis, *others = split
    repeats, rest = divmod(len(whole.cuts[axis]), ranks)
    if others or rest or repeats > 2:
        counts = " x ".join(str(len(whole.cuts[axis])) for axis in axes)
        raise ValueError(
            f"{whole.name}: is stored in {counts} chunks, which are not those of {ranks} tensor ranks"
        )
    boxes = []
    for part in range(repeats):
        offset[axis], size[axis] = whole.cuts[axis][part * ranks + rank]
        boxes.append(Box(tuple(offset), tuple(size)))
    return tuple(boxes), ranks > 1


@dataclass(frozen=True)
class BufferRun:
    """A flat buffer of an optimizer, of which every bucket is a stored tensor of one axis.

    Attributes:
        buckets: in their order.
    """

    files: Files
    buckets: Sequence[Whole]

    @property
    def numel(self) -> int:
        return sum(bucket.shape[0] for bucket in self.buckets)

    @property
    def dtype(self) -> str:
        return self.buckets[0].dtype

    @cached_property
    def starts(self) -> list[int]:
        """Elements where buckets begin."""
        return [0, *np.cumsum([bucket.shape[0] for bucket in self.buckets]).tolist()][:-1]

    @cached_property
    def _pieces(self) -> tuple[list[int], list[Piece]]:
        found = [
            (start + piece.box.offset[0], piece)
            for start, bucket in zip(self.starts, self.buckets, strict=True)
            for piece in bucket.pieces
        ]
        found.sort(key=lambda entry: entry[0])
        return [first for first, _ in found], [piece for _, piece in found]

    def between(self, start: int, end: int) -> Iterator[tuple[int, Piece]]:
        """(first element, bytes) of the elements from `start` to `end`, each as a piece of one axis.

        Raises:
            ValueError: some of them are not stored.
        """
        firsts, pieces = self._pieces
        number, at = bisect_right(firsts, start) - 1, start
        while at < end:
            if number < 0 or number == len(pieces) or firsts[number] > at:
                raise ValueError(f"{self.buckets[0].name}: elements from {at} on are not stored")
            skipped = at - firsts[number]
            count = min(end - at, pieces[number].box.size[0] - skipped)
            if count > 0:
                yield at, part_of(pieces[number], skipped, Box((at,), (count,)))
                at += count
            number += 1

    def read(self, start: int, count: int) -> Bits:
        runs = [self.files.read(piece, piece.box) for _, piece in self.between(start, start + count)]
        return runs[0] if len(runs) == 1 else np.concatenate(runs)


def part_of(piece: Piece, skipped: int, box: Box) -> Piece:
    """A box whose elements lie row-major in a dense piece, behind `skipped` of its elements."""
    return Piece(piece.file, piece.start + skipped * ITEM_SIZES[piece.dtype], piece.dtype, box)


def collect(
    into: dict[tuple[str, str], list[Piece]],
    state: str,
    shard: Shard,
    *,
    start: int,
    runs: Iterable[tuple[int, Piece]],
) -> None:
    """Take a shard's state as pieces of stored tensors.

    Args:
        into: takes them: (stored name, state) -> pieces.
        start: element of a flat buffer where the shard begins.
        runs: (first element, bytes) of that buffer, inside of the shard.
    """
    for at, piece in runs:
        low = at - start
        for region in shard.between(low, low + piece.box.numel):
            into.setdefault((region.name, state), []).append(part_of(piece, region.first - low, region.box))
