"""Stored pieces seen through the language: which bytes of a file are which box of a logical tensor.

A reader says which box of a *stored* tensor a piece is, a `Part` says which box of a *logical* tensor a
region of the stored one is. Where the two meet lies a box of the logical tensor, in the same file, with other
strides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from checkpoint.boxes import Box, BoxIndex
from checkpoint.manifest import ITEM_SIZES, Piece
from checkpoint.plan import row_major
from checkpoint.source import Part

_FEW = 4  # pieces: below, arrays cost more than they save


def compose(pieces: Sequence[Piece], part: Part, index: BoxIndex | None = None) -> list[Piece]:
    """The pieces of the logical tensor that the stored pieces hold of one part.

    Args:
        pieces: of the stored tensor; boxes count in it.
        index: of their boxes, where many parts ask for the same pieces.

    Returns:
        Pieces whose boxes count in the logical tensor. One that is all of a stored piece keeps its hash.
    """
    if index is not None and len(pieces) > _FEW:
        pieces = [pieces[number] for number, _ in index.meeting(region(part))]
    return [shared for piece in pieces if (shared := _shared(piece, part)) is not None]


def compose_all(pieces: Sequence[Piece], parts: Iterable[Part]) -> Iterator[tuple[Part, list[Piece]]]:
    """`compose` for all parts of one stored tensor."""
    index = BoxIndex([p.box for p in pieces], len(pieces[0].box.size)) if len(pieces) > _FEW else None
    for part in parts:
        yield part, compose(pieces, part, index)


def region(part: Part) -> Box:
    """The smallest box of the stored tensor that holds the part."""
    size = [1] * len(part.start)
    for extent, axis in zip(part.box.size, part.axes, strict=True):
        size[axis] = 1 + (extent - 1) * part.steps[axis] if extent else 0
    return Box(part.start, tuple(size))


def _shared(piece: Piece, part: Part) -> Piece | None:
    """What one piece holds of the part; None when that is nothing."""
    stored_strides = row_major(piece.box.size) if piece.strides is None else piece.strides
    skipped = 0  # elements of the file from the piece's first one to the shared box's first one
    for axis, at in enumerate(part.start):
        if axis not in part.axes:
            inside = at - piece.box.offset[axis]
            if not 0 <= inside < piece.box.size[axis]:
                return None
            skipped += inside * stored_strides[axis]
    offset, size, strides = [], [], []
    for first, extent, axis in zip(part.box.offset, part.box.size, part.axes, strict=True):
        step, at = part.steps[axis], part.start[axis] - piece.box.offset[axis]
        low = max(0, -(at // step))  # the first element at or behind the piece's begin: -at / step, upwards
        high = min(extent, (piece.box.size[axis] - 1 - at) // step + 1)
        if low >= high:
            return None
        skipped += (at + low * step) * stored_strides[axis]
        offset.append(first + low)
        size.append(high - low)
        strides.append(step * stored_strides[axis])
    return _piece(piece, skipped, Box(tuple(offset), tuple(size)), tuple(strides))


def _piece(stored: Piece, skipped: int, box: Box, strides: tuple[int, ...]) -> Piece:
    dense = row_major(box.size)
    plain = strides == dense or all(
        extent == 1 or own == packed for extent, own, packed in zip(box.size, strides, dense, strict=True)
    )
    start = stored.start + skipped * ITEM_SIZES[stored.dtype]
    # all elements of the stored piece, hence from the same first byte to the same last one
    digest = stored.hash if box.numel == stored.box.numel else None
    return Piece(stored.file, start, stored.dtype, box, digest, None if plain else strides)
