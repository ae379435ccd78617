"""What a rank's slices take from a checkpoint: planned and checked first, then read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from checkpoint.boxes import Box
from checkpoint.manifest import LogicalTensor, no_collection
from checkpoint.plan import Copy, plan
from checkpoint.read import ReadReport, read_copies
from checkpoint.verify import cover_problem
from parallel.slices import TensorSlice


@dataclass
class Filling:
    """How to fill slices.

    Attributes:
        copies: straight into the slices.
        averages: (slice number, the copies of each copy of the tensor): their mean goes into the slice.
        problems: gaps and overlaps of the tensors needed, files that are missing or too short; a line each.
    """

    copies: list[Copy] = field(default_factory=list)
    averages: list[tuple[int, list[list[Copy]]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def read(self, folder: Path, slices: Sequence[TensorSlice]) -> ReadReport:
        """Write into the slices; the report says what was read and which bytes are damaged."""
        report = read_copies(folder, self.copies, [piece.data.detach() for piece in slices])
        for number, copies in self.averages:
            report.add(_read_mean(folder, copies, slices[number].data.detach()))
        return report


def plan_filling(
    folder: Path, sources: Mapping[int, LogicalTensor], slices: Sequence[TensorSlice]
) -> Filling:
    """Plan what fills the slices, and check whatever can be checked without reading.

    Args:
        sources: slice number -> the tensor that fills it.
    """
    targets: dict[tuple[str, str], list[tuple[int, Box]]] = {}
    tensors: dict[tuple[str, str], LogicalTensor] = {}
    for number, tensor in sources.items():
        key = (tensor.name, tensor.state)
        tensors[key] = tensor
        targets.setdefault(key, []).append((number, Box(slices[number].offset, slices[number].size)))
    filling = Filling()
    with no_collection():
        for key, tensor in tensors.items():
            _plan_tensor(filling, tensor, targets[key])
    averaged = (copy for _, copies in filling.averages for each in copies for copy in each)
    filling.problems += _short_files(folder, [*filling.copies, *averaged])
    return filling


def _plan_tensor(filling: Filling, tensor: LogicalTensor, targets: Sequence[tuple[int, Box]]) -> None:
    whole = [tensor]
    if tensor.average:
        whole = [replace(tensor, pieces=pieces) for pieces in (tensor.pieces, *tensor.replicas)]
    faults = [fault for copy in whole if (fault := cover_problem(copy)) is not None]
    filling.problems += faults
    if faults:
        return
    if not tensor.average:
        filling.copies.extend(plan(tensor, targets))
        return
    for number, box in targets:
        filling.averages.append((number, [list(plan(copy, [(0, box)])) for copy in whole]))


def _read_mean(folder: Path, copies: Sequence[Sequence[Copy]], into: torch.Tensor) -> ReadReport:
    report = ReadReport()
    total = torch.zeros(into.numel())
    one = torch.empty(into.numel())
    for copy in copies:
        report.add(read_copies(folder, copy, [one]))
        total += one
    into.copy_(total / len(copies))
    return report


def _short_files(folder: Path, copies: Iterable[Copy]) -> list[str]:
    """Files that are missing, or end before the last piece needed of them."""
    ends: dict[str, int] = {}
    for copy in copies:
        piece = copy.piece
        ends[piece.file] = max(ends.get(piece.file, 0), piece.start + piece.num_bytes)
    problems = []
    for name, end in ends.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
            continue
        if size < end:
            problems.append(f"{name}: has {size} bytes, the manifest expects at least {end}")
    return problems
