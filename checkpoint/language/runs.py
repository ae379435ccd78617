"""One dimension of a stored tensor: which stretches of it are which stretches of logical tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from checkpoint.language.rules import Fused, Interleaved, Rule, Sharded
from checkpoint.language.sizes import Facts


class Run(NamedTuple):
    """Stored indices `local + k * step` are logical indices `start + k`, for k < length.

    Attributes:
        part: of a fused tensor that it belongs to; None where there is one logical tensor.
    """

    part: str | None
    local: int
    step: int
    start: int
    length: int


class Stretch(NamedTuple):
    """A dimension: its runs, and how long it is in the logical tensor (of each part)."""

    runs: tuple[Run, ...]
    sizes: dict[str | None, int]


class Cut(NamedTuple):
    """Which piece of a dimension a rank holds: the `number`-th of pieces as long as `extents`."""

    number: int
    extents: tuple[int, ...]

    @property
    def offset(self) -> int:
        return sum(self.extents[: self.number])

    @property
    def length(self) -> int:
        return self.extents[self.number]

    @property
    def total(self) -> int:
        return sum(self.extents)


def stretch(rule: Rule, dim: int, num_dims: int, held: Cut, facts: Facts) -> Stretch:
    """What a rank's piece of dimension `dim` (of `num_dims`, in one tensor of the stack) holds.

    Raises:
        ValueError: sizes that contradict each other, with the numbers and the facts they came from.
    """
    fused = rule.fused if rule.fused and rule.fused.dim % num_dims == dim else None
    sizes: dict[str | None, int] = {None: held.total}
    if fused is None:
        runs = [Run(None, 0, 1, held.offset, held.length)]
    else:
        lengths = part_sizes(fused, held.total, facts)
        sharded = next((each for each in rule.sharded if each.dim % num_dims == dim), None)
        if sharded is not None and sharded.split == "each" and len(held.extents) > 1:
            runs = _cut_each(fused, sharded, lengths, held, facts)
        else:
            runs = _cut_whole(fused, lengths, facts.size(fused.repeat), held)
        sizes = {part: length * facts.size(fused.repeat) for part, length in lengths.items()}
    if rule.padded and rule.padded.dim % num_dims == dim:
        sizes, runs = _without_padding(facts.size(rule.padded.size), held.total, runs)
    if rule.interleaved and rule.interleaved.dim % num_dims == dim:
        runs = _deinterleaved(rule.interleaved, runs, sizes, facts)
    if fused is not None and not rule.has_parts:
        runs, sizes = _rejoined(runs, sizes)
    return Stretch(tuple(run for run in runs if run.length), sizes)


def part_sizes(fused: Fused, total: int, facts: Facts) -> dict[str | None, int]:
    """Rows of every part in one repetition; a part of -1 gets what the others leave.

    Raises:
        ValueError: the sizes do not add up to the `total` rows stored.
    """
    repeat = facts.size(fused.repeat)
    if fused.sizes is None:
        if repeat < 1 or total % (repeat * len(fused.names)):
            raise ValueError(
                f"{total} rows cannot be shared evenly by {repeat} x {len(fused.names)} parts "
                f"({', '.join(fused.names)})"
            )
        return dict.fromkeys(fused.names, total // repeat // len(fused.names))
    lengths = [facts.size(size) for size in fused.sizes]
    if lengths.count(-1) == 1 and repeat > 0 and total % repeat == 0:
        lengths[lengths.index(-1)] = total // repeat - sum(lengths) - 1
    if repeat * sum(lengths) != total or min(lengths) < 0 or repeat < 1:
        known = facts.explain(fused.repeat, *fused.sizes)
        raise ValueError(
            f"{total} rows are stored along the fused dimension, but `fused` says {repeat} x ("
            + " + ".join(f"{part} {length}" for part, length in zip(fused.names, lengths, strict=True))
            + f") = {repeat * sum(lengths)}"
            + (f" ({known})" if known else "")
        )
    return dict(zip(fused.names, lengths, strict=True))


def _cut_whole(fused: Fused, lengths: dict[str | None, int], repeat: int, held: Cut) -> list[Run]:
    """The parts follow each other `repeat` times; the rank holds one window of that."""
    runs = []
    low, high = held.offset, held.offset + held.length
    period = sum(lengths.values())
    if not period or low == high:
        return []
    for repetition in range(low // period, min(repeat, -(-high // period))):
        first = repetition * period
        for part, length in lengths.items():
            begin, end = max(low, first), min(high, first + length)
            if begin < end:
                start = repetition * length + begin - first
                runs.append(Run(part, begin - low, 1, start, end - begin))
            first += length
    return runs


def _cut_each(
    fused: Fused, sharded: Sharded, lengths: dict[str | None, int], held: Cut, facts: Facts
) -> list[Run]:
    """Every rank holds its piece of the first part, then its piece of the second, ..."""
    runs = []
    local = 0
    for part, length in lengths.items():
        widths = _part_widths(sharded, str(part), length, held, facts)
        runs.append(Run(part, local, 1, sum(widths[: held.number]), widths[held.number]))
        local += widths[held.number]
    if local != held.length:
        raise ValueError(
            f"rank {held.number} holds {held.length} rows, but the widths of its parts add up to {local}"
        )
    return runs


def _part_widths(sharded: Sharded, part: str, length: int, held: Cut, facts: Facts) -> list[int]:
    if isinstance(sharded.widths, dict):
        widths = [facts.size(width) for width in sharded.widths[part]]
        if len(widths) != len(held.extents) or sum(widths) != length:
            raise ValueError(
                f"the widths {widths} of part {part!r} should be {len(held.extents)} and add up to {length}"
            )
        return widths
    if any(extent * length % held.total for extent in held.extents):
        raise ValueError(
            f"ranks that hold {list(held.extents)} rows cannot share part {part!r} of {length} rows in that "
            "proportion: give `widths` of every part"
        )
    return [extent * length // held.total for extent in held.extents]


def _without_padding(size: int, total: int, runs: list[Run]) -> tuple[dict[str | None, int], list[Run]]:
    if size > total:
        raise ValueError(f"{total} rows are stored, fewer than the {size} that `padded` says are in use")
    clipped = [run._replace(length=max(0, min(run.length, size - run.start))) for run in runs]
    return {None: size}, clipped


def _deinterleaved(
    interleaved: Interleaved, runs: list[Run], sizes: dict[str | None, int], facts: Facts
) -> list[Run]:
    """Even stored rows of a block are its first half, odd ones its second."""
    block = facts.size(interleaved.block)
    for part, size in sizes.items():
        if not interleaved.parts or part in interleaved.parts:
            if block < 2 or block % 2 or size % block:
                known = facts.explain(interleaved.block)
                raise ValueError(
                    f"{size} rows cannot be blocks of {block} interleaved rows"
                    + (f" ({known})" if known else "")
                )
    found = []
    for run in runs:
        if interleaved.parts and run.part not in interleaved.parts:
            found.append(run)
            continue
        end = run.start + run.length
        for first in range(run.start // block * block, end, block):
            low, high = max(run.start, first), min(end, first + block)
            for odd in (0, 1):
                row = low + (low - first - odd) % 2
                if row < high:
                    start = first + odd * (block // 2) + (row - first) // 2
                    found.append(Run(run.part, run.local + row - run.start, 2, start, (high - row + 1) // 2))
    return found


def _rejoined(runs: Sequence[Run], sizes: dict[str | None, int]) -> tuple[list[Run], dict[str | None, int]]:
    """The parts as one logical tensor: all of the first, then all of the second, ..."""
    before, starts = 0, {}
    for part, size in sizes.items():
        starts[part] = before
        before += size
    joined = [run._replace(part=None, start=run.start + starts[run.part]) for run in runs]
    return joined, {None: before}
