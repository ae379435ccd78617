"""Carrying out a write plan: regions in parallel, panels through a bounded pool of buffers, no pass twice."""

from __future__ import annotations

import ctypes
import os
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

import numpy as np
import xxhash

from checkpoint.boxes import Box
from checkpoint.convert.gather import Gatherer, Tensors, empty_panel
from checkpoint.convert.journal import Journal
from checkpoint.convert.output import OutputFile, Region, WritePlan
from checkpoint.streaming.bits import Bits
from checkpoint.streaming.panels import Files, cut

PANEL_BYTES = 1 << 22  # 1 to 8 MiB are as fast as each other, and as the kernel's own copying
POOL_BYTES = 1 << 24  # for the panels of all threads
COPIES = 6  # of a panel at most: read, widened, summed, rounded
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
    run = _Run(plan, target, tensors, journal, progress)
    with ThreadPoolExecutor(workers) as pool:
        buffers = [np.empty(panel_bytes(workers), np.uint8) for _ in range(workers)]
        threads = [pool.submit(run.work, source, buffer) for buffer in buffers]
        try:
            done, _ = wait(threads, return_when=FIRST_EXCEPTION)
            for thread in done:
                thread.result()
        finally:  # an error, Ctrl-C too, stops the threads after the panels that they are at
            run.stopped.set()
            pool.shutdown()
            run.close()
    return run.written


def _find_sync_file_range() -> Callable[..., int] | None:
    """Linux has it, Python does not: see sync_file_range(2)."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


_sync_file_range = _find_sync_file_range()
_WRITE = 2  # SYNC_FILE_RANGE_WRITE of linux/fs.h: begin, and do not wait


def panel_bytes(workers: int) -> int:
    """Of each thread's buffer."""
    return min(PANEL_BYTES, POOL_BYTES // workers)


def peak_bytes(workers: int) -> int:
    """Anonymous memory that `execute` takes at most, whatever the size of the checkpoint."""
    return COPIES * workers * panel_bytes(workers)


class _Run:
    """One execution of a plan: what its threads share."""

    def __init__(
        self, plan: WritePlan, target: Path, tensors: Tensors, journal: Journal, progress: Progress | None
    ) -> None:
        self.written = Written()
        self.stopped = Event()
        self._target, self._tensors, self._journal, self._progress = target, tensors, journal, progress
        self._waiting: deque[OutputFile] = deque()
        self._under_way: list[_FileUnderWay] = []
        self._total = plan.num_bytes
        self._done = 0
        self._lock = Lock()
        for file in plan.files:
            hashes = journal.finished(file)
            if hashes is None:
                self._waiting.append(file)
                continue
            self.written.hashes[file.path] = hashes
            self.written.kept += 1
            self._done += file.num_bytes

    def work(self, source: Path, buffer: Bits) -> None:
        """What each thread does: one region after the other, with its own open files and its own buffer."""
        with Files(source) as files:
            while not self.stopped.is_set() and (task := self._take()) is not None:
                under_way, region = task
                if region is None or self._write(under_way, region, files, buffer):
                    self._finish(under_way)

    def close(self) -> None:
        """Give up what is not finished."""
        for under_way in self._under_way:
            under_way.close()

    def _take(self) -> tuple[_FileUnderWay, Region | None] | None:
        """The next region, of a file that no other thread writes if there is one: the kernel lets only one
        at a time write into a file, and the others burn their time waiting. None of a file without any."""
        with self._lock:
            open_files = [under_way for under_way in self._under_way if under_way.regions]
            chosen = min(open_files, key=lambda under_way: under_way.writers, default=None)
            if self._waiting and (chosen is None or chosen.writers):
                chosen = _FileUnderWay(self._waiting.popleft(), self._target)
                self._under_way.append(chosen)
            if chosen is None:
                return None
            chosen.writers += 1
            return chosen, chosen.regions.popleft() if chosen.regions else None

    def _write(self, under_way: _FileUnderWay, region: Region, files: Files, buffer: Bits) -> bool:
        """Write a region; True when the file has no other left."""
        gatherer = Gatherer(region, self._tensors, files)
        digest, crc, at = xxhash.xxh3_64(), 0, region.start
        whole = Box((0,) * len(region.shape), region.shape)
        for panel in cut(whole, len(buffer) // gatherer.widest):
            if self.stopped.is_set():
                return False
            bits = empty_panel(panel, region.dtype, buffer)
            needed = gatherer.fill(panel, bits)
            content = memoryview(bits.reshape(-1)).cast("B")  # type: ignore[arg-type]
            digest.update(content)
            if under_way.file.late is not None:
                crc = zlib.crc32(content, crc)
            under_way.write(content, at)
            under_way.begin_writeback(at, len(content))
            at += len(content)
            self._count(len(content), needed)
        with self._lock:
            return under_way.region_done(region.key, digest.hexdigest(), crc)

    def _finish(self, under_way: _FileUnderWay) -> None:
        under_way.finish()
        self._journal.finish(under_way.file, under_way.hashes)
        with self._lock:
            self.written.hashes[under_way.file.path] = under_way.hashes
            self._under_way.remove(under_way)

    def _count(self, written: int, read: int) -> None:
        with self._lock:
            self._done += written
            self.written.bytes_written += written
            self.written.bytes_read += read
            if self._progress is not None:
                self._progress(self._done, self._total)


class _FileUnderWay:
    """An output file while it is written, maybe by several threads.

    Attributes:
        regions: that no thread has taken yet.
        writers: threads that are at it.
        hashes: of the regions that are written.
    """

    def __init__(self, file: OutputFile, target: Path) -> None:
        self.file = file
        self.regions = deque(file.regions)
        self.writers = 0
        self.hashes: dict[str, str] = {}
        self._crcs: dict[str, int] = {}
        path = target / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.ftruncate(self._descriptor, file.num_bytes)

    def write(self, content: memoryview | bytes, at: int) -> None:
        """All of it, at its place."""
        view = memoryview(content)
        while len(view):
            count = os.pwrite(self._descriptor, view, at)
            at += count
            view = view[count:]

    def begin_writeback(self, at: int, num_bytes: int) -> None:
        """Let the disk begin with these bytes, so that there is less to wait for at the end."""
        if _sync_file_range is not None:
            _sync_file_range(self._descriptor, at, num_bytes, _WRITE)

    def region_done(self, key: str, digest: str, crc: int) -> bool:
        """Note a region; True when it was the last one."""
        assert key not in self.hashes, f"{self.file.path}: two regions are called {key!r}"
        self.hashes[key], self._crcs[key] = digest, crc
        self.writers -= 1
        return len(self.hashes) == len(self.file.regions)

    def finish(self) -> None:
        """Write what is not a region, and bring the file to the disk."""
        late = self.file.late(self._crcs) if self.file.late is not None else ()
        for at, content in (*self.file.early, *late):
            self.write(content, at)
        os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        """Whatever it holds."""
        os.close(self._descriptor)
