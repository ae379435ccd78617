"""Looking at a stored tensor's memory as another shape: flat storage, grouped expert matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from checkpoint.boxes import Box
from checkpoint.language.sizes import Facts, Size
from checkpoint.manifest import ITEM_SIZES, Piece
from checkpoint.source import SourceTensor

Shape = tuple[int, ...]


def viewed(shape: Shape, view: tuple[Size, ...], facts: Facts) -> Shape:
    """The shape that `view` makes of `shape`; one size may be -1, whatever is left.

    Raises:
        ValueError: the numbers of elements differ.
    """
    if not view:
        return shape
    sizes = [facts.size(size) for size in view]
    others = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and others > 0 and math.prod(shape) % others == 0:
        sizes[sizes.index(-1)] = math.prod(shape) // others
    if math.prod(sizes) != math.prod(shape) or min(sizes) < 0:
        known = facts.explain(*view)
        raise ValueError(
            f"`view` makes {sizes} of the shape {list(shape)}" + (f" ({known})" if known else "")
        )
    return tuple(sizes)


def viewed_tensor(tensor: SourceTensor, shape: Shape) -> SourceTensor:
    """The same bytes as a tensor of another shape: a piece becomes as many boxes as that takes."""
    pieces = tuple(each for piece in tensor.pieces for each in _viewed_piece(piece, tensor.shape, shape))
    return replace(tensor, shape=shape, pieces=pieces)


def _viewed_piece(piece: Piece, old: Shape, new: Shape) -> Iterator[Piece]:
    item = ITEM_SIZES[piece.dtype]
    found = [
        (box, offset + done)
        for first, length, offset in _stretches(piece, old)
        for box, done in _boxes_of_range(first, length, new)
    ]
    kept = piece.hash if len(found) == 1 else None
    for box, offset in found:
        yield Piece(piece.file, piece.start + offset * item, piece.dtype, box, kept)


def _stretches(piece: Piece, shape: Shape) -> Iterator[tuple[int, int, int]]:
    """Every run that is contiguous in the tensor as well as in the file: the element of the tensor it starts
    at, how many it has, the element of the piece it starts at."""
    strides = piece.strides or _row_major(piece.box.size)
    own = _row_major(shape)
    inner, length = len(shape), 1
    while inner and strides[inner - 1] == length:
        inner -= 1
        length *= piece.box.size[inner]
        if piece.box.size[inner] != shape[inner]:
            break
    for index in itertools.product(*(range(size) for size in piece.box.size[:inner])):
        at = (*index, *(0 for _ in shape[inner:]))
        first = sum((o + i) * s for o, i, s in zip(piece.box.offset, at, own, strict=True))
        yield first, length, sum(i * s for i, s in zip(at, strides, strict=True))


def _row_major(shape: Shape) -> Shape:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _boxes_of_range(first: int, length: int, shape: Shape) -> Iterator[tuple[Box, int]]:
    """Elements [first, first + length) of a row-major tensor as boxes, with how many precede each."""
    own = _row_major(shape)
    done = 0
    while done < length:
        at, rest = first + done, length - done
        axis = next(
            a for a in range(len(shape) + 1) if a == len(shape) or (at % own[a] == 0 and own[a] <= rest)
        )
        if axis == len(shape):
            yield Box((), ()), done  # a scalar
            return
        index = tuple(at // stride % size for stride, size in zip(own, shape, strict=True))
        count = min(rest // own[axis], shape[axis] - index[axis])
        size = (*(1 for _ in shape[:axis]), count, *shape[axis + 1 :])
        yield Box(index, size), done
        done += count * own[axis]
