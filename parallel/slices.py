"""What a rank holds, in words that do not depend on the layout: boxes of logical tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorSlice:
    """A box of a logical tensor that this rank holds as one contiguous run of memory.

    Attributes:
        name: logical name, see docs/design.md.
        state: "weight", "master", "exp_avg", "exp_avg_sq", or whatever else an optimizer keeps.
        shape: of the whole logical tensor.
        offset: first index of the box.
        size: extent of the box.
        data: 1-D contiguous view of this rank's memory, row-major over the box. Loading writes into it.
        replicas: global ranks that hold this very box, sorted; this rank is one of them.
        optional: whether a checkpoint may lack it, since whoever loads knows what to fill it with.
    """

    name: str
    state: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    data: torch.Tensor
    replicas: tuple[int, ...]
    optional: bool = False

    def __post_init__(self) -> None:
        assert self.data.dim() == 1, f"{self.name}: data has {self.data.dim()} dimensions"
        assert self.data.is_contiguous(), f"{self.name}: data is not one run"
        assert self.data.numel() == math.prod(self.size), f"{self.name}: {self.data.numel()} != {self.size}"


def flat_range_boxes(
    size: tuple[int, ...], start: int, end: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Split the row-major flat range [start, end) of a block of extent `size` into boxes (offset, size).

    A two-dimensional block gives at most three: the rest of a row, whole rows, the start of a row.
    """
    if start >= end:
        return []
    if len(size) == 1:
        return [((start,), (end - start,))]
    row = math.prod(size[1:])
    first, last = start // row, (end - 1) // row
    boxes = []
    if first == last and end - start < row:
        return [
            ((first, *o), (1, *s))
            for o, s in flat_range_boxes(size[1:], start - first * row, end - first * row)
        ]
    if start % row:
        boxes += [((first, *o), (1, *s)) for o, s in flat_range_boxes(size[1:], start % row, row)]
        first += 1
    whole = end // row - first
    if whole:
        boxes.append(((first, *(0,) * (len(size) - 1)), (whole, *size[1:])))
    if end % row:
        boxes += [((end // row, *o), (1, *s)) for o, s in flat_range_boxes(size[1:], 0, end % row)]
    return boxes
