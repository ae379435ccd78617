"""Whole tensors laid out in safetensors files: a header, padded to 8 bytes, and the tensors behind it.

Format: the safetensors README (8 bytes of the header's length, JSON, data without holes).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from checkpoint.archive.safetensors_file import DTYPES
from checkpoint.convert.output import OutputFile, Region
from checkpoint.manifest import ITEM_SIZES
from checkpoint.source import Part

SAFETENSORS_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}


class Whole(NamedTuple):
    """A tensor to be written whole under `key`."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    state: str
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def shards(stem: str, tensors: Iterable[Whole], shard_bytes: int) -> list[OutputFile]:
    """Files `stem`-00001-of-0000N.safetensors of at most about `shard_bytes`; a single one has no number."""
    groups = list(_grouped(tensors, shard_bytes))
    if len(groups) == 1:
        return [shard(f"{stem}.safetensors", groups[0])]
    width = len(groups)
    return [
        shard(f"{stem}-{number:05d}-of-{width:05d}.safetensors", group)
        for number, group in enumerate(groups, 1)
    ]


def shard(path: str, tensors: Iterable[Whole]) -> OutputFile:
    """One file. Wide elements come first, so that each tensor is aligned to its own."""
    ordered = sorted(tensors, key=lambda tensor: -ITEM_SIZES[tensor.dtype])
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, at = [], 0
    for tensor in ordered:
        entries[tensor.key] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.num_bytes],
        }
        places.append(at)
        at += tensor.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    regions = tuple(
        Region(tensor.key, begin + place, tensor.dtype, tensor.shape, tensor.state, tensor.parts)
        for tensor, place in zip(ordered, places, strict=True)
    )
    return OutputFile(path, begin + at, regions, early=((0, struct.pack("<Q", len(text)) + text),))


def index(files: Iterable[OutputFile]) -> bytes:
    """The model.safetensors.index.json that says which file has which tensor."""
    files = list(files)
    where = {region.key: file.path for file in files for region in file.regions}
    total = sum(region.num_bytes for file in files for region in file.regions)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2).encode()


def _grouped(tensors: Iterable[Whole], shard_bytes: int) -> Iterator[list[Whole]]:
    group: list[Whole] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.num_bytes > shard_bytes:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.num_bytes
    if group:
        yield group
