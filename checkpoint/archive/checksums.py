"""The CRC-32 that torch.save writes beside every record of an archive, compared with the record's bytes.

A CRC-32 of 0 means that none was computed: torch writes it for every record after
`torch.serialization.set_crc32_options(False)`, and the CRC-32 of nothing is 0 as well.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from checkpoint.archive.zip_records import LOCAL, BadZipError, Window, payload_start, read_directory
from checkpoint.streaming.ahead import run_ahead

BUFFER_BYTES = 1 << 22  # per thread
TASK_BYTES = 1 << 25  # of small records together, what one thread takes at a time


class Archive(NamedTuple):
    """What torch.save wrote: a file, or `num_bytes` from `start` on of a bigger one."""

    file: Path
    start: int = 0
    num_bytes: int | None = None


class StoredRecord(NamedTuple):
    """A member of an archive: its name, its bytes in the file, and their CRC-32 as the archive has it."""

    file: Path
    name: str
    start: int
    num_bytes: int
    crc: int

    @property
    def has_crc(self) -> bool:
        """Whether there is anything to compare."""
        return self.crc != 0


class Fault(NamedTuple):
    """A record whose bytes have another CRC-32, or that could not be read."""

    record: StoredRecord
    what: str


def read_records(archive: Archive) -> list[StoredRecord]:
    """All records with bytes, from the archive's directory alone; none of a file that is no zip archive.

    Raises:
        ValueError: the directory is damaged; the file is named.
        OSError: the file cannot be read.
    """
    descriptor = os.open(archive.file, os.O_RDONLY)
    try:
        rest = os.fstat(descriptor).st_size - archive.start
        window = Window(descriptor, archive.start, rest if archive.num_bytes is None else archive.num_bytes)
        if window.read(0, 4) != LOCAL:
            return []
        return [
            StoredRecord(
                archive.file, name, payload_start(window, name, record), record.num_bytes, record.crc
            )
            for name, record in read_directory(window).items()
            if record.num_bytes
        ]
    except BadZipError as fault:
        raise ValueError(f"{archive.file}: {fault}") from None
    finally:
        os.close(descriptor)


def compare(
    records: Iterable[StoredRecord], *, workers: int
) -> Iterator[tuple[list[StoredRecord], list[Fault]]]:
    """Read the records that have a CRC-32, on several threads with a bounded buffer each.

    Yields:
        Some records of one file, and those among them that are not as they were saved.
    """
    yield from run_ahead(_compare, _tasks(record for record in records if record.has_crc), workers)


def _tasks(records: Iterable[StoredRecord]) -> Iterator[list[StoredRecord]]:
    """Runs of records of one file."""
    task: list[StoredRecord] = []
    size = 0
    for record in records:
        if task and (size >= TASK_BYTES or record.file != task[0].file):
            yield task
            task, size = [], 0
        task.append(record)
        size += record.num_bytes
    if task:
        yield task


def _compare(task: list[StoredRecord]) -> list[Fault]:
    buffer = memoryview(bytearray(min(BUFFER_BYTES, max(record.num_bytes for record in task))))
    found = []
    try:
        with open(task[0].file, "rb", buffering=0) as file:
            for record in task:
                what = _fault(file.fileno(), record, buffer)
                found += [Fault(record, what)] if what else []
    except OSError as error:
        return [Fault(record, str(error.strerror)) for record in task]
    return found


def _fault(descriptor: int, record: StoredRecord, buffer: memoryview) -> str | None:
    crc, at, end = 0, record.start, record.start + record.num_bytes
    while at < end:
        count = os.preadv(descriptor, [buffer[: end - at]], at)
        if count == 0:
            return f"ends at byte {at}, {end - at} more are expected"
        crc = zlib.crc32(buffer[:count], crc)
        at += count
    if crc == record.crc:
        return None
    return f"bytes {record.start} to {end} have the CRC-32 {crc:08x}, the archive records {record.crc:08x}"
