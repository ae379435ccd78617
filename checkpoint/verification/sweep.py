"""One pass over the bytes of a checkpoint, on several threads: hashes, finite numbers, replicas, rounding."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from checkpoint.boxes import Box
from checkpoint.manifest import ITEM_SIZES, Piece
from checkpoint.plan import row_major
from checkpoint.streaming.ahead import run_ahead
from checkpoint.streaming.panels import Files, is_dense, panels
from checkpoint.verification.checks import Checker, Tally

Key = tuple[str, str]
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

WORKERS = min(4, os.cpu_count() or 1)
TASK_BYTES = 1 << 25  # what one thread takes at a time


@dataclass(frozen=True)
class Unit:
    """A piece, or a box of one that has no hash."""

    key: Key
    piece: Piece
    box: Box

    @property
    def num_bytes(self) -> int:
        return self.box.numel * ITEM_SIZES[self.piece.dtype]


def sweep(
    folder: Path,
    checkers: Mapping[Key, Checker],
    pieces: Iterable[tuple[Key, Piece]],
    *,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> dict[Key, Tally]:
    """Read every piece once and check it.

    Args:
        pieces: of the tensors, which must exist in their files; replicas and weights to compare with are read
            beside them.
    """
    ordered = sorted(pieces, key=lambda entry: (entry[1].file, entry[1].start))
    total = sum(piece.box.numel * ITEM_SIZES[piece.dtype] for _, piece in ordered)
    tallies: dict[Key, Tally] = {}
    done = 0
    for task, found in run_ahead(lambda task: _check(folder, checkers, task), _tasks(ordered), workers):
        for key, tally in found:
            tallies.setdefault(key, Tally()).add(tally)
        done += sum(unit.num_bytes for unit in task)
        if progress is not None:
            progress(done, total)
    return tallies


def _tasks(pieces: Iterable[tuple[Key, Piece]]) -> Iterator[list[Unit]]:
    task: list[Unit] = []
    size = 0
    for key, piece in pieces:
        boxes = [piece.box] if piece.hash is not None else panels(piece, TASK_BYTES)
        for box in boxes:
            task.append(Unit(key, piece, box))
            size += task[-1].num_bytes
            if size >= TASK_BYTES:
                yield task
                task, size = [], 0
    if task:
        yield task


def _check(folder: Path, checkers: Mapping[Key, Checker], task: Sequence[Unit]) -> list[tuple[Key, Tally]]:
    found = []
    with Files(folder) as files:
        for unit in task:
            try:
                tally = _check_unit(files, checkers[unit.key], unit)
            except OSError as error:
                tally = Tally(unread=[(unit.piece.file, str(error))])
            found.append((unit.key, tally))
    return found


def _check_unit(files: Files, checker: Checker, unit: Unit) -> Tally:
    piece = unit.piece
    hasher = xxhash.xxh3_64() if piece.hash is not None and is_dense(piece) else None
    tally = Tally()
    strides = row_major(piece.box.size) if piece.strides is None else piece.strides
    as_in_file = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    for box in panels(piece, within=unit.box):
        bits = files.read(piece, box)
        if hasher is not None:
            hasher.update(np.ascontiguousarray(bits.transpose(as_in_file)).data)
        tally.add(checker.check(files, piece, box, bits))
    if hasher is not None and hasher.hexdigest() != piece.hash:
        fault = (
            f"bytes {piece.start} to {piece.start + piece.num_bytes} have the hash {hasher.hexdigest()}, the "
            f"manifest records {piece.hash}: the file is damaged"
        )
        tally.hashes.append((piece.file, fault))
    return tally
