"""Which bytes of which file go where: the boxes a rank wants, met with the pieces that exist."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from checkpoint.boxes import Box, BoxIndex
from checkpoint.manifest import LogicalTensor, Piece


class Axis(NamedTuple):
    """One axis of a copy: `extent` elements, so far apart (in elements) in the source and in the target."""

    extent: int
    source: int
    target: int


class Copy(NamedTuple):
    """A region of a piece that becomes a region of a row-major target.

    Attributes:
        target: number of the target box.
        source_start, target_start: first element, counted from the start of the piece and of the target.
        axes: outermost first, by their step in the source; adjacent axes that continue each other are merged,
            so that no axis at all means one element, and one axis (n, 1, 1) one run of memory in both.
        whole: the piece's bytes are all needed, in the order in which they lie: its hash can be checked.
    """

    piece: Piece
    target: int
    source_start: int
    target_start: int
    axes: tuple[Axis, ...]
    whole: bool

    @property
    def numel(self) -> int:
        count = 1
        for axis in self.axes:
            count *= axis.extent
        return count


def plan(tensor: LogicalTensor, targets: Sequence[tuple[int, Box]]) -> Iterator[Copy]:
    """The copies that fill the numbered target boxes of one tensor from its pieces."""
    index = BoxIndex([piece.box for piece in tensor.pieces], len(tensor.shape))
    for target, box in targets:
        if box.numel == 0:
            continue
        for number, shared in index.meeting(box):
            yield _copy(tensor.pieces[number], target, box, shared)


def panels(copy: Copy, limit: int) -> Iterator[tuple[int, int, tuple[Axis, ...]]]:
    """Cut a copy into panels (source start, target start, axes) that span at most `limit` source elements.

    In the order of the source, so that a whole piece is read from its first byte to its last.
    """
    yield from _cut(copy.source_start, copy.target_start, copy.axes, limit)


def span(axes: Sequence[Axis]) -> int:
    """Elements of the source from the first to the last that the axes touch, both included."""
    return 1 + sum((axis.extent - 1) * axis.source for axis in axes)


def row_major(size: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major block."""
    strides: list[int] = []
    step = 1
    for extent in reversed(size):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def _copy(piece: Piece, target: int, target_box: Box, shared: Box) -> Copy:
    source_strides = row_major(piece.box.size) if piece.strides is None else piece.strides
    target_strides = row_major(target_box.size)
    source_start = target_start = 0
    axes = []
    for axis, (first, count) in enumerate(zip(shared.offset, shared.size, strict=True)):
        source_start += (first - piece.box.offset[axis]) * source_strides[axis]
        target_start += (first - target_box.offset[axis]) * target_strides[axis]
        axes.append(Axis(count, source_strides[axis], target_strides[axis]))
    merged = _merge(axes)
    whole = shared == piece.box and span(merged) == piece.box.numel
    return Copy(piece, target, source_start, target_start, merged, whole)


def _merge(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    merged: list[Axis] = []
    for axis in sorted((a for a in axes if a.extent > 1), key=lambda a: -a.source):
        outer = merged[-1] if merged else None
        if outer and outer.source == axis.extent * axis.source and outer.target == axis.extent * axis.target:
            merged[-1] = Axis(outer.extent * axis.extent, axis.source, axis.target)
        else:
            merged.append(axis)
    return tuple(merged)


def _cut(
    source: int, target: int, axes: tuple[Axis, ...], limit: int
) -> Iterator[tuple[int, int, tuple[Axis, ...]]]:
    if span(axes) <= limit or not axes:
        yield source, target, axes
        return
    outer, inner = axes[0], axes[1:]
    fitting = max(1, 1 + (limit - span(inner)) // outer.source)
    for first in range(0, outer.extent, fitting):
        count = min(fitting, outer.extent - first)
        rest = (outer._replace(extent=count), *inner) if count > 1 else inner
        yield from _cut(source + first * outer.source, target + first * outer.target, rest, limit)
