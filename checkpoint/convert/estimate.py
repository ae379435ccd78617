"""How long a conversion will take, from how fast this machine reads and writes, measured in a moment."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpoint.convert.run import Conversion

_SAMPLE = 1 << 25
_CHUNK = 1 << 20


def estimate_seconds(conversion: Conversion, target: Path) -> float:
    """Reading once and writing once, one after the other: threads that do both at once take less."""
    opened = conversion.opened
    largest = max(
        (p for t in opened.manifest.tensors for p in t.pieces), key=lambda p: p.num_bytes, default=None
    )
    seconds = 0.0
    if largest is not None and conversion.bytes_read:
        seconds += conversion.bytes_read / read_speed(opened.folder / largest.file, largest.start)
    if conversion.bytes_written:
        seconds += conversion.bytes_written / write_speed(target.parent)
    return seconds


def read_speed(file: Path, start: int) -> float:
    """Bytes a second that a file gives from `start` on; from the disk, if the system lets go of its copy."""
    done, buffer = 0, bytearray(_CHUNK)
    with open(file, "rb", buffering=0) as source:
        os.posix_fadvise(source.fileno(), start, _SAMPLE, os.POSIX_FADV_DONTNEED)
        begin = time.monotonic()
        while done < _SAMPLE and (count := os.preadv(source.fileno(), [buffer], start + done)):
            done += count
        return max(done, 1) / max(time.monotonic() - begin, 1e-6)


def write_speed(folder: Path) -> float:
    """Bytes a second that a new file in `folder`, or in the nearest folder above that exists, takes."""
    while not folder.is_dir():
        folder = folder.parent
    content = os.urandom(_CHUNK)
    with tempfile.TemporaryFile(dir=folder) as file:
        begin = time.monotonic()
        for _ in range(_SAMPLE // _CHUNK):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return _SAMPLE / max(time.monotonic() - begin, 1e-6)
