"""What torch.distributed.checkpoint (DCP) wrote: its index, and where the bytes of every chunk lie.

A folder holds `.metadata`, the pickle of an index, which is written last, and `__{rank}_{n}.distcp` files.
Such a file is a concatenation; the index gives offset and length of each item, which is a torch.save archive
of its own. Tensors are stored as chunks: boxes of the whole tensor. Format: `metadata.py` and `filesystem.py`
in torch/distributed/checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint.archive.pickles import load_pickle
from checkpoint.boxes import Box

METADATA = ".metadata"
SUFFIX = ".distcp"


class Stored(NamedTuple):
    """Where an item lies.

    Attributes:
        file: relative to the checkpoint's folder.
        start: first byte of its archive.
        length: of its archive, in bytes.
        transforms: what the bytes went through before they were written, such as a compression.
    """

    file: str
    start: int
    length: int
    transforms: tuple[str, ...] = ()


class Chunk(NamedTuple):
    """A box of a tensor; `stored` is None where the index does not say where it lies."""

    box: Box
    stored: Stored | None


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A whole tensor as the index has it; dtype by torch's name without "torch."."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class DcpMetadata:
    """The index of a checkpoint.

    Attributes:
        folder: of the checkpoint.
        tensors: by flattened name, "model.layers.0.wq.weight".
        items: everything that is no tensor, pickled, by flattened name.
        paths: flattened name -> keys of the nested state dict ("optim", "state", ...); numbers index lists.
    """

    folder: Path
    tensors: dict[str, StoredTensor]
    items: dict[str, Stored]
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """Every file that items lie in, sorted."""
        chunks = (chunk.stored for tensor in self.tensors.values() for chunk in tensor.chunks)
        return sorted({stored.file for stored in (*chunks, *self.items.values()) if stored})


def read_dcp_metadata(folder: Path | str) -> DcpMetadata:
    """The index of a checkpoint, without executing anything that its pickle asks for.

    Raises:
        ValueError: there is none (the save was not finished), or it is damaged or hostile.
    """
    folder = Path(os.path.abspath(folder))
    files = index_files(folder)
    if not files:
        raise ValueError(
            f"{folder / METADATA}: missing. It is written last, so the save into this folder was not "
            "finished: take an older checkpoint"
        )
    return _merged(folder, [_read_index(folder, file) for file in files])


def index_files(folder: Path) -> list[Path]:
    """`.metadata`, or what every rank wrote for itself where they saved without talking to each other."""
    if (folder / METADATA).is_file():
        return [folder / METADATA]
    return sorted(folder.glob(f"__*{METADATA}"))


def _read_index(folder: Path, file: Path) -> DcpMetadata:
    content = file.read_bytes()
    if not content:
        raise ValueError(f"{file}: is empty (0 bytes): the save was not finished, take an older checkpoint")
    index = load_pickle(content, str(file))
    try:
        return _metadata(folder, index.state)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: is no index of torch.distributed.checkpoint ({type(error).__name__}: {error})"
        ) from None


def _merged(folder: Path, parts: Sequence[DcpMetadata]) -> DcpMetadata:
    """What ranks indexed for themselves; a box that several have is taken from the first."""
    if len(parts) == 1:
        return parts[0]
    chunks: dict[str, dict[Box, Chunk]] = {}
    merged = DcpMetadata(folder, {}, {})
    for part in parts:
        for name, tensor in part.tensors.items():
            held = chunks.setdefault(name, {})
            for chunk in tensor.chunks:
                held.setdefault(chunk.box, chunk)
            merged.tensors[name] = replace(tensor, chunks=tuple(held.values()))
        merged.items.update({name: at for name, at in part.items.items() if name not in merged.items})
        merged.paths.update(part.paths)
    return merged


def _metadata(folder: Path, index: Mapping[str, Any]) -> DcpMetadata:
    stored: dict[tuple[str, tuple[int, ...] | None], Stored] = {}
    for key, info in (index["storage_data"] or {}).items():
        place = info.state
        transforms = tuple(place.get("transform_descriptors") or ())
        stored[key.state["fqn"], key.state.get("offset")] = Stored(
            _inside(place["relative_path"]), place["offset"], place["length"], transforms
        )
    tensors: dict[str, StoredTensor] = {}
    items: dict[str, Stored] = {}
    for name, entry in index["state_dict_metadata"].items():
        if entry.name.endswith(".BytesStorageMetadata"):
            if (name, None) not in stored:
                raise ValueError(f"it does not say which file holds {name}")
            items[name] = stored[name, None]
        else:
            tensors[name] = _tensor(name, entry.state, stored)
    paths = {name: tuple(path) for name, path in (index.get("planner_data") or {}).items()}
    return DcpMetadata(folder, tensors, items, paths)


@lru_cache(maxsize=1024)
def _inside(file: str) -> str:
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise ValueError(f"it refers to {file}, outside of the checkpoint's folder")
    return file


def _tensor(
    name: str, entry: Mapping[str, Any], stored: Mapping[tuple[str, tuple[int, ...] | None], Stored]
) -> StoredTensor:
    shape = tuple(entry["size"])
    chunks = []
    for chunk in entry["chunks"]:
        box = Box(chunk.state["offsets"], chunk.state["sizes"])
        place = stored.get((name, box.offset)) or (stored.get((name, None)) if box.size == shape else None)
        chunks.append(Chunk(box, place))
    return StoredTensor(entry["properties"].state[0], shape, tuple(chunks))


def joined(folder: Path, parts: Sequence[DcpMetadata]) -> DcpMetadata:
    """One index of checkpoints that lie in folders inside of `folder` and have no name in common."""
    tensors: dict[str, StoredTensor] = {}
    items: dict[str, Stored] = {}
    paths: dict[str, tuple[str | int, ...]] = {}
    for part in parts:
        inner = part.folder.relative_to(folder)
        for name, tensor in part.tensors.items():
            chunks = tuple(
                chunk._replace(stored=chunk.stored and _below(inner, chunk.stored)) for chunk in tensor.chunks
            )
            tensors[name] = replace(tensor, chunks=chunks)
        items |= {name: _below(inner, stored) for name, stored in part.items.items()}
        paths |= part.paths
    return DcpMetadata(folder, tensors, items, paths)


def _below(folder: Path, stored: Stored) -> Stored:
    return stored._replace(file=str(folder / stored.file))
