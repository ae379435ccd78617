"""Tensors in files, cut into pieces of many kinds, and regions of output files that ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoint.boxes import Box
from checkpoint.convert.output import OutputFile, Region
from checkpoint.manifest import LogicalTensor, Piece

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def content(tensor: torch.Tensor) -> bytes:
    """Its bytes, row-major."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_columns(
    folder: Path, name: str, whole: torch.Tensor, cuts: Sequence[int], state: str = "weight"
) -> LogicalTensor:
    """A matrix in files of some columns each, every one behind 5 bytes of something else."""
    pieces = []
    for number, (first, end) in enumerate(zip([0, *cuts], [*cuts, whole.shape[1]], strict=True)):
        part = whole[:, first:end]
        file = f"{name}-{number}.bin"
        (folder / file).write_bytes(b"other" + content(part))
        box = Box((0, first), (whole.shape[0], end - first))
        pieces.append(Piece(file, 5, DTYPES[whole.dtype], box))
    return LogicalTensor(name, state, tuple(whole.shape), DTYPES[whole.dtype], tuple(pieces))


def write_whole(folder: Path, name: str, whole: torch.Tensor, state: str = "weight") -> LogicalTensor:
    """A tensor of any shape in a file of its own."""
    (folder / f"{name}.bin").write_bytes(content(whole))
    box = Box((0,) * whole.dim(), tuple(whole.shape))
    piece = Piece(f"{name}.bin", 0, DTYPES[whole.dtype], box)
    return LogicalTensor(name, state, tuple(whole.shape), DTYPES[whole.dtype], (piece,))


def one_region(region: Region, path: str = "out.bin") -> OutputFile:
    """A file that ends with its only region."""
    return OutputFile(path, region.start + region.num_bytes, (region,))


def read_back(file: Path, region: Region, dtype: torch.dtype) -> torch.Tensor:
    """What lies in a region of a written file."""
    raw = file.read_bytes()[region.start : region.start + region.num_bytes]
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(region.shape)
