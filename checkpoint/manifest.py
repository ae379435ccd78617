"""The manifest: where every piece of every logical tensor lies, and all that is not a tensor.

Knows JSON and nothing else, so that looking into a checkpoint costs no import of torch.
"""

from __future__ import annotations

import gc
import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from checkpoint.boxes import Box

FORMAT = "ratoon-checkpoint"
VERSION = 1  # raised when an older reader would misread what is written
AVERAGE_VERSION = 2  # has tensors to average, of which a reader of version 1 would take one copy
READABLE = (VERSION, AVERAGE_VERSION)
MANIFEST = "manifest.json"
PARAMETER_STATES = ("weight", "master")  # the parameter itself, in the precisions it is kept in
TENSORS = b'"tensors":[\n'  # then a line a tensor, then a line that ends it all

ITEM_SIZES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes an element takes, by torch's name of the dtype."""


@dataclass(frozen=True, slots=True)
class Piece:
    """These bytes of this file are that box of a logical tensor.

    Attributes:
        file: relative to the manifest's folder, or absolute.
        start: byte in the file where the box's first element lies.
        dtype: torch's name, without "torch.".
        box: which elements.
        hash: xxh3-64 of the piece's bytes, 16 hexadecimal digits; None where nobody computed it.
        strides: in elements, one an axis; None means row-major without gaps.
    """

    file: str
    start: int
    dtype: str
    box: Box
    hash: str | None = None
    strides: tuple[int, ...] | None = None

    @property
    def num_bytes(self) -> int:
        """From the first element to the end of the last one."""
        if self.strides is None:
            return self.box.numel * ITEM_SIZES[self.dtype]
        last = sum((size - 1) * stride for size, stride in zip(self.box.size, self.strides, strict=True))
        return (last + 1) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """One state ("weight", "master", "exp_avg", ...) of one layout-free parameter, and its pieces.

    Attributes:
        pieces: every element exactly once.
        replicas: further copies, which should be equal bit for bit; one that several ranks held in part only
            may lack elements.
        average: the value is the mean, taken in fp32, of the pieces and of every replica.
    """

    name: str
    state: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]
    replicas: tuple[tuple[Piece, ...], ...] = ()
    average: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class RankBlob:
    """Bytes that belong to one rank of the layout that saved them, such as its random generators' states."""

    rank: int
    name: str
    file: str
    start: int
    num_bytes: int
    hash: str


@dataclass(frozen=True)
class Manifest:
    """A checkpoint without its payload.

    `state` holds what is not a tensor and is JSON: by convention under the keys `parameter_groups`,
    `scalars`, `schedule`, `data` (the position), `config`, `layout`, `versions` and `lineage`; that of
    another trainer's checkpoint as `checkpoint.assembly.assemble` says.
    """

    step: int
    world_size: int
    tensors: tuple[LogicalTensor, ...]
    state: Mapping[str, Any] = field(default_factory=dict)
    rank_blobs: tuple[RankBlob, ...] = ()

    def by_key(self) -> dict[tuple[str, str], LogicalTensor]:
        """Tensors by (logical name, state)."""
        return {(tensor.name, tensor.state): tensor for tensor in self.tensors}

    def to_json(self) -> bytes:
        """One line a tensor; files are written once and pieces name them by number."""
        return self.with_tensors(self.tensors)

    def with_tensors(self, tensors: Iterable[LogicalTensor]) -> bytes:
        """The JSON of this manifest with other tensors, of which only one has to exist at a time."""
        files: dict[str, int] = {}
        version = VERSION
        texts = []
        for tensor in tensors:
            version = AVERAGE_VERSION if tensor.average else version
            texts.append(_dumps(_tensor_to_json(tensor, files)))
        lines = ",\n".join(texts)
        blobs = [
            [b.rank, b.name, files.setdefault(b.file, len(files)), b.start, b.num_bytes, b.hash]
            for b in self.rank_blobs
        ]
        head = {"format": FORMAT, "version": version, "step": self.step, "world_size": self.world_size}
        parts = [
            _dumps(head)[:-1],
            f'"state":{_dumps(self.state)}',
            f'"files":{_dumps(list(files))}',
            f'"rank_blobs":{_dumps(blobs)}',
            f"{TENSORS.decode()}{lines}\n]}}\n",
        ]
        return ",\n".join(parts).encode()

    @classmethod
    def from_json(cls, text: bytes, source: str) -> Manifest:
        """Parse what `to_json` wrote.

        Raises:
            ValueError: not a manifest, damaged, or of a newer format; `source` is named.
        """
        with no_collection():
            try:
                tree = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{source} is not JSON ({error}): the checkpoint is damaged") from None
            return cls._from_tree(tree, source)

    @classmethod
    def _from_tree(cls, tree: Any, source: str) -> Manifest:
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise ValueError(f'{source} is not a Ratoon manifest: "format" should be "{FORMAT}"')
        if tree.get("version") not in READABLE:
            raise ValueError(
                f"{source} has format version {tree.get('version')}, this Ratoon reads versions "
                f"{', '.join(map(str, READABLE))}: install the Ratoon that wrote it, or a newer one"
            )
        try:
            files = tree["files"]
            return cls(
                step=tree["step"],
                world_size=tree["world_size"],
                tensors=tuple(tensor_from_json(entry, files) for entry in tree["tensors"]),
                state=tree["state"],
                rank_blobs=tuple(RankBlob(r, n, files[f], *rest) for r, n, f, *rest in tree["rank_blobs"]),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{source} is damaged: {type(error).__name__} {error}") from None


@contextmanager
def no_collection() -> Iterator[None]:
    """For work that makes hundreds of thousands of objects and no garbage: looking for some takes longer.

    On the main thread only: a thread beside it must not turn off the collector for the whole process.
    """
    if not gc.isenabled() or threading.current_thread() is not threading.main_thread():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _tensor_to_json(tensor: LogicalTensor, files: dict[str, int]) -> dict[str, Any]:
    def rows(pieces: Iterable[Piece]) -> list[list[Any]]:
        return [_piece_to_json(piece, tensor.dtype, files) for piece in pieces]

    entry: dict[str, Any] = {
        "name": tensor.name,
        "state": tensor.state,
        "shape": tensor.shape,
        "dtype": tensor.dtype,
        "pieces": rows(tensor.pieces),
    }
    if tensor.replicas:
        entry["replicas"] = [rows(replica) for replica in tensor.replicas]
    if tensor.average:
        entry["average"] = True
    return entry


def _piece_to_json(piece: Piece, dtype: str, files: dict[str, int]) -> list[Any]:
    number = files.setdefault(piece.file, len(files))
    row: list[Any] = [number, piece.start, piece.box.offset, piece.box.size, piece.hash]
    if piece.dtype != dtype or piece.strides is not None:
        row.append({"dtype": piece.dtype, "strides": piece.strides})
    return row


def tensor_from_json(entry: dict[str, Any], files: list[str]) -> LogicalTensor:
    """A tensor from its line of the manifest; `files` are those that the manifest numbers."""
    dtype = entry["dtype"]

    def pieces(rows: list[list[Any]]) -> tuple[Piece, ...]:
        return tuple([_piece_from_json(row, dtype, files) for row in rows])

    return LogicalTensor(
        entry["name"],
        entry["state"],
        tuple(entry["shape"]),
        dtype,
        pieces(entry["pieces"]),
        tuple([pieces(rows) for rows in entry["replicas"]]) if "replicas" in entry else (),
        entry.get("average", False),
    )


def _piece_from_json(row: list[Any], dtype: str, files: list[str]) -> Piece:
    file, start, offset, size, digest, *rest = row
    strides = None
    if rest:
        dtype = rest[0]["dtype"]
        strides = None if rest[0]["strides"] is None else tuple(rest[0]["strides"])
    if dtype not in ITEM_SIZES:
        raise ValueError(f"unknown dtype {dtype!r}")
    return Piece(files[file], start, dtype, Box(tuple(offset), tuple(size)), digest, strides)
