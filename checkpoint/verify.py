"""Checking every byte of a checkpoint against its manifest, without torch and without a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import xxhash

from checkpoint.boxes import Box, cover_fault
from checkpoint.manifest import LogicalTensor, Manifest

_BUFFER_BYTES = 1 << 24  # per thread
_TASK_BYTES = 1 << 28  # of one file, what one thread takes at a time
_THREADS = min(4, os.cpu_count() or 1)


class Extent(NamedTuple):
    """Bytes of a file with a recorded hash (None where nobody computed it), and what they are."""

    file: str
    start: int
    num_bytes: int
    hash: str | None
    owner: str


def extents(manifest: Manifest) -> list[Extent]:
    """All that a checkpoint's files hold: the pieces of every tensor, then the ranks' own bytes."""
    pieces = (
        Extent(piece.file, piece.start, piece.num_bytes, piece.hash, f"{tensor.name} ({tensor.state})")
        for tensor in manifest.tensors
        for piece in tensor.pieces
    )
    return [*pieces, *blob_extents(manifest)]


def blob_extents(manifest: Manifest) -> list[Extent]:
    """The bytes that belong to single ranks."""
    return [
        Extent(blob.file, blob.start, blob.num_bytes, blob.hash, f"the {blob.name} of rank {blob.rank}")
        for blob in manifest.rank_blobs
    ]


def cover_problem(tensor: LogicalTensor) -> str | None:
    """What is wrong when the pieces do not hold every element exactly once, with their files and boxes."""
    boxes = [piece.box for piece in tensor.pieces]
    if _are_rows(tensor.shape, boxes):
        return None
    fault = cover_fault(tensor.shape, boxes)
    if fault is None:
        return None
    files = ", ".join(f"{tensor.pieces[n].file} {tensor.pieces[n].box}" for n in fault[1])
    return f"{tensor.name} ({tensor.state}): {fault[0]} {files}".rstrip()


def _are_rows(shape: tuple[int, ...], boxes: list[Box]) -> bool:
    """Whether the boxes are the tensor, or whole rows of it one after the other: known in no time."""
    if not shape:
        return len(boxes) == 1
    row = 0
    inner = (0,) * (len(shape) - 1)
    for offset, size in sorted(boxes):
        if offset[:1] != (row,) or offset[1:] != inner or size[1:] != shape[1:] or size[0] < 1:
            return False
        row += size[0]
    return row == shape[0]


def damage(folder: Path, parts: Iterable[Extent]) -> list[str]:
    """Read these bytes and compare them with their hashes; one line for each that is not as recorded."""
    ordered = sorted(parts, key=lambda part: (part.file, part.start))
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(chain.from_iterable(pool.map(lambda task: _damage(folder, task), _tasks(ordered))))


def _tasks(parts: list[Extent]) -> Iterator[list[Extent]]:
    """Runs of parts of one file, of about _TASK_BYTES."""
    for _, group in groupby(parts, key=lambda part: part.file):
        task: list[Extent] = []
        size = 0
        for part in group:
            task.append(part)
            size += part.num_bytes
            if size >= _TASK_BYTES:
                yield task
                task, size = [], 0
        if task:
            yield task


def _damage(folder: Path, task: list[Extent]) -> list[str]:
    name = task[0].file
    try:
        with open(folder / name, "rb", buffering=0) as file:
            buffer = memoryview(bytearray(min(_BUFFER_BYTES, max(part.num_bytes for part in task))))
            found = (_fault(file.fileno(), part, buffer) for part in task)
            return [
                f"{part.owner}: {name}: {fault}" for part, fault in zip(task, found, strict=True) if fault
            ]
    except OSError as error:
        return [f"{part.owner}: {name}: {error.strerror}" for part in task]


def _fault(descriptor: int, part: Extent, buffer: memoryview) -> str | None:
    """What is wrong with one part."""
    hasher = xxhash.xxh3_64()
    at, end = part.start, part.start + part.num_bytes
    while at < end:
        count = os.preadv(descriptor, [buffer[: end - at]], at)
        if count == 0:
            return f"ends at byte {at}, the manifest expects {end - at} more"
        hasher.update(buffer[:count])
        at += count
    if part.hash is None or hasher.hexdigest() == part.hash:
        return None
    return (
        f"bytes {part.start} to {end} have the hash {hasher.hexdigest()}, the manifest records {part.hash}: "
        "the file is damaged"
    )
