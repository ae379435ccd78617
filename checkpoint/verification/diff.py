"""Comparing two checkpoints of any formats and layouts, tensor by tensor, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from checkpoint.boxes import Box
from checkpoint.manifest import ITEM_SIZES, PARAMETER_STATES, LogicalTensor, Manifest
from checkpoint.opening import Opened, open_checkpoint
from checkpoint.streaming.ahead import run_ahead
from checkpoint.streaming.bits import Bits, as_floats, rounded
from checkpoint.streaming.box_reader import BoxReader
from checkpoint.streaming.panels import PANEL_BYTES, Files, cut
from checkpoint.verification.sweep import TASK_BYTES, WORKERS, Progress
from checkpoint.verify import cover_problem

Verdict = Literal["equal", "equal after rounding", "different", "only in A", "only in B", "shape", "damaged"]


@dataclass(frozen=True)
class TensorDifference:
    """How one state of one logical tensor compares.

    Attributes:
        verdict: "equal" bit for bit; "equal after rounding" what one holds to the other's lower precision;
            "damaged" cannot be read, and `note` says why.
        shapes, dtypes: in A and in B; None where it is not there.
        count: numbers that differ, of `numel`; after rounding where that makes them equal or differ.
        max_abs, max_rel: greatest absolute difference, and greatest one divided by the larger number.
        cosine: of the two tensors as vectors; None where one is zero, or not compared.
        note: what else is to be known.
    """

    name: str
    state: str
    verdict: Verdict
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[str | None, str | None]
    numel: int = 0
    count: int = 0
    max_abs: float | None = None
    max_rel: float | None = None
    cosine: float | None = None
    note: str = ""

    @property
    def is_equal(self) -> bool:
        """Whether the numbers are the same, as far as the precisions allow."""
        return self.verdict in ("equal", "equal after rounding")


def diff_checkpoints(
    a: Path | str | Opened,
    b: Path | str | Opened,
    *,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> list[TensorDifference]:
    """Compare every state of every logical tensor.

    A master that one lacks is its fp32 weight, and a weight that one lacks is its master.

    Args:
        a, b: as `open_checkpoint` takes them, or what that returned.

    Returns:
        Sorted by name and state.

    Raises:
        ValueError: one of them cannot be opened, or is damaged; all such problems.
    """
    ones = [path if isinstance(path, Opened) else open_checkpoint(path) for path in (a, b)]
    problems = [problem for opened in ones for problem in opened.problems]
    if problems:
        raise ValueError("damaged, hence not compared:\n  " + "\n  ".join(problems))
    with ones[0].reading() as gone, ones[1].reading() as also_gone:
        if gone or also_gone:
            raise ValueError("\n".join([*gone, *also_gone]))
        return _diff(ones[0], ones[1], workers, progress)


@dataclass
class _Pair:
    """Two tensors to compare, and what has been found so far."""

    name: str
    state: str
    one: LogicalTensor
    other: LogicalTensor
    note: str = ""
    found: _Found = field(default_factory=lambda: _Found())

    def __post_init__(self) -> None:
        self.readers = (BoxReader(self.one), BoxReader(self.other))


@dataclass
class _Found:
    """Sums over panels: numbers that differ, and products of the two vectors."""

    differ: int = 0
    differ_rounded: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    products: tuple[float, float, float] = (0.0, 0.0, 0.0)
    problem: str = ""

    def add(self, other: _Found) -> None:
        self.differ += other.differ
        self.differ_rounded += other.differ_rounded
        self.max_abs = max(self.max_abs, other.max_abs)
        self.max_rel = max(self.max_rel, other.max_rel)
        one, two, both = (x + y for x, y in zip(self.products, other.products, strict=True))
        self.products = (one, two, both)
        self.problem = self.problem or other.problem


def _diff(a: Opened, b: Opened, workers: int, progress: Progress | None) -> list[TensorDifference]:
    pairs, results = _match(a.manifest, b.manifest)
    total = sum(pair.one.numel * ITEM_SIZES[pair.one.dtype] for pair in pairs)
    done = 0

    def work(task: Sequence[tuple[_Pair, Box]]) -> list[_Found]:
        with Files(a.folder) as one, Files(b.folder) as other:
            return [_compare_panel(pair, box, one, other) for pair, box in task]

    for task, found in run_ahead(work, _tasks(pairs), workers):
        for (pair, box), panel in zip(task, found, strict=True):
            pair.found.add(panel)
            done += box.numel * ITEM_SIZES[pair.one.dtype]
        if progress is not None:
            progress(done, total)
    results += [_result(pair) for pair in pairs]
    return sorted(results, key=lambda result: (result.name, result.state))


def _match(a: Manifest, b: Manifest) -> tuple[list[_Pair], list[TensorDifference]]:
    """Pairs that can be compared, and the verdict on all else."""
    ours, theirs = a.by_key(), b.by_key()
    pairs: list[_Pair] = []
    results: list[TensorDifference] = []
    for name, state in sorted(ours.keys() | theirs.keys()):
        one, note = _held(ours, name, state, "A")
        other, also = _held(theirs, name, state, "B")
        note = note or also
        if one is None or other is None or one.shape != other.shape:
            verdict: Verdict = "only in B" if one is None else "only in A" if other is None else "shape"
            results.append(_unpaired(name, state, verdict, one, other))
            continue
        problem = cover_problem(one) or cover_problem(other)
        if problem is not None:
            results.append(_unpaired(name, state, "damaged", one, other, problem))
        else:
            pairs.append(_Pair(name, state, one, other, note))
    return pairs, results


def _held(
    tensors: Mapping[tuple[str, str], LogicalTensor], name: str, state: str, side: str
) -> tuple[LogicalTensor | None, str]:
    """A state, or what stands for it: an fp32 weight is its master, and a weight is its master, rounded."""
    found = tensors.get((name, state))
    if found is not None or state not in PARAMETER_STATES:
        return found, ""
    (instead,) = set(PARAMETER_STATES) - {state}
    found = tensors.get((name, instead))
    if found is None or found.dtype != "float32":
        return None, ""
    return found, f"{side} keeps it as its {instead}"


def _unpaired(
    name: str,
    state: str,
    verdict: Verdict,
    one: LogicalTensor | None,
    other: LogicalTensor | None,
    note: str = "",
) -> TensorDifference:
    return TensorDifference(
        name,
        state,
        verdict,
        (None if one is None else one.shape, None if other is None else other.shape),
        (None if one is None else one.dtype, None if other is None else other.dtype),
        note=note,
    )


def _tasks(pairs: Iterable[_Pair]) -> Iterator[list[tuple[_Pair, Box]]]:
    task: list[tuple[_Pair, Box]] = []
    size = 0
    for pair in pairs:
        whole = Box((0,) * len(pair.one.shape), pair.one.shape)
        item = ITEM_SIZES[pair.one.dtype]
        for box in cut(whole, PANEL_BYTES // item) if whole.numel else ():
            task.append((pair, box))
            size += box.numel * item
            if size >= TASK_BYTES:
                yield task
                task, size = [], 0
    if task:
        yield task


def _compare_panel(pair: _Pair, box: Box, ones: Files, others: Files) -> _Found:
    try:
        one, other = pair.readers[0].read(ones, box), pair.readers[1].read(others, box)
    except OSError as error:
        return _Found(problem=str(error))
    kinds = (pair.readers[0].dtype, pair.readers[1].dtype)
    if kinds[0] == kinds[1] and np.array_equal(one, other):
        x = as_floats(one, kinds[0]).astype(np.float64)
        return _Found(products=(_dot(x, x),) * 3)
    x, y = (as_floats(bits, kind).astype(np.float64) for bits, kind in zip((one, other), kinds, strict=True))
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    found = _Found(products=(_dot(x, x), _dot(y, y), _dot(x, y)))
    found.differ = int(np.count_nonzero(one != other)) if kinds[0] == kinds[1] else int((~same).sum())
    found.differ_rounded = _differ_rounded(one, other, kinds)
    if not same.all():
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.nan_to_num(np.abs(x - y)[~same], nan=math.inf, posinf=math.inf)
            larger = np.maximum(np.abs(x), np.abs(y))[~same]
            relative = np.nan_to_num(apart / larger, nan=math.inf, posinf=math.inf)
        found.max_abs, found.max_rel = float(apart.max()), float(relative.max())
    return found


def _dot(x: Bits, y: Bits) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.vdot(x, y))


def _differ_rounded(one: Bits, other: Bits, kinds: tuple[str, str]) -> int:
    """How many differ when the wider ones are rounded to the others' precision; all where that fails."""
    if kinds[0] == kinds[1]:
        return int(np.count_nonzero(one != other))
    narrow = rounded(one, kinds[0], kinds[1])
    if narrow is not None:
        return _differing(narrow, other, kinds[1])
    narrow = rounded(other, kinds[1], kinds[0])
    return one.size if narrow is None else _differing(one, narrow, kinds[0])


def _differing(one: Bits, other: Bits, kind: str) -> int:
    differ = one != other
    if differ.any():
        differ &= ~(np.isnan(as_floats(one, kind)) & np.isnan(as_floats(other, kind)))
    return int(np.count_nonzero(differ))


def _result(pair: _Pair) -> TensorDifference:
    found, same_kind = pair.found, pair.readers[0].dtype == pair.readers[1].dtype
    verdict: Verdict = "different"
    if found.problem:
        verdict = "damaged"
    elif same_kind and not found.differ:
        verdict = "equal"
    elif not same_kind and not found.differ_rounded:
        verdict = "equal after rounding"
    one, other, both = found.products
    length = math.sqrt(one) * math.sqrt(other) if min(one, other) >= 0 else math.nan
    return TensorDifference(
        pair.name,
        pair.state,
        verdict,
        (pair.one.shape, pair.other.shape),
        (pair.readers[0].dtype, pair.readers[1].dtype),
        numel=pair.one.numel,
        count=found.differ_rounded if verdict == "equal after rounding" else found.differ,
        max_abs=found.max_abs,
        max_rel=found.max_rel,
        cosine=1.0 if verdict == "equal" else both / length if length > 0 and math.isfinite(length) else None,
        note=found.problem or pair.note,
    )
