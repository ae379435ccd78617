"""Ratoon index: a manifest whose pieces point into the original files. Takes seconds, whatever the size.

It records how long each file is and when it was written, so that a source that changes is noticed when the
index is opened.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from checkpoint.convert.files import stamps
from checkpoint.convert.output import WritePlan
from checkpoint.manifest import LogicalTensor, Piece
from checkpoint.opening import Opened
from checkpoint.writers.carry import carried_files
from checkpoint.writers.options import WriteOptions
from checkpoint.writers.universal import complete


def plan(opened: Opened, options: WriteOptions) -> WritePlan:
    """The manifest alone. The original files must stay where they are, as they are.

    Raises:
        ValueError: another dtype is asked for, which only a copy can have.
    """
    if options.dtype is not None:
        raise ValueError(
            f"an index points into the original files, which do not become {options.dtype}: convert to "
            "universal"
        )
    written = WritePlan("Ratoon index", carried=carried_files(opened, options.carry))
    folder = opened.folder.resolve()
    tensors = [_absolute(tensor, folder) for tensor in opened.manifest.tensors]
    tensors.sort(key=lambda tensor: (tensor.name, tensor.state))
    files, problems = stamps(folder, replace(opened.manifest, tensors=tuple(tensors), rank_blobs=()))
    if problems:
        raise ValueError(f"{folder} is not whole, hence not indexed:\n  " + "\n  ".join(problems[:20]))
    written.small = complete(opened, tensors, files=files)
    written.notes.append(f"the original files must stay where they are: {folder}")
    return written


def _absolute(tensor: LogicalTensor, folder: Path) -> LogicalTensor:
    def moved(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
        return tuple([replace(piece, file=str(folder / piece.file)) for piece in pieces])

    replicas = tuple(moved(replica) for replica in tensor.replicas)
    return replace(tensor, pieces=moved(tensor.pieces), replicas=replicas)
