"""What the bytes of a tensor say about it: one pass, panel by panel, and what it has found so far."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from checkpoint.boxes import Box, BoxIndex
from checkpoint.manifest import LogicalTensor, Piece
from checkpoint.streaming.bits import Bits, as_floats, negative, nonfinite, rounded
from checkpoint.streaming.panels import Files, sub_box

_PLACES = 3
_WINDOW = 32  # numbers in a row that are taken for the same place when they are equal
_LOW_PRECISION = ("bfloat16", "float16")


@dataclass
class Difference:
    """Where two copies of the same numbers differ.

    Attributes:
        count: elements whose bits differ, of the `compared` ones.
        largest: greatest absolute difference; of numbers that are none, NaN does not count.
        places: the first few, as (index in the logical tensor, one value, the other).
        flipped: bits that differ, where one element does.
        shift: the one copy holds at i what the other holds at i + shift, as far as that was looked for.
        files: of the pieces that differ.
    """

    compared: int = 0
    count: int = 0
    largest: float = 0.0
    places: list[tuple[list[int], float, float]] = field(default_factory=list)
    flipped: int = 0
    shift: int | None = None
    files: dict[str, None] = field(default_factory=dict)

    def add(self, other: Difference) -> None:
        self.compared += other.compared
        self.flipped = other.flipped if not self.count else self.flipped
        self.count += other.count
        self.largest = max(self.largest, other.largest)
        self.places = sorted(self.places + other.places)[:_PLACES]
        self.shift = other.shift if self.shift is None else self.shift
        self.files |= other.files


@dataclass
class Tally:
    """What has been found in one tensor, over all panels.

    Attributes:
        nonfinite, negative: how many elements, and the first such place.
        replicas: of each replica.
        rounding: of the master, rounded, and the weight.
        hashes: of damaged pieces, a line each with its file.
        unread: pieces that could not be read, likewise.
    """

    nonfinite: tuple[int, list[int]] = (0, [])
    negative: tuple[int, list[int]] = (0, [])
    replicas: dict[int, Difference] = field(default_factory=dict)
    rounding: Difference = field(default_factory=Difference)
    hashes: list[tuple[str, str]] = field(default_factory=list)
    unread: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.nonfinite = _sum(self.nonfinite, other.nonfinite)
        self.negative = _sum(self.negative, other.negative)
        for number, difference in other.replicas.items():
            self.replicas.setdefault(number, Difference()).add(difference)
        self.rounding.add(other.rounding)
        self.hashes += other.hashes
        self.unread += other.unread


class Checker:
    """The checks of one tensor's panels.

    Args:
        weight: that the tensor, a master, must round to; None where there is nothing to compare.
    """

    def __init__(self, tensor: LogicalTensor, weight: LogicalTensor | None) -> None:
        self.tensor = tensor
        axes = len(tensor.shape)
        self._replicas = [
            (pieces, BoxIndex([piece.box for piece in pieces], axes)) for pieces in tensor.replicas
        ]
        self._weight = weight
        self._weights = BoxIndex([piece.box for piece in weight.pieces], axes) if weight is not None else None

    def check(self, files: Files, piece: Piece, box: Box, bits: Bits) -> Tally:
        """All but the hash of one panel, which holds `box` and was read from `piece`."""
        tally = Tally()
        if (where := nonfinite(bits, piece.dtype)) is not None:
            tally.nonfinite = _first(where, box)
        if self.tensor.state == "exp_avg_sq" and (where := negative(bits, piece.dtype)) is not None:
            tally.negative = _first(where, box)
        for number, (pieces, index) in enumerate(self._replicas):
            difference = tally.replicas.setdefault(number, Difference())
            for other, shared in index.meeting(box):
                copy = pieces[other]
                here = sub_box(bits, box, shared)
                difference.add(_compare(here, piece.dtype, files.read(copy, shared), copy, shared))
        if self._weight is not None and self._weights is not None:
            for other, shared in self._weights.meeting(box):
                copy = self._weight.pieces[other]
                expected = rounded(sub_box(bits, box, shared), piece.dtype, copy.dtype)
                if expected is None:
                    continue
                found = files.read(copy, shared)
                tally.rounding.add(_compare(expected, copy.dtype, found, copy, shared, shifts=True))
        return tally


def weight_of(master: LogicalTensor, weight: LogicalTensor | None) -> LogicalTensor | None:
    """The weight that a master must round to; None where the rule says nothing."""
    if weight is None or master.state != "master" or master.average or weight.average:
        return None
    if weight.shape != master.shape or weight.dtype not in (*_LOW_PRECISION, master.dtype):
        return None
    return weight


def _compare(
    here: Bits, dtype: str, there: Bits, copy: Piece, box: Box, *, shifts: bool = False
) -> Difference:
    """Compare bits, except that any two that are not a number are equal."""
    if copy.dtype != dtype:
        here, there, dtype = _as_float64(here, dtype), _as_float64(there, copy.dtype), "float64"
    differ = here != there
    if not differ.any():
        return Difference(compared=box.numel)
    one, other = as_floats(here[differ], dtype), as_floats(there[differ], dtype)
    number = ~(np.isnan(one) & np.isnan(other))
    differ[differ] = number
    one, other = one[number].astype(np.float64), other[number].astype(np.float64)
    if not len(one):
        return Difference(compared=box.numel)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(one - other)
    indices = np.argwhere(differ)[:_PLACES] + np.array(box.offset, np.int64)
    shift = None
    if shifts and len(one) > box.numel // 2:
        shift = _shift(here.ravel(), there.ravel())
    return Difference(
        compared=box.numel,
        count=len(one),
        largest=float(np.nan_to_num(apart, nan=0.0, posinf=np.inf).max()),
        places=[
            (place, float(a), float(b)) for place, a, b in zip(indices.tolist(), one, other, strict=False)
        ],
        flipped=_flipped(here[differ], there[differ]),
        shift=shift,
        files={copy.file: None},
    )


def _as_float64(bits: Bits, dtype: str) -> Bits:
    return as_floats(bits, dtype).astype(np.float64).view(np.uint64)


def _flipped(here: Bits, there: Bits) -> int:
    return (int(here[0]) ^ int(there[0])).bit_count() if len(here) == 1 else 0


def _shift(here: Bits, there: Bits) -> int | None:
    """How far behind its place in one run of numbers a window from the middle of the other lies."""
    middle = len(here) // 2
    window = here[middle : middle + _WINDOW]
    if len(window) < _WINDOW or (window == window[0]).all():
        return None
    for start in np.flatnonzero(there == window[0]).tolist():
        if np.array_equal(there[start : start + _WINDOW], window):
            return int(start - middle)
    return None


def _first(where: npt.NDArray[np.bool_], box: Box) -> tuple[int, list[int]]:
    first = np.unravel_index(int(np.argmax(where)), where.shape)
    return int(np.count_nonzero(where)), [int(i) + o for i, o in zip(first, box.offset, strict=True)]


def _sum(one: tuple[int, list[int]], other: tuple[int, list[int]]) -> tuple[int, list[int]]:
    if not (one[0] and other[0]):
        return one if one[0] else other
    return one[0] + other[0], min(one[1], other[1])
