"""Shards that torch's HuggingFaceStorageWriter leaves: safetensors files with each rank's chunks of tensors.

The metadata of a file says under "DCP_SHARDING_INFO" at which element of the whole tensor each chunk begins;
how large the whole is, nothing says but the chunk that reaches furthest. Format: `hf_storage.py` and
`filesystem.py` in torch/distributed/checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.archive.safetensors_file import read_safetensors_header
from checkpoint.boxes import Box
from checkpoint.manifest import Piece
from checkpoint.source import Source, SourceTensor

PATTERN = "shard-*-model-*.safetensors"
_INFO = "DCP_SHARDING_INFO"


def read_shards(folder: Path, source: Source) -> None:
    """Add the weights of all shards in a folder; damage is added to the source's problems."""
    pieces: dict[str, list[Piece]] = {}
    for file in sorted(folder.glob(PATTERN)):
        try:
            tensors, metadata = read_safetensors_header(file)
            offsets = _offsets(file, metadata)
            for name, tensor in tensors.items():
                if name not in offsets:
                    raise ValueError(f"{file}: its {_INFO} does not say where {name} belongs")
                piece = tensor.piece(Box(offsets[name], tensor.shape))
                if tensor.numel:
                    pieces.setdefault(name, []).append(piece)
        except ValueError as error:
            source.problems.append(str(error))
    for name, held in pieces.items():
        ends = [[o + s for o, s in zip(*piece.box, strict=True)] for piece in held]
        shape = tuple(max(axis) for axis in zip(*ends, strict=True))
        source.tensors.append(SourceTensor(name, "weight", shape, tuple(held)))


def _offsets(file: Path, metadata: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    try:
        info = json.loads(metadata[_INFO])
        return {name: tuple(entry["saved_offsets"]) for name, entry in info.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{file}: a shard without {_INFO}: nothing says where its tensors belong") from None
