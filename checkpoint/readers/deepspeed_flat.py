"""Pieces of parameters from the flat buffers in which ZeRO keeps them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from checkpoint.archive.file_tensor import FileTensor
from checkpoint.boxes import Box
from checkpoint.manifest import Piece
from checkpoint.source import SourceTensor
from parallel.slices import flat_range_boxes


@dataclass
class Collected:
    """The tensors of one model-parallel rank, as its files are gone through.

    Attributes:
        at: coordinates of the rank; pieces of all its data ranks come together here.
        problems: a line each.
    """

    at: dict[str, int]
    problems: list[str]
    _shapes: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    _pieces: dict[tuple[str, str], list[Piece]] = field(default_factory=dict)
    _copies: list[SourceTensor] = field(default_factory=list)
    _filled: dict[tuple[str, str], int] = field(default_factory=dict)

    def add_flat(
        self, name: str, state: str, shape: tuple[int, ...], *, run: FileTensor, first: int | None = None
    ) -> None:
        """Elements of a parameter from its element `first` on, row-major; None: behind the last ones."""
        key = (name, state)
        start = self._filled.get(key, 0) if first is None else first
        pieces = self._begin(name, state, shape)
        if start + run.numel > math.prod(shape):
            self.problems.append(
                f"{name} ({state}): its fragments have {start + run.numel} elements, its shape {list(shape)} "
                f"holds {math.prod(shape)} ({run.file})"
            )
            return
        pieces += flat_pieces(shape, start, run)
        self._filled[key] = start + run.numel

    def add_whole(self, name: str, state: str, tensor: FileTensor) -> None:
        """A tensor that a file holds as it is."""
        if tensor.numel:
            self._begin(name, state, tensor.shape).append(tensor.piece())
            self._filled[name, state] = tensor.numel

    def add_copy(self, name: str, state: str, tensor: FileTensor, data_rank: int) -> None:
        """A tensor that one data rank holds whole, maybe as others do."""
        at = {**self.at, "data": data_rank}
        self._copies.append(SourceTensor(name, state, tensor.shape, (tensor.piece(),), at))

    def has(self, name: str, state: str) -> bool:
        return (name, state) in self._pieces

    def tensors(self) -> list[SourceTensor]:
        """All of them, each of which has to be whole by now."""
        for (name, state), shape in self._shapes.items():
            filled, wanted = self._filled.get((name, state), 0), math.prod(shape)
            if filled < wanted and not self.problems:
                self.problems.append(
                    f"{name} ({state}): the files hold {filled} of the {wanted} elements of {list(shape)}"
                )
        return self._copies + [
            SourceTensor(name, state, self._shapes[name, state], tuple(pieces), self.at)
            for (name, state), pieces in self._pieces.items()
        ]

    def _begin(self, name: str, state: str, shape: tuple[int, ...]) -> list[Piece]:
        known = self._shapes.setdefault((name, state), shape)
        if known != shape:
            self.problems.append(f"{name} ({state}): has the shapes {list(known)} and {list(shape)}")
        return self._pieces.setdefault((name, state), [])


def flat_pieces(shape: tuple[int, ...], first: int, run: FileTensor) -> list[Piece]:
    """A contiguous run of elements of a parameter, from its element `first` on, as boxes of it."""
    if run.numel == 0:
        return []
    if not shape:
        return [Piece(run.file, run.start, run.dtype, Box((), ()))]
    pieces, start = [], run.start
    for offset, size in flat_range_boxes(shape, first, first + run.numel):
        piece = Piece(run.file, start, run.dtype, Box(offset, size))
        pieces.append(piece)
        start += piece.num_bytes
    return pieces
