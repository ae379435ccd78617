"""Joining the ranks' indices into one manifest, in a thread beside training.

The collector of garbage stops all threads for as long as it takes to visit every object. It starts when many
new ones stay, hence none stays here for a piece: only tuples of numbers and strings, which it does not track.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from checkpoint.boxes import Box
from checkpoint.manifest import TENSORS, LogicalTensor, Manifest, Piece, RankBlob, tensor_from_json

_Key = tuple[str, str]
_Row = tuple[str, int, str, tuple[int, ...], tuple[int, ...], str | None, tuple[int, ...] | None]


def merge(indices: Iterable[bytes]) -> tuple[Iterator[LogicalTensor], tuple[RankBlob, ...]]:
    """Join the pieces that several ranks wrote; `indices` are their manifests, as `to_json` gives them.

    Returns:
        Tensors sorted by name and state, each made when it is asked for; and the blobs of all ranks.

    Raises:
        ValueError: ranks disagree about a tensor's shape or dtype; all such tensors are named.
    """
    kinds: dict[_Key, tuple[tuple[int, ...], str]] = {}
    rows: dict[_Key, list[_Row]] = {}
    blobs: list[RankBlob] = []
    problems: list[str] = []
    for rank, index in enumerate(indices):
        head, _, body = index.partition(TENSORS)
        source = f"the index of rank {rank}"
        blobs.extend(Manifest.from_json(head + TENSORS + b"]}", source).rank_blobs)
        for tensor in _tensors(head, body):
            assert not tensor.replicas, f"{source}: a rank writes each box once"
            key = (tensor.name, tensor.state)
            shape, dtype = kinds.setdefault(key, (tensor.shape, tensor.dtype))
            if (shape, dtype) != (tensor.shape, tensor.dtype):
                problems.append(
                    f"{key[0]} ({key[1]}): {list(shape)} {dtype} on one rank, "
                    f"{list(tensor.shape)} {tensor.dtype} on another"
                )
            rows.setdefault(key, []).extend(map(_row, tensor.pieces))
    if problems:
        raise ValueError("ranks disagree about tensors:\n  " + "\n  ".join(problems))
    tensors = (LogicalTensor(*key, *kinds[key], tuple(map(_piece, rows[key]))) for key in sorted(kinds))
    return tensors, tuple(blobs)


def _tensors(head: bytes, body: bytes) -> Iterator[LogicalTensor]:
    """One at a time, from the line that it has in the index."""
    files = json.loads(head + TENSORS + b"]}")["files"]
    for line in body.splitlines()[:-1]:
        if line:
            yield tensor_from_json(json.loads(line.removesuffix(b",")), files)


def _row(piece: Piece) -> _Row:
    box = piece.box
    return piece.file, piece.start, piece.dtype, box.offset, box.size, piece.hash, piece.strides


def _piece(row: _Row) -> Piece:
    file, start, dtype, offset, size, digest, strides = row
    return Piece(file, start, dtype, Box(offset, size), digest, strides)
