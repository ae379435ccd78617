"""Documents out of files: text and source code (one a file), JSON lines (one a line), also as .gz or .zst."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.blocks import read_blocks, unreadable
from trainer.data.metadata import FILE_PATH, MetadataOptions

CHUNK_BYTES = 1 << 20
"""Of whole files, on disk, that one process is handed at once."""
LONGEST_FIRST_LINE = 1 << 26
"""Bytes after which a file that goes on without a line break is not taken for JSON lines."""


@dataclass(frozen=True)
class InputFile:
    """One file to read."""

    path: str
    lines: bool
    """a document per JSON line; else the whole file is one document"""
    size: int
    """bytes on disk"""
    name: str
    """its path as seen from the folder that was named; its own name where it was named itself"""


@dataclass(frozen=True)
class Document:
    """One document as it was read."""

    text: str
    metadata: str = ""
    """the value that was asked for; empty where the record has none"""


@dataclass(frozen=True)
class BadRecord:
    """A record that is no document, and why."""

    where: str
    """`file:line`, or the file where a file is one document"""
    reason: str
    """one of few, to be counted"""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Chunk:
    """Work for one process: some lines of one file, or some whole files.

    Where chunks end depends on the files alone, never on who reads them.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    """`InputFile.name` of each"""
    consumed: int
    """bytes of input, as they are on disk, that were read since the chunk before"""
    lines: bytes | None = None
    """whole lines; None means the whole files `paths`"""
    first_line: int = 1
    problem: BadRecord | None = None
    """what ended the reading of this file early"""


def read_chunks(files: Sequence[InputFile]) -> Iterator[Chunk]:
    """Cut the files into work, in order."""
    group: list[InputFile] = []
    for file in files:
        if group and (file.lines or sum(one.size for one in group) >= CHUNK_BYTES):
            yield _whole(group)
            group = []
        if file.lines:
            yield from _line_chunks(file)
        else:
            group.append(file)
    if group:
        yield _whole(group)


def _whole(group: Sequence[InputFile]) -> Chunk:
    paths, names = (file.path for file in group), (file.name for file in group)
    return Chunk(tuple(paths), tuple(names), sum(file.size for file in group))


def _line_chunks(file: InputFile) -> Iterator[Chunk]:
    """Runs of whole lines; a file that breaks off yields what came before, and the problem."""
    line, consumed, rest = 1, 0, b""
    try:
        with open(file.path, "rb") as raw:
            for block in read_blocks(raw, file.path):
                body, newline, tail = (rest + block).rpartition(b"\n")
                rest = tail
                if newline:
                    place = raw.tell()
                    yield Chunk((file.path,), (file.name,), place - consumed, body, line)
                    line, consumed = line + body.count(b"\n") + 1, place
        yield Chunk((file.path,), (file.name,), file.size - consumed, rest, line)
    except Exception as error:
        if not unreadable(error):
            raise
        problem = BadRecord(f"{file.path}:{line}", "unreadable file", str(error))
        yield Chunk((file.path,), (file.name,), file.size - consumed, b"", line, problem)


def parse(
    chunk: Chunk, text_key: str, metadata: MetadataOptions | None = None
) -> Iterator[Document | BadRecord]:
    """The documents of a chunk, and what is none, in order."""
    if chunk.lines is None:
        named = metadata is not None and metadata.key == FILE_PATH
        for path, name in zip(chunk.paths, chunk.names, strict=True):
            yield _read_document(path, name if named else "")
        return
    for number, line in enumerate(chunk.lines.split(b"\n"), start=chunk.first_line):
        if line.strip():
            yield _parse_line(line, f"{chunk.paths[0]}:{number}", text_key, metadata)
    if chunk.problem is not None:
        yield chunk.problem


def _read_document(path: str, name: str) -> Document | BadRecord:
    try:
        with open(path, "rb") as raw:
            content = b"".join(read_blocks(raw, path))
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return BadRecord(f"{path}:{line}", "invalid UTF-8", error.reason)
    except Exception as error:
        if not unreadable(error):
            raise
        return BadRecord(path, "unreadable file", str(error))
    return Document(text, name) if text.strip() else BadRecord(path, "empty")


def begins_with_record(path: str, text_key: str) -> bool:
    """Whether the first line that is not blank is a JSON object with this key.

    Also True where the file cannot be read that far: whoever reads it as lines will say so.
    """
    first = b""
    try:
        with open(path, "rb") as raw:
            for block in read_blocks(raw, path):
                first = (first + block).lstrip()
                if b"\n" in first or len(first) > LONGEST_FIRST_LINE:
                    break
    except Exception as error:
        if not unreadable(error):
            raise
        return True
    record = _parse_line(first.partition(b"\n")[0], path, text_key)
    return isinstance(record, Document) or record.reason in ("not a string", "empty")


def _parse_line(
    line: bytes, where: str, text_key: str, metadata: MetadataOptions | None = None
) -> Document | BadRecord:
    try:
        record: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRecord(where, "invalid UTF-8", error.reason)
    except (ValueError, RecursionError) as error:
        return BadRecord(where, "invalid JSON", str(error))
    if not isinstance(record, dict) or text_key not in record:
        found = f"it has {', '.join(list(record)[:5])}" if isinstance(record, dict) else "not an object"
        return BadRecord(where, f"no key {text_key!r}", found)
    text = record[text_key]
    if not isinstance(text, str):
        return BadRecord(where, "not a string", f"{text_key!r} is {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON, but half a character
        return BadRecord(where, "invalid UTF-8", error.reason)
    value = "" if metadata is None else metadata.value_of(record)
    return Document(text, value) if text.strip() else BadRecord(where, "empty")
