"""Carrying out a write plan: regions in parallel, panels through a bounded pool of buffers, no pass twice."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
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

PANEL_BYTES = 1 << 23
WORKERS = min(4, os.cpu_count() or 1)

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes of all; from any thread."""


@dataclass
class Written:
    """What came of it.

    Attributes:
        hashes: path -> key -> xxh3-64 of a region's bytes.
        bytes_read: of the source, by this program.
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
    run = _Run(plan, source, tensors, target, journal, progress)
    with ThreadPoolExecutor(workers) as pool:
        run.buffers = [np.empty(PANEL_BYTES, np.uint8) for _ in range(workers)]
        for buffer in run.buffers:
            run.free.put(buffer)
        futures: list[Future[None]] = []
        try:
            for file in plan.files:
                futures += run.start(file, pool)
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            run.stopped.set()
            for future in futures:
                future.cancel()
    return run.written


class _Run:
    def __init__(
        self,
        plan: WritePlan,
        source: Path,
        tensors: Tensors,
        target: Path,
        journal: Journal,
        progress: Progress | None,
    ) -> None:
        self.written = Written()
        self.stopped = Event()
        self.buffers: list[Bits] = []
        self.free: SimpleQueue[Bits] = SimpleQueue()
        self._source, self._tensors, self._target, self._journal = source, tensors, target, journal
        self._total = plan.num_bytes
        self._done = 0
        self._progress = progress
        self._lock = Lock()

    def start(self, file: OutputFile, pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Hand the regions of a file to the pool; the last one to be done closes it."""
        hashes = self._journal.finished(file)
        if hashes is not None:
            self.written.hashes[file.path] = hashes
            self.written.kept += 1
            self._count(file.num_bytes, 0)
            return []
        under_way = _FileUnderWay(file, self._target)
        if not file.regions:
            return [pool.submit(self._finish, under_way)]
        return [pool.submit(self._region, under_way, region) for region in file.regions]

    def _region(self, under_way: _FileUnderWay, region: Region) -> None:
        if self.stopped.is_set():
            return
        digest, crc = xxhash.xxh3_64(), 0
        buffer = self.free.get()
        try:
            with Files(self._source) as files:
                gatherer = Gatherer(region, self._tensors, files)
                at = region.start
                whole = Box((0,) * len(region.shape), region.shape)
                for panel in cut(whole, PANEL_BYTES // ITEM_SIZES[region.dtype]):
                    if self.stopped.is_set():
                        return
                    bits = empty_panel(panel, region.dtype, buffer)
                    needed = gatherer.fill(panel, bits)
                    content = memoryview(bits.reshape(-1)).cast("B")  # type: ignore[arg-type]
                    digest.update(content)
                    if under_way.file.late is not None:
                        crc = zlib.crc32(content, crc)
                    under_way.write(content, at)
                    at += len(content)
                    self._count(len(content), needed)
        finally:
            self.free.put(buffer)
        if under_way.region_done(region.key, digest.hexdigest(), crc):
            self._finish(under_way)

    def _finish(self, under_way: _FileUnderWay) -> None:
        under_way.close()
        self._journal.finish(under_way.file, under_way.hashes)
        with self._lock:
            self.written.hashes[under_way.file.path] = under_way.hashes

    def _count(self, written: int, read: int) -> None:
        with self._lock:
            self._done += written
            self.written.bytes_written += written
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
            self.hashes[key], self._crcs[key] = digest, crc
            return len(self.hashes) == len(self.file.regions)

    def close(self) -> None:
        """Write what is not a region, and bring the file to the disk."""
        late = self.file.late(self._crcs) if self.file.late is not None else ()
        for at, content in (*self.file.early, *late):
            self.write(content, at)
        descriptor = self._open()
        os.ftruncate(descriptor, self.file.num_bytes)
        os.fsync(descriptor)
        os.close(descriptor)

    def _open(self) -> int:
        with self._lock:
            if self._descriptor is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            return self._descriptor
