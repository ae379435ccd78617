"""One rank's share of a checkpoint: which boxes it writes, the copy in host memory, its file.

The file is a plain safetensors file (any tool opens it) without holes: pieces are ordered by the size of
their elements, largest first, so that each is aligned to it. Keys read `name:state[offset]`.
"""

from __future__ import annotations

import heapq
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from checkpoint.archive.safetensors_file import DTYPES
from checkpoint.boxes import Box
from checkpoint.manifest import ITEM_SIZES, LogicalTensor, Manifest, Piece, RankBlob
from parallel.slices import TensorSlice

_SAFETENSORS_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
_WRITE_BYTES = 1 << 26  # a single write() moves less than 2 GiB


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def share_out(slices: Sequence[TensorSlice], rank: int) -> list[TensorSlice]:
    """The slices that this rank writes: of the holders of a box, exactly one.

    Whoever holds a box held by the ranks R sees all boxes held by exactly R, hence every rank of R deals
    these out alike without a word to the others: largest first, each to the rank with the fewest bytes yet.
    """
    by_holders: dict[tuple[int, ...], list[TensorSlice]] = {}
    for piece in slices:
        assert rank in piece.replicas, f"{piece.name}: rank {rank} is not among its holders {piece.replicas}"
        if piece.data.numel():
            by_holders.setdefault(piece.replicas, []).append(piece)
    mine: list[TensorSlice] = []
    for holders, held in by_holders.items():
        written = [(0, holder) for holder in holders]
        held.sort(key=lambda s: (-s.data.nbytes, s.name, s.state, s.offset))
        for piece in held:
            num_bytes, writer = written[0]
            heapq.heapreplace(written, (num_bytes + piece.data.nbytes, writer))
            if writer == rank:
                mine.append(piece)
    return mine


class HostCopy:
    """Host memory into which slices are copied, kept from save to save."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, slices: Sequence[TensorSlice]) -> list[TensorSlice]:
        """The same slices over copies that training does not touch. Valid until the next call."""
        ordered = in_file_order(slices)
        total = sum(piece.data.nbytes for piece in ordered)
        on_gpu = any(piece.data.is_cuda for piece in ordered)
        if self._memory.numel() < total:
            self._memory = torch.empty(0, dtype=torch.uint8)  # free the old before the new is taken
            self._memory = torch.empty(total, dtype=torch.uint8, pin_memory=on_gpu)
        copies = []
        start = 0
        for piece in ordered:
            end = start + piece.data.nbytes
            copy = self._memory[start:end].view(piece.data.dtype)
            copy.copy_(piece.data.detach(), non_blocking=True)
            copies.append(_with_data(piece, copy))
            start = end
        if on_gpu:
            torch.cuda.synchronize()
        return copies


def in_file_order(slices: Sequence[TensorSlice]) -> list[TensorSlice]:
    """Wide elements first, otherwise as given: every piece is aligned to its element, without padding."""
    return sorted(slices, key=lambda piece: -piece.data.element_size())


@dataclass(frozen=True)
class RankFile:
    """What one rank has written."""

    manifest: Manifest
    num_bytes: int


def write_rank_file(
    path: Path,
    slices: Sequence[TensorSlice],
    blobs: Mapping[str, bytes],
    *,
    rank: int,
    step: int,
    world_size: int,
) -> RankFile:
    """Write one rank's file, sync it, and describe it: a manifest of this rank's pieces alone.

    Args:
        slices: what this rank writes, on any device; each is copied to the host if it is not there.
        blobs: bytes that belong to this rank.

    Raises:
        OSError: the disk is full or fails.
    """
    ordered = in_file_order(slices)
    header = _header(ordered, blobs)
    tensors: list[LogicalTensor] = []
    rank_blobs: list[RankBlob] = []
    with open(path, "wb", buffering=0) as file:
        position = _write_all(file.fileno(), memoryview(header))
        for piece in ordered:
            content = memoryview(piece.data.detach().cpu().view(torch.uint8).numpy())  # type: ignore[arg-type]
            dtype = dtype_name(piece.data.dtype)
            digest = xxhash.xxh3_64_hexdigest(content)
            written = Piece(path.name, position, dtype, Box(piece.offset, piece.size), digest)
            tensors.append(LogicalTensor(piece.name, piece.state, piece.shape, dtype, (written,)))
            position += _write_all(file.fileno(), content)
        for name, blob in blobs.items():
            digest = xxhash.xxh3_64_hexdigest(blob)
            rank_blobs.append(RankBlob(rank, name, path.name, position, len(blob), digest))
            position += _write_all(file.fileno(), memoryview(blob))
        os.fsync(file.fileno())
    manifest = Manifest(step, world_size, tuple(tensors), rank_blobs=tuple(rank_blobs))
    return RankFile(manifest, position)


def _header(slices: Sequence[TensorSlice], blobs: Mapping[str, bytes]) -> bytes:
    """The safetensors header: its length (8 bytes, little-endian), then JSON padded to a multiple of 8."""
    entries: dict[str, dict[str, object]] = {}
    start = 0
    for piece in slices:
        dtype = dtype_name(piece.data.dtype)
        assert dtype in ITEM_SIZES, f"{piece.name} ({piece.state}): no file format for {dtype}"
        entries[f"{piece.name}:{piece.state}{list(piece.offset)}"] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": piece.size,
            "data_offsets": [start, start + piece.data.nbytes],
        }
        start += piece.data.nbytes
    for name, blob in blobs.items():
        entries[f"rank_state:{name}"] = {
            "dtype": "U8",
            "shape": [len(blob)],
            "data_offsets": [start, start + len(blob)],
        }
        start += len(blob)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_all(descriptor: int, content: memoryview) -> int:
    """write() may stop early; returns the number of bytes, all of them."""
    total = len(content)
    while len(content):
        content = content[os.write(descriptor, content[:_WRITE_BYTES]) :]
    return total


def _with_data(piece: TensorSlice, data: torch.Tensor) -> TensorSlice:
    return TensorSlice(
        piece.name, piece.state, piece.shape, piece.offset, piece.size, data, replicas=piece.replicas
    )
