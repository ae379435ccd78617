"""Carrying out copies: byte ranges from files into tensors, through buffers of bounded size.

Long runs are read one by one. Short ones with gaps between them (columns of a matrix) are copied out of a
mapping of the file: 2 to 4 times as fast as reading the gaps too, or as a call for each run (measured with
runs of 1 to 8 KiB in the page cache).
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, product
from pathlib import Path

import torch
import xxhash

from checkpoint.manifest import ITEM_SIZES
from checkpoint.plan import Axis, Copy, panels, row_major, span

BUFFER_BYTES = 1 << 24  # per thread
GAP_BYTES = 1 << 14  # behind a longer gap a call is made: it costs as much as 16 KiB of the page cache
TASK_BYTES = 1 << 26  # what one thread takes at a time
THREADS = min(4, os.cpu_count() or 1)


@dataclass
class ReadReport:
    """What reading took and what it found.

    Attributes:
        needed: bytes of pieces that were asked for.
        read: bytes read from files. Of a mapped file those of the runs; the system reads the whole pages
            that they lie in.
        problems: pieces whose bytes do not have the recorded hash, or could not be read.
    """

    needed: int = 0
    read: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, other: ReadReport) -> None:
        self.needed += other.needed
        self.read += other.read
        self.problems += other.problems


def read_copies(folder: Path, copies: Iterable[Copy], targets: Sequence[torch.Tensor]) -> ReadReport:
    """Fill the targets (1-D, contiguous) as the copies say, converting dtypes (to nearest even).

    Every piece that is read whole is compared with its hash.
    """
    ordered = sorted(copies, key=lambda copy: (copy.piece.file, copy.piece.start + copy.source_start))
    report = ReadReport()
    with ThreadPoolExecutor(THREADS) as pool:
        for part in pool.map(lambda task: _run_task(folder, task, targets), _tasks(ordered)):
            report.add(part)
    return report


def _tasks(copies: Sequence[Copy]) -> Iterator[list[Copy]]:
    """Runs of copies of one file, of about TASK_BYTES."""
    for _, group in groupby(copies, key=lambda copy: copy.piece.file):
        task: list[Copy] = []
        size = 0
        for copy in group:
            task.append(copy)
            size += copy.numel * ITEM_SIZES[copy.piece.dtype]
            if size >= TASK_BYTES:
                yield task
                task, size = [], 0
        if task:
            yield task


def _run_task(folder: Path, task: Sequence[Copy], targets: Sequence[torch.Tensor]) -> ReadReport:
    report = ReadReport()
    path = folder / task[0].piece.file
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        report.problems.append(f"{path}: {error.strerror}")
        return report
    try:
        reader = _Reader(descriptor, report)
        for copy in task:
            reader.run(copy, targets[copy.target])
    except OSError as error:
        report.problems.append(f"{path}: {error}")
    finally:
        os.close(descriptor)
    return report


class _Reader:
    """One open file and one buffer."""

    def __init__(self, descriptor: int, report: ReadReport) -> None:
        self._descriptor = descriptor
        self._report = report
        self._buffer: torch.Tensor | None = None

    def run(self, copy: Copy, target: torch.Tensor) -> None:
        """Carry out one copy."""
        piece = copy.piece
        dtype: torch.dtype = getattr(torch, piece.dtype)
        item = ITEM_SIZES[piece.dtype]
        hasher = xxhash.xxh3_64() if copy.whole and piece.hash is not None else None
        self._report.needed += copy.numel * item
        if not copy.whole and _has_short_gaps(copy.axes, item) and self._run_mapped(copy, target, dtype):
            return
        in_place = _is_run(copy) and target.dtype == dtype and target.is_cpu
        limit = max(TASK_BYTES if in_place else BUFFER_BYTES, item) // item
        for source, start, axes in panels(copy, limit):
            at = piece.start + source * item
            if in_place:
                content = target[start : start + span(axes)].view(torch.uint8)
                self._read(content, at)
                strides: tuple[int, ...] = ()
            else:
                content, strides = self._fetch(at, axes, item)
            if hasher is not None:
                hasher.update(_bytes(content))
            if not in_place:
                values = content.view(dtype).as_strided([axis.extent for axis in axes], strides)
                shape = [axis.extent for axis in axes]
                offset = target.storage_offset() + start
                target.as_strided(shape, [axis.target for axis in axes], offset).copy_(values)
        if hasher is not None and hasher.hexdigest() != piece.hash:
            self._report.problems.append(
                f"{piece.file}: bytes {piece.start} to {piece.start + piece.num_bytes} have the hash "
                f"{hasher.hexdigest()}, the manifest records {piece.hash}: the file is damaged"
            )

    def _run_mapped(self, copy: Copy, target: torch.Tensor, dtype: torch.dtype) -> bool:
        """Copy out of a mapping of the file; False on a file system that cannot map."""
        item = ITEM_SIZES[copy.piece.dtype]
        for source, start, axes in panels(copy, TASK_BYTES // item):
            at = copy.piece.start + source * item
            numel = span(axes)
            size = os.fstat(self._descriptor).st_size
            if size < at + numel * item:  # touching it would kill the process
                raise OSError(f"ends at byte {size}, where the manifest expects {at + numel * item}")
            skipped = at % mmap.ALLOCATIONGRANULARITY
            try:
                # private and writable, which nobody makes use of: torch warns of read-only memory
                memory = mmap.mmap(
                    self._descriptor, skipped + numel * item, access=mmap.ACCESS_COPY, offset=at - skipped
                )
            except OSError:
                return False
            flat = torch.frombuffer(memory, dtype=dtype, count=numel, offset=skipped)
            extents = [axis.extent for axis in axes]
            values = flat.as_strided(extents, [axis.source for axis in axes])
            offset = target.storage_offset() + start
            target.as_strided(extents, [axis.target for axis in axes], offset).copy_(values)
            self._report.read += math.prod(extents) * item
        return True

    def _fetch(self, at: int, axes: tuple[Axis, ...], item: int) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Read one panel into the buffer; returns its bytes and the strides of the axes in them.

        The inner axes, as many as have short gaps between their steps, are one block, which a call reads.
        """
        cut = len(axes)
        while cut and (axes[cut - 1].source - span(axes[cut:])) * item < GAP_BYTES:
            cut -= 1
        outer, inner = axes[:cut], axes[cut:]
        block = span(inner) * item
        counts = [axis.extent for axis in outer]
        content = self._take(math.prod(counts) * block)
        places = product(*(range(0, axis.extent * axis.source, axis.source) for axis in outer))
        for number, place in enumerate(places):
            start = number * block
            self._read(content[start : start + block], at + sum(place) * item)
        return content, (*row_major([*counts, span(inner)])[:-1], *(axis.source for axis in inner))

    def _take(self, num_bytes: int) -> torch.Tensor:
        if self._buffer is None or len(self._buffer) < num_bytes:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        return self._buffer[:num_bytes]

    def _read(self, into: torch.Tensor, at: int) -> None:
        content = _bytes(into)
        while len(content):
            count = os.preadv(self._descriptor, [content], at)
            if count == 0:
                raise OSError(f"ends at byte {at}, where the manifest expects {len(content)} more")
            self._report.read += count
            at += count
            content = content[count:]


def _has_short_gaps(axes: Sequence[Axis], item: int) -> bool:
    """Whether some runs lie so close that a call for each would cost more than what is between them."""
    return any(
        0 < (axis.source - span(axes[number + 1 :])) * item < GAP_BYTES for number, axis in enumerate(axes)
    )


def _is_run(copy: Copy) -> bool:
    return not copy.axes or (len(copy.axes) == 1 and copy.axes[0].source == 1 == copy.axes[0].target)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers
