"""Where the bytes of DCP's chunks lie, found by the headers of their archives; values of other items."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint.archive.file_tensor import FileTensor
from checkpoint.archive.torch_file import read_torch_bytes
from checkpoint.boxes import Box
from checkpoint.manifest import Piece
from checkpoint.readers.dcp_metadata import DcpMetadata, Stored

_HEAD = 1024  # bytes; the archive of one tensor has its payload before that
_SMALL = 4096  # bytes; larger items are not compared with each other
_LISTED = 3  # names given of a file that is not there


def locate(
    metadata: DcpMetadata, names: Iterable[str] | None = None
) -> tuple[dict[str, tuple[Piece, ...]], list[str]]:
    """The pieces of tensors, with absolute paths. Chunks without elements have none.

    Args:
        names: of tensors; None means all.

    Returns:
        Name -> pieces, and a line for each thing that is wrong, with the tensor and the file.
    """
    found: dict[str, list[Piece]] = {}
    wanted: list[_Wanted] = []
    problems: list[str] = []
    for name in metadata.tensors if names is None else names:
        found[name] = []
        for chunk in metadata.tensors[name].chunks:
            if chunk.stored is None:
                problems.append(f"{name} {chunk.box}: the index does not say which file holds it")
            elif chunk.box.numel:
                wanted.append(_Wanted(name, chunk.stored, chunk.box))
    headers = _Headers()

    def add(descriptor: int, path: Path, item: _Wanted) -> None:
        found[item.name].append(headers.tensor(descriptor, path, item.stored).piece(item.box))

    problems += _each(metadata.folder, wanted, add)
    return {name: tuple(pieces) for name, pieces in found.items()}, problems


def read_items(
    metadata: DcpMetadata, names: Iterable[str] | None = None, *, refused: dict[str, str] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The values of items that are no tensors, unpickled without executing anything.

    Args:
        names: of items; None means all.
        refused: takes items whose bytes are there but not understood, with the reason, if these are not to be
            among what is wrong.

    Returns:
        Name -> value, with a `FileTensor` for every tensor inside; and a line for each thing that is wrong.
    """
    values: dict[str, Any] = {}
    known: dict[bytes, Any] = {}  # settings are saved for every parameter, with the same few values

    def add(descriptor: int, path: Path, item: _Wanted) -> None:
        _, start, length, _ = item.stored
        content = os.pread(descriptor, length, start) if length <= _SMALL else b""
        if not content or content not in known:
            known[content] = read_torch_bytes(path, start, length).value
        values[item.name] = known[content]

    wanted = [
        _Wanted(name, metadata.items[name], None) for name in (metadata.items if names is None else names)
    ]
    return values, _each(metadata.folder, wanted, add, refused)


def read_numbers(metadata: DcpMetadata, names: Iterable[str]) -> tuple[dict[str, float | int], list[str]]:
    """The values of tensors that have one element each, and a line for each thing that is wrong."""
    pieces, problems = locate(metadata, names)
    found: dict[str, float | int] = {}
    for name, (*_, piece) in ((name, held) for name, held in pieces.items() if held):
        try:
            found[name] = FileTensor(piece.file, piece.start, piece.dtype, (), ()).item()
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {error}")
    return found, problems


def read_begin(pieces: Sequence[Piece], num_bytes: int = 4096) -> bytes:
    """The first bytes of a tensor; none where they are not there."""
    first = min(pieces, key=lambda piece: piece.box.offset, default=None)
    if first is None or first.strides is not None:
        return b""
    with open(first.file, "rb") as file:
        file.seek(first.start)
        return file.read(min(num_bytes, first.num_bytes))


def find_damage(metadata: DcpMetadata, names: Iterable[str]) -> list[str]:
    """What is wrong with the files of tensors that are not carried: more of them may be damaged."""
    wanted = [
        _Wanted(name, chunk.stored, chunk.box)
        for name in names
        for chunk in metadata.tensors[name].chunks
        if chunk.stored is not None
    ]
    return _each(metadata.folder, wanted, lambda *_: None)


class _Wanted(NamedTuple):
    name: str
    stored: Stored
    box: Box | None

    @property
    def end(self) -> int:
        return self.stored.start + self.stored.length


def _each(
    folder: Path,
    items: list[_Wanted],
    do: Callable[[int, Path, _Wanted], None],
    refused: dict[str, str] | None = None,
) -> list[str]:
    """Call `do` for every item whose bytes are there, file by file, and say what is wrong with the others."""
    by_file: dict[str, list[_Wanted]] = {}
    for item in items:
        by_file.setdefault(item.stored.file, []).append(item)
    problems: list[str] = []
    for file, inside in by_file.items():
        path = folder / file
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            problems.append(f"{path}: {error.strerror}; it should hold {_listed(inside)}")
            continue
        try:
            complete = _complete(path, os.fstat(descriptor).st_size, inside, problems)
            for item in sorted(complete, key=lambda item: item.stored.start):
                try:
                    _refuse_transforms(path, item)
                    do(descriptor, path, item)
                except ValueError as error:
                    if refused is not None:
                        refused[item.name] = str(error)
                        continue
                    problems.append(f"{item.name}{f' {item.box}' if item.box else ''}: {error}")
        finally:
            os.close(descriptor)
    return problems


def _complete(path: Path, size: int, items: list[_Wanted], problems: list[str]) -> list[_Wanted]:
    """The items that end before the file does; the others become one problem."""
    beyond = [item for item in items if item.end > size]
    if beyond and size == 0:
        problems.append(f"{path}: is empty (0 bytes); it should hold {_listed(beyond)}")
    elif beyond:
        problems.append(
            f"{path}: has {size} bytes, expected are at least {max(item.end for item in beyond)}: it is "
            f"truncated and lacks {_listed(beyond)}"
        )
    return [item for item in items if item.end <= size]


def _listed(items: list[_Wanted]) -> str:
    names = list(dict.fromkeys(item.name for item in items))
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _refuse_transforms(path: Path, item: _Wanted) -> None:
    if item.stored.transforms:
        raise ValueError(
            f"{path}: its bytes went through {', '.join(item.stored.transforms)} when they were saved, which "
            "is not read: load it with the extension that wrote it, and save it without"
        )


class _Headers:
    """Finds payloads by the bytes before them: chunks of the same shape have the same header in front.

    Only the first of its kind is parsed, which takes five reads; the others take one.
    """

    def __init__(self) -> None:
        self._known: dict[int, list[tuple[bytes, FileTensor]]] = {}  # by length; starts count in the archive

    def tensor(self, descriptor: int, path: Path, stored: Stored) -> FileTensor:
        head = os.pread(descriptor, min(_HEAD, stored.length), stored.start)
        alike = self._known.setdefault(stored.length, [])
        for prefix, made in alike:
            if head.startswith(prefix):
                return replace(made, file=str(path), start=stored.start + made.start)
        value = read_torch_bytes(path, stored.start, stored.length).value
        if not isinstance(value, FileTensor):
            raise ValueError(f"{path}: byte {stored.start} begins a {type(value).__name__}, not a tensor")
        inner = value.start - stored.start
        if inner <= len(head):
            alike.append((head[:inner], replace(value, start=inner)))
        return value
