"""Boxes: where they meet, and whether they tile."""

from __future__ import annotations

import random
import time

import pytest

from checkpoint.boxes import Box, BoxIndex, cover_fault


def tile(shape: tuple[int, ...], cuts: int, seed: int) -> list[Box]:
    """A random tiling: boxes cut in two, again and again."""
    rng = random.Random(seed)
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(cuts):
        number = rng.randrange(len(boxes))
        offset, size = boxes[number]
        axis = rng.randrange(len(shape))
        if size[axis] < 2:
            continue
        at = rng.randrange(1, size[axis])
        low, high, moved = list(size), list(size), list(offset)
        low[axis], high[axis], moved[axis] = at, size[axis] - at, offset[axis] + at
        boxes[number] = Box(offset, tuple(low))
        boxes.append(Box(tuple(moved), tuple(high)))
    rng.shuffle(boxes)
    return boxes


SHAPES = [(97,), (40, 33), (9, 17, 11), (5, 4, 6, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(10))
def test_a_tiling_covers(shape: tuple[int, ...], seed: int) -> None:
    assert cover_fault(shape, tile(shape, 40, seed)) is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(10))
def test_a_missing_box_is_a_gap_at_one_of_its_elements(shape: tuple[int, ...], seed: int) -> None:
    boxes = tile(shape, 40, seed)
    lost = boxes.pop()
    fault = cover_fault(shape, boxes)
    assert fault is not None
    assert fault[0].startswith(f"gap: no piece holds element {list(lost.offset)} ")


@pytest.mark.parametrize("seed", range(10))
def test_an_overlap_that_makes_up_for_a_gap_is_found(seed: int) -> None:
    """The number of elements is right, yet some are held twice and others not at all."""
    boxes = tile((40, 33), 40, seed)
    number = max(range(len(boxes)), key=lambda n: boxes[n].numel)
    size = boxes[number].size
    boxes[number] = Box((0, 0) if any(boxes[number].offset) else (1, 0), size)
    assert cover_fault((40, 33), boxes) is not None


def test_the_same_box_twice_names_both() -> None:
    boxes = [Box((0, 0), (2, 4)), Box((2, 0), (2, 4)), Box((2, 0), (2, 4))]
    assert cover_fault((4, 4), boxes) == ("overlap: 2 pieces hold element [2, 0]", [1, 2])


@pytest.mark.parametrize("box", [Box((0, 3), (4, 2)), Box((-1, 0), (5, 4)), Box((0, 0), (4, 0))])
def test_a_box_outside_the_tensor_is_refused(box: Box) -> None:
    fault = cover_fault((4, 4), [box])
    assert fault is not None
    assert "does not fit" in fault[0]


def test_scalars_and_empty_tensors() -> None:
    assert cover_fault((), [Box((), ())]) is None
    assert cover_fault((), []) == ("gap: no piece holds element [] (pieces hold 0 of 1 elements)", [])
    assert cover_fault((3, 0), []) is None


def test_many_pieces_take_no_square_of_their_number() -> None:
    """100 000 pieces of one tensor: 5e9 pairs would take minutes; measured 0.4 s."""
    boxes = [Box((row, column * 8), (1, 8)) for row in range(10_000) for column in range(10)]
    begin = time.process_time()
    assert cover_fault((10_000, 80), boxes) is None
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("shape", SHAPES)
def test_meeting_gives_what_is_shared(shape: tuple[int, ...]) -> None:
    boxes = tile(shape, 30, 3)
    wanted = Box(tuple(n // 4 for n in shape), tuple(max(1, n // 2) for n in shape))
    shared = [box for _, box in BoxIndex(boxes, len(shape)).meeting(wanted)]
    assert sum(box.numel for box in shared) == wanted.numel
    assert all(w <= o and o + s <= w + n for box in shared for o, s, w, n in zip(*box, *wanted, strict=True))
