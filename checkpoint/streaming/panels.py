"""Boxes of stored pieces as numpy arrays of bits, of bounded size and in the order of the file."""

from __future__ import annotations

import math
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from checkpoint.boxes import Box
from checkpoint.manifest import ITEM_SIZES, Piece
from checkpoint.plan import row_major
from checkpoint.streaming.bits import Bits, bits_type

PANEL_BYTES = 1 << 21  # of one read: fits into a core's cache together with what is made of it
GAP_BYTES = 1 << 14  # shorter gaps are read through
_OPEN_FILES = 64


class Files:
    """Files of a checkpoint, opened when they are needed. Not for several threads at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[str, int] = OrderedDict()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def descriptor(self, name: str) -> int:
        """Of a file, relative to the folder or absolute; the one used longest ago is closed for it."""
        if name in self._open:
            self._open.move_to_end(name)
        else:
            if len(self._open) == _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[name] = os.open(self._folder / name, os.O_RDONLY)
        return self._open[name]

    def read(self, piece: Piece, box: Box) -> Bits:
        """A box of what a piece holds, in its own dtype.

        Raises:
            OSError: the file is not there, or ends too early.
        """
        strides = row_major(piece.box.size) if piece.strides is None else piece.strides
        skipped = sum((o - p) * s for o, p, s in zip(box.offset, piece.box.offset, strides, strict=True))
        kind = bits_type(piece.dtype)
        descriptor = self.descriptor(piece.file)
        return _read(descriptor, piece.start + skipped * kind.itemsize, box.size, strides, kind)


def panels(piece: Piece, limit: int = PANEL_BYTES, within: Box | None = None) -> Iterator[Box]:
    """Cut a piece, or a box of it, into boxes of at most `limit` bytes, in the order of its bytes.

    The bytes of a piece without gaps are those of its panels, one after the other.
    """
    strides = row_major(piece.box.size) if piece.strides is None else piece.strides
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    yield from cut(within or piece.box, limit // ITEM_SIZES[piece.dtype], order)


def is_dense(piece: Piece) -> bool:
    """Whether all bytes from the piece's first to its last belong to it."""
    return piece.strides is None or piece.num_bytes == piece.box.numel * ITEM_SIZES[piece.dtype]


def sub_box(array: Bits, box: Box, inner: Box) -> Bits:
    """The part of an array, which holds `box`, that is `inner`."""
    return array[
        tuple(slice(i - o, i - o + s) for o, i, s in zip(box.offset, inner.offset, inner.size, strict=True))
    ]


def cut(box: Box, limit: int, order: Sequence[int] | None = None) -> Iterator[Box]:
    """Cut a box into boxes of at most `limit` elements, along the first axes of the order first."""
    if box.numel <= max(1, limit):
        yield box
        return
    order = range(len(box.size)) if order is None else order
    axis = next(axis for axis in order if box.size[axis] > 1)
    rows = max(1, limit // (box.numel // box.size[axis]))
    for first in range(0, box.size[axis], rows):
        offset, size = list(box.offset), list(box.size)
        offset[axis] += first
        size[axis] = min(rows, box.size[axis] - first)
        yield from cut(Box(tuple(offset), tuple(size)), limit, order)


def _read(
    descriptor: int, at: int, size: Sequence[int], strides: Sequence[int], kind: np.dtype[np.unsignedinteger]
) -> Bits:
    span = 1 + sum((extent - 1) * stride for extent, stride in zip(size, strides, strict=True))
    numel = math.prod(size)
    if (span - numel) * kind.itemsize < max(GAP_BYTES, numel * kind.itemsize):
        run = np.empty(span, kind)
        _fill(descriptor, memoryview(run).cast("B"), at)  # type: ignore[arg-type]  # numpy's arrays are buffers
        return np.lib.stride_tricks.as_strided(run, size, [stride * kind.itemsize for stride in strides])
    if _run_length(size, strides) * kind.itemsize < GAP_BYTES:
        mapped = _copy_mapped(descriptor, at, span, size, strides, kind)
        if mapped is not None:
            return mapped
    outer = max((axis for axis in range(len(size)) if size[axis] > 1), key=lambda axis: strides[axis])
    rest = [*size]
    rest[outer] = 1
    step = strides[outer] * kind.itemsize
    blocks = [_read(descriptor, at + k * step, rest, strides, kind) for k in range(size[outer])]
    return np.concatenate(blocks, axis=outer)


def _run_length(size: Sequence[int], strides: Sequence[int]) -> int:
    """Elements that lie one behind the other before there is a gap."""
    length = 1
    for stride, extent in sorted(zip(strides, size, strict=True)):
        if extent > 1 and stride != length:
            break
        length *= extent
    return length


def _copy_mapped(
    descriptor: int,
    at: int,
    span: int,
    size: Sequence[int],
    strides: Sequence[int],
    kind: np.dtype[np.unsignedinteger],
) -> Bits | None:
    """Short runs, copied out of a mapping of the file without a call for each; None where there is none."""
    end = at + span * kind.itemsize
    found = os.fstat(descriptor).st_size
    if found < end:  # touching it would kill the process
        raise OSError(f"ends at byte {found}, {end - found} more are needed")
    skipped = at % mmap.ALLOCATIONGRANULARITY
    try:
        memory = mmap.mmap(descriptor, end - at + skipped, access=mmap.ACCESS_READ, offset=at - skipped)
    except OSError:
        return None
    flat = np.frombuffer(memory, kind, span, skipped)
    return np.lib.stride_tricks.as_strided(flat, size, [stride * kind.itemsize for stride in strides]).copy()


def _fill(descriptor: int, content: memoryview, at: int) -> None:
    while len(content):
        count = os.preadv(descriptor, [content], at)
        if count == 0:
            raise OSError(f"ends at byte {at}, {len(content)} more are needed")
        at += count
        content = content[count:]
