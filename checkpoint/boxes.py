"""Boxes of a logical tensor: where they meet, and whether they cover it exactly once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


class Box(NamedTuple):
    """The elements from `offset` (inclusive) to `offset + size` (exclusive) of a tensor."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{o + s}" for o, s in zip(self.offset, self.size, strict=True)) + "]"


class BoxIndex:
    """Many boxes of one tensor as arrays, so that questions about all of them need no Python loop."""

    def __init__(self, boxes: Sequence[Box], num_axes: int) -> None:
        self.start: IntArray = np.array([b.offset for b in boxes], np.int64).reshape(len(boxes), num_axes)
        self.end: IntArray = self.start + np.array([b.size for b in boxes], np.int64).reshape(
            len(boxes), num_axes
        )

    def meeting(self, box: Box) -> list[tuple[int, Box]]:
        """The number of every box that shares elements with `box`, and what they share."""
        low = np.maximum(self.start, np.array(box.offset, np.int64))
        high = np.minimum(self.end, np.array(box.offset, np.int64) + np.array(box.size, np.int64))
        found = np.flatnonzero((low < high).all(axis=1))
        sizes = (high - low)[found].tolist()
        return [
            (index, Box(tuple(offset), tuple(size)))
            for index, offset, size in zip(found.tolist(), low[found].tolist(), sizes, strict=True)
        ]

    def holding(self, point: Sequence[int]) -> list[int]:
        """The numbers of the boxes that contain one element."""
        at = np.array(point, np.int64)
        return np.flatnonzero(((self.start <= at) & (at < self.end)).all(axis=1)).tolist()


def cover_fault(shape: tuple[int, ...], boxes: Sequence[Box]) -> tuple[str, list[int]] | None:
    """Why `boxes` do not cover a tensor of `shape` exactly once; None when they do.

    The number of boxes over each element is a step function, fixed by its mixed differences: a box adds +1 or
    -1 at each of its 2^d corners. The boxes tile the tensor if and only if these corners add up to the
    tensor's own, so one sort of n * 2^d numbers answers. The lexicographically first corner where the sums
    differ is an element with a wrong count, because no corner that precedes it in every axis differs.

    Returns:
        A phrase that names the first gap or overlap, and the numbers of the boxes that lie there.
    """
    if math.prod(shape) == 0:
        return None
    for number, box in enumerate(boxes):
        if len(box.offset) != len(shape) or len(box.size) != len(shape):
            return f"the piece {box} does not have the axes of the shape {list(shape)}", [number]
    index = BoxIndex(boxes, len(shape))
    outside = (index.start < 0) | (index.end <= index.start) | (index.end > np.array(shape, np.int64))
    for number in np.flatnonzero(outside.any(axis=1)).tolist():
        return f"the piece {boxes[number]} does not fit into the shape {list(shape)}", [number]
    point, excess = _first_difference(shape, index)
    if excess == 0:
        return None
    where = f"element {list(point)}"
    if excess < 0:
        held = sum(box.numel for box in boxes)
        return f"gap: no piece holds {where} (pieces hold {held} of {math.prod(shape)} elements)", []
    found = index.holding(point)
    return f"overlap: {len(found)} pieces hold {where}", found


def _first_difference(shape: tuple[int, ...], index: BoxIndex) -> tuple[tuple[int, ...], int]:
    """The first element whose count is not one, and by how much; 0 when there is none."""
    places = np.array(shape, np.int64) + 1  # a corner may lie just behind the last element
    strides = np.array([math.prod(places[axis + 1 :].tolist()) for axis in range(len(shape))], np.int64)
    starts = np.concatenate([index.start, np.zeros((1, len(shape)), np.int64)])
    ends = np.concatenate([index.end, np.array([shape], np.int64)])
    weights = np.ones(len(starts), np.int64)
    weights[-1] = -1  # the tensor itself: subtracted
    corners = np.zeros((len(starts), 1), np.int64)
    signs = weights[:, None]
    for axis in range(len(shape)):
        low = corners + starts[:, axis : axis + 1] * strides[axis]
        high = corners + ends[:, axis : axis + 1] * strides[axis]
        corners = np.concatenate([low, high], axis=1)
        signs = np.concatenate([signs, -signs], axis=1)
    keys, inverse = np.unique(corners.ravel(), return_inverse=True)
    sums = np.zeros(len(keys), np.int64)
    np.add.at(sums, inverse.ravel(), signs.ravel())
    wrong = np.flatnonzero(sums)
    if not len(wrong):
        return (0,) * len(shape), 0
    first = int(keys[wrong[0]])
    point = tuple(int(first // stride % place) for stride, place in zip(strides, places, strict=True))
    return point, int(sums[wrong[0]])
