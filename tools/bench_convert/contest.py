"""Programs that take turns on the same checkpoint: wall time until the disk has it, and memory."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SAMPLE_SECONDS = 0.002
ATTEMPTS = 30


@dataclass(frozen=True)
class Program:
    """One that takes part.

    Attributes:
        name: for the table.
        command: makes the folder `target`.
        target: removed before each turn.
    """

    name: str
    command: tuple[str, ...]
    target: Path


@dataclass
class Turns:
    """What a program took, a number a turn.

    Attributes:
        seconds: from its start until everything it wrote was on the disk.
        anonymous: largest RssAnon of the process itself, in bytes.
    """

    seconds: list[float] = field(default_factory=list)
    anonymous: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def compete(programs: Sequence[Program], source: Path, rounds: int, *, cold: bool) -> dict[str, Turns]:
    """Let all take `rounds` turns, one after the other in each round, in another order each time.

    Args:
        cold: drop the source from the page cache before every turn; else it is read before.

    Raises:
        RuntimeError: a program has failed.
    """
    found = {program.name: Turns() for program in programs}
    orders = random.Random(0)
    for _ in range(rounds):
        for program in orders.sample(programs, len(programs)):  # who goes before changes what memory is warm
            shutil.rmtree(program.target, ignore_errors=True)
            (drop_from_cache if cold else read_into_cache)(source)
            seconds, anonymous = timed(program.command)
            found[program.name].seconds.append(seconds)
            found[program.name].anonymous.append(anonymous)
            shutil.rmtree(program.target, ignore_errors=True)
    return found


def timed(command: Sequence[str]) -> tuple[float, int]:
    """Seconds until the disk has what a program wrote, and its largest anonymous memory."""
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        largest = 0
        while process.poll() is None:
            largest = max(largest, anonymous_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
        assert process.stdout is not None
        said = process.stdout.read().decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{said[-3000:]}")
    os.sync()
    return time.monotonic() - begin, largest


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process at this moment; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def drop_from_cache(folder: Path) -> None:
    """Let every file's next read come from the disk.

    Raises:
        RuntimeError: the system keeps a file in memory, as one does whose disk is memory.
    """
    os.sync()
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            for _ in range(ATTEMPTS):  # pages that somebody is still busy with stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                if not _is_cached(descriptor, path.stat().st_size // 2):
                    break
                time.sleep(0.1)
            else:
                raise RuntimeError(f"{path} stays in the page cache: choose a --folder on a disk")
        finally:
            os.close(descriptor)


def read_into_cache(folder: Path) -> None:
    """Let the next read of every file come from memory, and nothing wait to be written."""
    buffer = bytearray(1 << 22)
    for path in _files(folder):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    os.sync()


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _is_cached(descriptor: int, at: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT) > 0
    except OSError:  # it would have to wait for the disk
        return False
