"""One map after another: from a stored tensor to a whole source tensor, from that to logical ones."""

from __future__ import annotations

from collections.abc import Iterator

from checkpoint.boxes import Box
from checkpoint.source import Part


def compose(outer: Part, inner: Part) -> Iterator[Part]:
    """The part of a stored tensor that is a box of a logical one, where both meet; nothing if they do not.

    Args:
        outer: stored tensor -> the tensor `outer.name`.
        inner: the tensor `outer.name`, whole -> a logical one.
    """
    num_axes = len(outer.axes)
    first, count = [0] * num_axes, [1] * num_axes  # of the inner box's elements, along the middle's axes
    length = dict(zip(inner.axes, inner.box.size, strict=True))
    for axis in range(num_axes):
        low, high = outer.box.offset[axis], outer.box.offset[axis] + outer.box.size[axis]
        step = inner.steps[axis]
        begin = max(0, -(-(low - inner.start[axis]) // step))
        end = min(length.get(axis, 1), -(-(high - inner.start[axis]) // step))
        if begin >= end:
            return
        first[axis], count[axis] = begin, end - begin
    start, steps = list(outer.start), list(outer.steps)
    for axis in range(num_axes):
        stored = outer.axes[axis]
        middle = inner.start[axis] + first[axis] * inner.steps[axis]
        start[stored] += (middle - outer.box.offset[axis]) * outer.steps[stored]
        steps[stored] = outer.steps[stored] * inner.steps[axis]
    box = Box(
        tuple(inner.box.offset[i] + first[axis] for i, axis in enumerate(inner.axes)),
        tuple(count[axis] for axis in inner.axes),
    )
    axes = tuple(outer.axes[axis] for axis in inner.axes)
    yield Part(inner.name, inner.shape, box, tuple(start), axes, tuple(steps))
