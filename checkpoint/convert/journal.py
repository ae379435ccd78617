"""What an interrupted conversion has finished, so that the next one goes on from there."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import xxhash

from checkpoint.convert.output import OutputFile, WritePlan
from checkpoint.verify import Extent, damage

JOURNAL = "CONVERTING"


class Journal:
    """A file in the unfinished target: what is being converted, then a line for every file that is done.

    It is locked for as long as it is open: no two conversions write into one folder.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """
        Args:
            folder: the unfinished target, made if it is not there.
            key: names the conversion: another source or other options give another one, see `plan_key`.

        Raises:
            ValueError: the folder belongs to another conversion, or one is writing into it at this moment.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._done: dict[str, dict[str, Any]] = {}
        self._lock = Lock()
        self._file = open(folder / JOURNAL, "a+b")
        try:
            self._begin(key)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, key: str) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self._folder} is being written by another conversion: wait for it, or give another target"
            ) from None
        except OSError:
            pass  # a file system without locks
        self._file.seek(0)
        first, *lines = self._file.read().split(b"\n")
        if lines and first != key.encode():
            raise ValueError(
                f"{self._folder} was begun by another conversion (of another source, or one that has changed "
                "since, or with other options): remove it, or give another target"
            )
        if not lines:  # new, or killed at once
            self._file.truncate(0)
            self._append(key)
        for line in lines[:-1]:
            with suppress(ValueError):
                entry = json.loads(line)
                self._done[entry["path"]] = entry
        if lines and lines[-1]:  # a line that a kill cut short
            self._append("")

    def finished(self, file: OutputFile) -> dict[str, str] | None:
        """The hashes of a file's regions, if an earlier attempt has finished it and its bytes have them."""
        entry = self._done.get(file.path)
        try:
            if entry is None or (self._folder / file.path).stat().st_size != file.num_bytes:
                return None
        except OSError:
            return None
        hashes: dict[str, str] = entry["hashes"]
        return None if damage(self._folder, region_extents([file], {file.path: hashes})) else hashes

    def finish(self, file: OutputFile, hashes: Mapping[str, str]) -> None:
        """Note that a file is whole and on the disk."""
        with self._lock:
            self._append(json.dumps({"path": file.path, "hashes": dict(hashes)}))

    def close(self) -> None:
        """Let others at it."""
        self._file.close()

    def _append(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def region_extents(files: Iterable[OutputFile], hashes: Mapping[str, Mapping[str, str]]) -> list[Extent]:
    """The bytes of all regions, with the hashes that they should have."""
    return [
        Extent(file.path, region.start, region.num_bytes, hashes[file.path][region.key], region.key)
        for file in files
        for region in file.regions
    ]


def plan_key(source: Mapping[str, tuple[int, int]], digest: str, plan: WritePlan) -> str:
    """Names a conversion by its source and by everything that it writes.

    Args:
        source: file -> size and time of its last change.
        digest: of the source's headers.
    """
    key = xxhash.xxh3_128(repr((digest, sorted(source.items()), plan.format, sorted(plan.carried))).encode())
    for file in plan.files:
        key.update(repr((file.path, file.num_bytes, file.regions)).encode())
    return key.hexdigest()
