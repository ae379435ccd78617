"""Carrying out a write plan: regions in parallel, panels through a bounded pool of buffers, no pass twice."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock

import numpy as np
import xxhash

from checkpoint.bits import Bits
from checkpoint.boxes import Box
from checkpoint.convert.gather import Gatherer, Tensors, empty_panel
from checkpoint.convert.journal import Journal
from checkpoint.convert.output import OutputFile, Region, WritePlan
from checkpoint.manifest import ITEM_SIZES
from checkpoint.panels import Files, cut

PANEL_BYTES = 1 << 22  # 1 to 8 MiB are as fast as each other, and as the kernel's own copying
WORKERS = min(4, os.cpu_count() or 1)

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes of all; from any thread."""


@dataclass
class Written:
    """What came of it.

    Attributes:
        hashes: path -> key -> xxh3-64 of a region's bytes.
        bytes_read: of the source, as far as they were needed.
        kept: files that an earlier, interrupted conversion had finished.
    """

    hashes: dict[str, dict[str, str]] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    kept: int = 0


def execute(
    plan: WritePlan,
    source: Path,
    tensors: Tensors,
    target: Path,
    *,
    journal: Journal,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> Written:
    """Write all files of `plan` into the folder `target`, except small ones.

    Args:
        source: folder that files of the pieces are relative to.
        tensors: logical tensors by (name, state).
        journal: says what an earlier attempt has finished, and is told of every file that is.

    Raises:
        OSError: a source file is missing or short, or the disk is full. Finished files stay for the next try.
    """
    run = _Run(plan, target, journal, progress)
    with ExitStack() as stack, ThreadPoolExecutor(workers) as pool:
        for _ in range(workers):
            files = stack.enter_context(Files(source))
            run.desks.put(_Desk(files, np.empty(PANEL_BYTES, np.uint8)))
        futures: list[Future[None]] = []
        try:
            for file in plan.files:
                futures += run.start(file, tensors, pool)
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:  # an error, Ctrl-C too, stops the threads after the panels that they are at
            run.stopped.set()
            pool.shutdown(cancel_futures=True)
            run.close()
    return run.written


@dataclass(frozen=True)
class _Desk:
    """What a thread works with: its own open files of the source, and room for a panel."""

    files: Files
    buffer: Bits


class _Run:
    """One execution of a plan: what its threads share."""

    def __init__(self, plan: WritePlan, target: Path, journal: Journal, progress: Progress | None) -> None:
        self.written = Written()
        self.stopped = Event()
        self.desks: SimpleQueue[_Desk] = SimpleQueue()
        self._target, self._journal = target, journal
        self._under_way: dict[str, _FileUnderWay] = {}
        self._total = plan.num_bytes
        self._done = 0
        self._progress = progress
        self._lock = Lock()

    def start(self, file: OutputFile, tensors: Tensors, pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Hand the regions of a file to the pool; the last one to be done closes it."""
        hashes = self._journal.finished(file)
        if hashes is not None:
            self.written.hashes[file.path] = hashes
            self.written.kept += 1
            self._count(file.num_bytes, is_kept=True)
            return []
        under_way = self._under_way[file.path] = _FileUnderWay(file, self._target)
        if not file.regions:
            return [pool.submit(self._finish, under_way)]
        return [pool.submit(self._write, under_way, region, tensors) for region in file.regions]

    def close(self) -> None:
        """Give up what is not finished."""
        for under_way in self._under_way.values():
            under_way.abandon()

    def _write(self, under_way: _FileUnderWay, region: Region, tensors: Tensors) -> None:
        """Write a region; the last one of a file finishes it."""
        desk = self.desks.get()
        try:
            is_last = self._write_panels(
                under_way, region, Gatherer(region, tensors, desk.files), desk.buffer
            )
        finally:
            self.desks.put(desk)
        if is_last:
            self._finish(under_way)

    def _write_panels(
        self, under_way: _FileUnderWay, region: Region, gatherer: Gatherer, buffer: Bits
    ) -> bool:
        digest, crc, at = xxhash.xxh3_64(), 0, region.start
        whole = Box((0,) * len(region.shape), region.shape)
        for panel in cut(whole, PANEL_BYTES // ITEM_SIZES[region.dtype]):
            if self.stopped.is_set():
                return False
            bits = empty_panel(panel, region.dtype, buffer)
            needed = gatherer.fill(panel, bits)
            content = memoryview(bits.reshape(-1)).cast("B")  # type: ignore[arg-type]
            digest.update(content)
            if under_way.file.late is not None:
                crc = zlib.crc32(content, crc)
            under_way.write(content, at)
            at += len(content)
            self._count(len(content), needed)
        return under_way.region_done(region.key, digest.hexdigest(), crc)

    def _finish(self, under_way: _FileUnderWay) -> None:
        under_way.finish()
        self._journal.finish(under_way.file, under_way.hashes)
        with self._lock:
            self.written.hashes[under_way.file.path] = under_way.hashes
            del self._under_way[under_way.file.path]

    def _count(self, num_bytes: int, read: int = 0, *, is_kept: bool = False) -> None:
        with self._lock:
            self._done += num_bytes
            self.written.bytes_written += 0 if is_kept else num_bytes
            self.written.bytes_read += read
            if self._progress is not None:
                self._progress(self._done, self._total)


class _FileUnderWay:
    """An output file of which several threads write the regions."""

    def __init__(self, file: OutputFile, target: Path) -> None:
        self.file = file
        self.hashes: dict[str, str] = {}
        self._path = target / file.path
        self._crcs: dict[str, int] = {}
        self._lock = Lock()
        self._descriptor: int | None = None

    def write(self, content: memoryview | bytes, at: int) -> None:
        """All of it, at its place."""
        view = memoryview(content)
        descriptor = self._open()
        while len(view):
            count = os.pwrite(descriptor, view, at)
            at += count
            view = view[count:]

    def region_done(self, key: str, digest: str, crc: int) -> bool:
        """Note a region; True when it was the last one."""
        with self._lock:
            assert key not in self.hashes, f"{self.file.path}: two regions are called {key!r}"
            self.hashes[key], self._crcs[key] = digest, crc
            return len(self.hashes) == len(self.file.regions)

    def finish(self) -> None:
        """Write what is not a region, and bring the file to the disk."""
        late = self.file.late(self._crcs) if self.file.late is not None else ()
        for at, content in (*self.file.early, *late):
            self.write(content, at)
        os.fsync(self._open())
        self.abandon()

    def abandon(self) -> None:
        """Close it, whatever it holds."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _open(self) -> int:
        with self._lock:
            if self._descriptor is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                os.ftruncate(self._descriptor, self.file.num_bytes)
            return self._descriptor
