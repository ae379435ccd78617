"""A folder of torch.distributed.checkpoint, laid out: archives of chunks one behind the other, and the index.

torch reads chunks whole, whatever part of them a rank wants, so that large tensors are cut into chunks of
whole rows, and stacks of large matrices into chunks of the rows of one. Small items that are alike are stored
once; the index may name the same bytes several times.
"""

from __future__ import annotations

import math
import pickle
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoint.archive.pickle_writer import TensorRef, write_pickle
from checkpoint.archive.torch_writer import ArchiveLayout, lay_out
from checkpoint.boxes import Box
from checkpoint.convert.output import Chunks, OutputFile, Region
from checkpoint.manifest import ITEM_SIZES
from checkpoint.source import Part

CHUNK_BYTES = 1 << 24
_ALIGNMENT = 64  # of archives in a file, as payloads have in their archive
_STORAGE = "0"

Keys = tuple[str | int, ...]
"""Of nested dicts, outermost first."""


class DcpFolder:
    """Collects what a checkpoint shall hold.

    Args:
        shard_bytes: about the size of a file.
        chunk_bytes: the most that a chunk has, but for a single row.
    """

    def __init__(self, shard_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._shard_bytes, self._chunk_bytes = shard_bytes, min(chunk_bytes, shard_bytes)
        self._files: list[_File] = []
        self._entries: dict[str, Any] = {}  # as torch's index has them
        self._stored: dict[MetadataIndex, _StorageInfo] = {}
        self._paths: dict[str, Keys] = {}
        self._values: dict[bytes, _StorageInfo] = {}
        self._small = bytearray()

    def add_tensor(
        self, keys: Keys, dtype: str, shape: tuple[int, ...], *, state: str, parts: Sequence[Part]
    ) -> None:
        """A tensor that is filled from a state of logical ones; see `Region`."""
        name = self._name(keys)
        boxes = _chunks(shape, ITEM_SIZES[dtype], self._chunk_bytes)
        for number, box in enumerate(boxes):
            held = tuple(inside for part in parts if (inside := narrowed(part, box)) is not None)
            region = Region(f"{name}/{number}", 0, dtype, box.size, state, held)
            self._store(name, number, box, self._file(region.num_bytes).add(region))
        self._describe(name, dtype, shape, boxes)

    def add_number(self, keys: Keys, value: float) -> None:
        """A float32 tensor without axes, such as torch's optimizers count steps in."""
        name = self._name(keys)
        content = _filled(TensorRef(_STORAGE, "float32", ()), struct.pack("<f", value))
        box = Box((), ())
        self._store(name, 0, box, self._value(content))
        self._describe(name, "float32", (), [box])

    def add_item(self, keys: Keys, value: Any) -> None:
        """A Python value: numbers, strings and containers of them."""
        name = self._name(keys)
        self._stored[MetadataIndex(name)] = self._value(_filled(value))
        self._entries[name] = BytesStorageMetadata()

    def add_alias(self, keys: Keys, of: Keys) -> None:
        """Another name of a tensor that was added: the same bytes."""
        name, old = self._name(keys), ".".join(map(str, of))
        self._entries[name] = self._entries[old]
        for number, chunk in enumerate(self._entries[old].chunks):
            place = self._stored[MetadataIndex(old, chunk.offsets, number)]
            self._stored[MetadataIndex(name, chunk.offsets, number)] = place

    def files(self) -> list[OutputFile]:
        """The large files."""
        return [file.output() for file in self._files]

    def small(self) -> dict[str, bytes]:
        """The file of all that is small."""
        return {_file_name(0): bytes(self._small)} if self._small else {}

    def index(self) -> dict[str, bytes]:
        """`.metadata`, pickled by torch's own classes; to be written last."""
        metadata = Metadata(
            state_dict_metadata=self._entries,
            planner_data=self._paths,
            storage_data=self._stored,
            storage_meta=StorageMeta(),
            version=CURRENT_DCP_VERSION,
        )
        return {".metadata": pickle.dumps(metadata)}

    def _name(self, keys: Keys) -> str:
        name = ".".join(map(str, keys))
        if name in self._paths:
            raise ValueError(f"{name}: two tensors or values would have this name")
        self._paths[name] = keys
        return name

    def _file(self, num_bytes: int) -> _File:
        """The file that has room for so many bytes, a new one where none has."""
        if not self._files or self._files[-1].end + num_bytes > self._shard_bytes:
            self._files.append(_File(_file_name(len(self._files) + 1)))
        return self._files[-1]

    def _value(self, content: bytes) -> _StorageInfo:
        place = self._values.get(content)
        if place is None:
            self._small += bytes(-len(self._small) % _ALIGNMENT)
            place = self._values[content] = _StorageInfo(_file_name(0), len(self._small), len(content))
            self._small += content
        return place

    def _store(self, name: str, number: int, box: Box, place: _StorageInfo) -> None:
        self._stored[MetadataIndex(name, box.offset, number)] = place

    def _describe(self, name: str, dtype: str, shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
        chunks = [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size)) for box in boxes]
        properties = TensorProperties(dtype=getattr(torch, dtype))
        self._entries[name] = TensorStorageMetadata(properties, torch.Size(shape), chunks)


@dataclass
class _File:
    """A file of archives, one for each region."""

    path: str
    end: int = 0
    archives: list[tuple[int, ArchiveLayout, Region]] = field(default_factory=list)

    def add(self, region: Region) -> _StorageInfo:
        """Put the archive of a region behind all others."""
        layout = _layout(region.dtype, region.shape)
        start = self.end + -self.end % _ALIGNMENT
        place, _ = layout.payloads[_STORAGE]
        at = Region(region.key, start + place, region.dtype, region.shape, region.state, region.parts)
        self.archives.append((start, layout, at))
        self.end = start + layout.num_bytes
        return _StorageInfo(self.path, start, layout.num_bytes)

    def output(self) -> OutputFile:
        early = [(start + at, content) for start, layout, _ in self.archives for at, content in layout.early]
        return OutputFile(self.path, self.end, tuple(r for _, _, r in self.archives), early, self._late)

    def _late(self, crcs: Mapping[str, int]) -> Chunks:
        return [
            (start + at, content)
            for start, layout, region in self.archives
            for at, content in layout.late({_STORAGE: crcs[region.key]})
        ]


def _file_name(number: int) -> str:
    """As torch names the first file of a rank."""
    return f"__{number}_0.distcp"


@lru_cache(maxsize=4096)
def _layout(dtype: str, shape: tuple[int, ...]) -> ArchiveLayout:
    """Of the archive of one tensor; chunks of the same shape share it."""
    pickled = write_pickle(TensorRef(_STORAGE, dtype, shape))
    return lay_out(pickled, [(_STORAGE, math.prod(shape) * ITEM_SIZES[dtype])])


def _filled(value: Any, payload: bytes | None = None) -> bytes:
    """What torch.save writes of a value; `payload` are the bytes of its only tensor."""
    layout = lay_out(write_pickle(value), [] if payload is None else [(_STORAGE, len(payload))])
    content = bytearray(layout.num_bytes)
    known = {} if payload is None else {_STORAGE: zlib.crc32(payload)}
    parts = [*layout.early, *layout.late(known)]
    if payload is not None:
        parts.append((layout.payloads[_STORAGE][0], payload))
    for start, part in parts:
        content[start : start + len(part)] = part
    return bytes(content)


def _chunks(shape: tuple[int, ...], item: int, limit: int) -> list[Box]:
    """Boxes of whole rows, as equal as they can be; a row that is a large matrix is cut in the same way."""
    size = math.prod(shape) * item
    if not shape or size <= limit:
        return [Box((0,) * len(shape), shape)] if size else []
    if len(shape) > 2 and size > limit * shape[0]:
        inner = _chunks(shape[1:], item, limit)
        return [Box((row, *box.offset), (1, *box.size)) for row in range(shape[0]) for box in inner]
    count = min(shape[0], -(-size // limit))
    bounds = [shape[0] * number // count for number in range(count + 1)]
    rest = (0,) * (len(shape) - 1)
    return [Box((low, *rest), (high - low, *shape[1:])) for low, high in pairwise(bounds)]


def narrowed(part: Part, box: Box) -> Part | None:
    """What of a part lies in a box of its stored tensor, counted in the box; None: nothing."""
    inside: Part | None = part
    for axis in range(len(part.start)):
        if inside is not None:
            inside = _between(inside, axis, box.offset[axis], box.offset[axis] + box.size[axis])
    return inside


def _between(part: Part, stored: int, low: int, high: int) -> Part | None:
    """What of a part lies between two indices of a stored axis, counted from the first of them."""
    start, step = part.start[stored], part.steps[stored]
    if stored not in part.axes:
        return _starting(part, stored, start - low) if low <= start < high else None
    axis = part.axes.index(stored)
    first = max(0, -(-(low - start) // step))
    last = min(part.box.size[axis], -(-(high - start) // step))
    if first >= last:
        return None
    offset, size = list(part.box.offset), list(part.box.size)
    offset[axis] += first
    size[axis] = last - first
    moved = _starting(part, stored, start + first * step - low)
    return moved._replace(box=Box(tuple(offset), tuple(size)))


def _starting(part: Part, stored: int, at: int) -> Part:
    return part._replace(start=(*part.start[:stored], at, *part.start[stored + 1 :]))
