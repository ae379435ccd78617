"""The invariant that gives away a damaged optimizer state: a low-precision weight is its rounded master."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from checkpoint.boxes import Box, BoxIndex
from checkpoint.plan import row_major
from parallel.slices import TensorSlice

_CHUNK = 1 << 24  # elements compared at a time, to bound the memory


def rounding_faults(slices: Sequence[TensorSlice]) -> list[str]:
    """One line for every master here whose weight, as far as it is here too, is not the rounded master.

    Compares bits (any NaN equals any NaN); only bf16 and fp16 weights are checked.
    """
    weights: dict[str, list[TensorSlice]] = {}
    for piece in slices:
        if piece.state == "weight" and piece.data.dtype in (torch.bfloat16, torch.float16):
            weights.setdefault(piece.name, []).append(piece)
    faults = []
    for master in slices:
        held = weights.get(master.name, [])
        if master.state != "master" or not held or not master.data.numel():
            continue
        index = BoxIndex([Box(weight.offset, weight.size) for weight in held], len(master.shape))
        for number, shared in index.meeting(Box(master.offset, master.size)):
            fault = _compare(held[number], master, shared)
            if fault is not None:
                faults.append(fault)
    return faults


def _compare(weight: TensorSlice, master: TensorSlice, shared: Box) -> str | None:
    count, first = 0, ""
    for part in _parts(shared):
        low, high = _view(weight, part), _view(master, part)
        rounded = high.to(low.dtype)
        differ = rounded.view(torch.int16) != low.view(torch.int16)
        differ &= ~(torch.isnan(rounded) & torch.isnan(low))
        found = int(differ.sum())
        if found and not count:
            at = torch.nonzero(differ)[0].tolist()
            place = [a + o for a, o in zip(at, part.offset, strict=True)]
            first = f"first at {place}: weight {low[tuple(at)].item()}, master {high[tuple(at)].item()}"
        count += found
    if not count:
        return None
    return (
        f"{master.name} {shared}: the weight ({weight.data.dtype}) is not the rounded master in {count} of "
        f"{shared.numel} elements, {first}"
    )


def _parts(box: Box) -> Iterator[Box]:
    if not box.size:
        yield box
        return
    rows = max(1, _CHUNK * box.size[0] // box.numel)
    for first in range(0, box.size[0], rows):
        count = min(rows, box.size[0] - first)
        yield Box((box.offset[0] + first, *box.offset[1:]), (count, *box.size[1:]))


def _view(piece: TensorSlice, box: Box) -> torch.Tensor:
    """The part of the piece's memory that is `box`, in the box's shape."""
    strides = row_major(piece.size)
    start = sum((o - p) * s for o, p, s in zip(box.offset, piece.offset, strides, strict=True))
    return piece.data.detach().as_strided(box.size, strides, piece.data.storage_offset() + start)
