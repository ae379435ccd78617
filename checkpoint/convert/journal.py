"""What an interrupted conversion has finished, so that the next one goes on from there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Lock
from typing import Any

import xxhash

from checkpoint.convert.output import OutputFile, WritePlan

JOURNAL = "CONVERTING"


class Journal:
    """A file in the unfinished target: what is being converted, then a line for every file that is done."""

    def __init__(self, folder: Path, key: str) -> None:
        """
        Args:
            folder: the unfinished target, made if it is not there.
            key: names the conversion: another source or other options give another one, see `plan_key`.

        Raises:
            ValueError: the folder belongs to another conversion.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / JOURNAL
        self._done: dict[str, dict[str, str]] = {}
        self._lock = Lock()
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        if lines and lines[0] != key:
            raise ValueError(
                f"{folder} was begun by another conversion (another source, or other options): remove it, or "
                "give another target"
            )
        for line in lines[1:]:
            entry = _parsed(line)
            if entry and (folder / entry["path"]).is_file():
                if (folder / entry["path"]).stat().st_size == entry["num_bytes"]:
                    self._done[entry["path"]] = entry["hashes"]
        if not lines:
            self._path.write_text(key + "\n", encoding="utf-8")

    def finished(self, file: OutputFile) -> dict[str, str] | None:
        """The hashes of a file's regions where an earlier attempt has finished it."""
        return self._done.get(file.path)

    def finish(self, file: OutputFile, hashes: dict[str, str]) -> None:
        """Note that a file is whole and on the disk."""
        line = json.dumps({"path": file.path, "num_bytes": file.num_bytes, "hashes": hashes})
        with self._lock, open(self._path, "a", encoding="utf-8") as journal:
            journal.write(line + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def close(self) -> None:
        """The conversion is complete."""
        self._path.unlink()


def plan_key(source_digest: str, plan: WritePlan) -> str:
    """Names a conversion by its source and by everything that it writes."""
    digest = xxhash.xxh3_128(source_digest.encode())
    digest.update(plan.format.encode())
    for file in plan.files:
        digest.update(f"{file.path} {file.num_bytes}".encode())
        for region in file.regions:
            what = f"{region.key} {region.start} {region.dtype} {region.shape} {region.state}"
            digest.update(what.encode())
    return digest.hexdigest()


def _parsed(line: str) -> dict[str, Any] | None:
    """The entry of a line; None for one that a kill cut short."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
