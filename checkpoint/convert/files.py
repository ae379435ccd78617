"""The files of a source: whether they are there, and whether they stay as they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from checkpoint.manifest import Manifest

Stamps = Mapping[str, tuple[int, int]]
"""File, as the manifest names it -> its size in bytes, and when it was changed last, in nanoseconds."""
FOREIGN_FILES = "foreign_files"
"""Key of a manifest's state: stamps of files that it points into and that are not its own."""


def stamps(folder: Path, manifest: Manifest) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Of all files that pieces, replicas and ranks' bytes lie in; and a line for each missing or short one.

    Args:
        folder: that relative names count from.
    """
    ends: dict[str, int] = {}
    for tensor in manifest.tensors:
        for copy in (tensor.pieces, *tensor.replicas):
            for piece in copy:
                ends[piece.file] = max(ends.get(piece.file, 0), piece.start + piece.num_bytes)
    for blob in manifest.rank_blobs:
        ends[blob.file] = max(ends.get(blob.file, 0), blob.start + blob.num_bytes)
    found: dict[str, tuple[int, int]] = {}
    problems = []
    for name, end in sorted(ends.items()):
        try:
            state = os.stat(folder / name)
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
            continue
        found[name] = (state.st_size, state.st_mtime_ns)
        if state.st_size < end:
            problems.append(f"{name}: has {state.st_size} bytes, at least {end} are needed")
    return found, problems


def changed(folder: Path, before: Stamps) -> list[str]:
    """A line for every file that is no longer what it was."""
    problems = []
    for name, (size, time) in before.items():
        try:
            state = os.stat(folder / name)
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
            continue
        if (state.st_size, state.st_mtime_ns) != (size, time):
            problems.append(f"{name}: has been written to since; it has {state.st_size} bytes and had {size}")
    return problems
