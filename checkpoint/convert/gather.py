"""Filling a panel of an output region from the pieces of a source."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from checkpoint.boxes import Box
from checkpoint.convert.output import Region
from checkpoint.manifest import ITEM_SIZES, LogicalTensor
from checkpoint.plan import Copy, plan
from checkpoint.source import Part
from checkpoint.streaming.bits import Bits, as_floats, bits_type, rounded
from checkpoint.streaming.box_reader import BoxReader
from checkpoint.streaming.panels import Files

Tensors = Mapping[tuple[str, str], LogicalTensor]


class Gatherer:
    """Fills panels of one region. For one thread.

    Attributes:
        widest: bytes that an element takes at most while it is read, averaged and rounded.
    """

    def __init__(self, region: Region, tensors: Tensors, files: Files) -> None:
        self._region = region
        self._tensors = tensors
        self._files = files
        self._readers: dict[str, BoxReader] = {}
        self.widest = max([ITEM_SIZES[region.dtype], *(self._width(part) for part in region.parts)])
        held = sum(part.box.numel for part in region.parts)
        self._is_covered = held == int(np.prod(region.shape, dtype=np.int64))

    def fill(self, panel: Box, into: Bits) -> int:
        """Fill `into`, which has the panel's shape and holds bits of the region's dtype.

        Returns:
            Bytes of the source that were needed.

        Raises:
            OSError: a source file is not there, or ends too early.
        """
        if not self._is_covered:
            into[...] = 0
        needed = 0
        for part in self._region.parts:
            found = _meeting(part, panel)
            if found is None:
                continue
            logical, places = found
            tensor = self._tensors[part.name, self._region.state]
            needed += logical.numel * ITEM_SIZES[tensor.dtype]
            if not self._copied_in_place(tensor, part, logical, panel, into):
                self._gathered(tensor, part, logical, _view(into, places))
        return needed

    def _width(self, part: Part) -> int:
        tensor = self._tensors[part.name, self._region.state]
        is_copied = tensor.dtype == self._region.dtype and not tensor.average
        return max(ITEM_SIZES[tensor.dtype], 1 if is_copied else ITEM_SIZES["float32"])

    def _copied_in_place(
        self, tensor: LogicalTensor, part: Part, logical: Box, panel: Box, into: Bits
    ) -> bool:
        """Read runs of bytes straight into the panel, where all of the part is such runs."""
        plain = part.axes == tuple(range(len(part.start))) and all(step == 1 for step in part.steps)
        if not plain or tensor.average or any(p.dtype != self._region.dtype for p in tensor.pieces):
            return False
        moved = (s - o + b for s, o, b in zip(part.start, part.box.offset, logical.offset, strict=True))
        place = tuple(m - p for m, p in zip(moved, panel.offset, strict=True))
        box = _view(into, tuple(slice(at, at + size) for at, size in zip(place, logical.size, strict=True)))
        if not box.flags.c_contiguous:
            return False
        copies = list(plan(tensor, [(0, logical)]))
        if not all(_is_run(copy) for copy in copies):
            return False
        flat = memoryview(box.reshape(-1)).cast("B")  # type: ignore[arg-type]  # numpy's arrays are buffers
        item = ITEM_SIZES[self._region.dtype]
        for copy in copies:
            start, size = copy.target_start * item, copy.numel * item
            at = copy.piece.start + copy.source_start * item
            _read(self._files.descriptor(copy.piece.file), flat[start : start + size], at, copy.piece.file)
        return True

    def _gathered(self, tensor: LogicalTensor, part: Part, logical: Box, view: Bits) -> None:
        reader = self._readers.get(part.name)
        if reader is None:
            reader = self._readers[part.name] = BoxReader(tensor)
        bits = converted(reader.read(self._files, logical), reader.dtype, self._region.dtype)
        single = tuple(slice(None) if axis in part.axes else 0 for axis in range(len(part.start)))
        kept = sorted(part.axes)
        view[single] = bits.transpose([part.axes.index(axis) for axis in kept])


def converted(bits: Bits, dtype: str, to: str) -> Bits:
    """The same numbers in another dtype, rounded to nearest even.

    Raises:
        ValueError: between these two nobody rounds.
    """
    if dtype == to:
        return bits
    if to == "float32":
        return as_floats(bits, dtype).astype(np.float32).view(np.uint32)
    if to == "float64":
        return as_floats(bits, dtype).astype(np.float64).view(np.uint64)
    floats = as_floats(bits, dtype).astype(np.float32).view(np.uint32)
    found = rounded(floats, "float32", to)
    if found is None:
        raise ValueError(f"numbers of {dtype} cannot be written as {to}: choose bfloat16, float16 or float32")
    return found


def empty_panel(panel: Box, dtype: str, buffer: Bits) -> Bits:
    """The start of a buffer of bytes as an array of the panel's shape."""
    kind = bits_type(dtype)
    return buffer[: panel.numel * kind.itemsize].view(kind).reshape(panel.size)


def _view(array: Bits, places: tuple[slice, ...]) -> Bits:
    """Of a scalar, numpy's own indexing would give a copy."""
    return array[places] if places else array


def _meeting(part: Part, panel: Box) -> tuple[Box, tuple[slice, ...]] | None:
    """What a part has in a panel of the stored tensor: the logical box, and its places in the panel."""
    offset, size = list(part.box.offset), list(part.box.size)
    places = []
    for axis, (low, extent) in enumerate(zip(panel.offset, panel.size, strict=True)):
        start, step = part.start[axis], part.steps[axis]
        if axis not in part.axes:
            if not low <= start < low + extent:
                return None
            places.append(slice(start - low, start - low + 1))
            continue
        logical = part.axes.index(axis)
        first = max(0, -(-(low - start) // step))
        end = min(part.box.size[logical], -(-(low + extent - start) // step))
        if first >= end:
            return None
        offset[logical] += first
        size[logical] = end - first
        places.append(slice(start + first * step - low, start + (end - 1) * step - low + 1, step))
    return Box(tuple(offset), tuple(size)), tuple(places)


def _is_run(copy: Copy) -> bool:
    return not copy.axes or (len(copy.axes) == 1 and copy.axes[0].source == 1 == copy.axes[0].target)


def _read(descriptor: int, into: memoryview, at: int, name: str) -> None:
    while len(into):
        count = os.preadv(descriptor, [into], at)
        if count == 0:
            raise OSError(f"{name} ends at byte {at}, {len(into)} more are needed")
        at += count
        into = into[count:]
