"""Flat ranges of memory as boxes, and what a slice may be."""

from __future__ import annotations

import math
import random

import pytest
import torch

from parallel.slices import TensorSlice, flat_range_boxes


def elements(size: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[int]:
    """Flat indices of the elements of the boxes, box after box, each in row-major order."""
    index = torch.arange(math.prod(size)).view(size)
    found: list[int] = []
    for offset, extent in boxes:
        found += index[tuple(slice(o, o + e) for o, e in zip(offset, extent, strict=True))].flatten().tolist()
    return found


@pytest.mark.parametrize("size", [(7,), (3, 5), (1, 6), (6, 1), (2, 3, 4), (2, 1, 3, 2)])
def test_boxes_hold_every_range_in_order(size: tuple[int, ...]) -> None:
    numel = math.prod(size)
    for start in range(numel + 1):
        for end in range(start, numel + 1):
            assert elements(size, flat_range_boxes(size, start, end)) == list(range(start, end))


@pytest.mark.parametrize(("axes", "most"), [(1, 1), (2, 3), (3, 5)])
def test_there_are_few_boxes(axes: int, most: int) -> None:
    rng = random.Random(axes)
    counts = set()
    for _ in range(500):
        size = tuple(rng.randint(1, 9) for _ in range(axes))
        start, end = sorted(rng.randint(0, math.prod(size)) for _ in range(2))
        counts.add(len(flat_range_boxes(size, start, end)))
    assert max(counts) == most


def test_an_empty_range_has_none() -> None:
    assert flat_range_boxes((4, 4), 5, 5) == []
    assert flat_range_boxes((4, 4), 6, 5) == []


@pytest.mark.parametrize(
    "data", [torch.zeros(2, 3), torch.zeros(12)[::2], torch.zeros(5)], ids=["two axes", "gaps", "too short"]
)
def test_a_slice_is_one_run_as_long_as_its_box(data: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="a"):
        TensorSlice("a", "weight", (4, 3), (1, 0), (2, 3), data, (0,))
