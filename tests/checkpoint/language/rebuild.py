"""Puts logical tensors together again from stored arrays and what `place` says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from checkpoint.boxes import Box, cover_fault
from checkpoint.language.place import Placed
from checkpoint.source import Part, SourceTensor

Array = np.ndarray
Stored = list[tuple[SourceTensor, Array]]


def store(
    name: str, array: Array, at: Mapping[str, int] | None = None, state: str = "weight"
) -> tuple[SourceTensor, Array]:
    """A stored array without a file: the language reads names, shapes and coordinates only."""
    return SourceTensor(name, state, array.shape, (), at or {}), array


def region(part: Part, stored: Array) -> Array:
    """The stored elements of a part, along the logical axes."""
    lengths = dict(zip(part.axes, part.box.size, strict=True))
    index = tuple(
        slice(start, start + lengths[axis] * step, step) if axis in lengths else start
        for axis, (start, step) in enumerate(zip(part.start, part.steps, strict=True))
    )
    kept = sorted(lengths)
    return stored[index].transpose([kept.index(axis) for axis in part.axes])


def rebuild(placed: Sequence[Placed], stored: Stored) -> dict[tuple[str, str], Array]:
    """(logical name, state) -> array: primaries must cover it exactly once, replicas must agree."""
    arrays = {id(tensor): array for tensor, array in stored}
    found: dict[tuple[str, str], Array] = {}
    boxes: dict[tuple[str, str], list[Box]] = {}
    for each in placed:
        array = arrays.get(id(each.source))
        if array is None:  # `view` makes a new source
            array = next(
                a
                for t, a in stored
                if (t.name, t.state, t.at) == (each.source.name, each.source.state, each.source.at)
            )
            array = array.reshape(each.source.shape)
        for part in each.parts:
            key = (part.name, each.source.state)
            whole = found.setdefault(key, np.full(part.shape, np.nan))
            assert whole.shape == part.shape
            if each.role == "primary":
                boxes.setdefault(key, []).append(part.box)
                whole[_slices(part.box)] = region(part, array)
    for key, whole in found.items():
        fault = cover_fault(whole.shape, boxes.get(key, []))
        assert fault is None, (key, fault)
    for each in placed:
        if each.role == "replica":
            for part in each.parts:
                held = found[part.name, each.source.state][_slices(part.box)]
                np.testing.assert_array_equal(region(part, arrays[id(each.source)]), held)
    return found


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(box.offset, box.size, strict=True))


def same(
    found: Mapping[tuple[str, str], Array], expected: Mapping[str, Array], state: str = "weight"
) -> None:
    """Exactly these tensors with exactly these elements."""
    assert {name for name, each in found if each == state} == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name, state], array, err_msg=name)
