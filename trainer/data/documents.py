"""Documents out of files: text and source code (one a file), JSON lines (one a line), also as .gz or .zst."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, cast

CODE_SUFFIXES = (
    ".bash .bat .c .cc .clj .cmake .cpp .cs .css .cu .cuh .cxx .dart .erl .ex .exs .f90 .fs .go .gradle "
    ".groovy .h .hpp .hs .html .hxx .java .jl .js .jsx .kt .kts .lisp .lua .m .mjs .ml .mm .pas .php "
    ".pl .pm .proto .ps1 .py .pyi .pyx .r .rb .rs .rst .scala .scm .sh .sql .svelte .swift .tcl .tex .toml "
    ".ts .tsx .vim .vue .xml .yaml .yml .zig"
).split()
LINES_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md", *CODE_SUFFIXES)
COMPRESSED_SUFFIXES = (".gz", ".zst")
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class InputFile:
    """One file to read."""

    path: str
    lines: bool
    """a document per JSON line; else the whole file is one document"""
    size: int
    """bytes on disk"""


@dataclass(frozen=True)
class Inputs:
    """What the inputs of a command come to."""

    files: list[InputFile]
    left_out: Counter[str] = field(default_factory=Counter)
    """files inside folders that are not read, by reason"""


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
    consumed: int
    """bytes of input, as they are on disk, that were read since the chunk before"""
    lines: bytes | None = None
    """whole lines; None means the whole files `paths`"""
    first_line: int = 1
    problem: BadRecord | None = None
    """what ended the reading of this file early"""


def find_inputs(paths: Sequence[str], suffixes: Sequence[str] = ()) -> Inputs:
    """The files to read, in an order that depends on their names only.

    Folders are searched recursively, hidden ones and `__pycache__` excepted. `suffixes` limits what is taken
    from folders; a file that is named itself is always read.

    Raises:
        ValueError: names every path that does not exist and every file that cannot hold documents.
    """
    inputs = Inputs([])
    problems: list[str] = []
    wanted = tuple(suffixes) or (*TEXT_SUFFIXES, *LINES_SUFFIXES)
    for path in paths:
        if os.path.isdir(path):
            _search(path, wanted, inputs)
        elif not os.path.isfile(path):
            problems.append(f"{path} does not exist")
        elif path.endswith((".bin", ".idx")):
            problems.append(f"{path} is prepared already; name it in [[data.sources]]")
        else:
            inputs.files.append(_input_file(path))
    if problems:
        raise ValueError("; ".join(problems))
    if not inputs.files:
        raise ValueError(f"no file to read in {', '.join(paths)}; looked for {' '.join(wanted)}")
    return inputs


def _search(folder: str, wanted: tuple[str, ...], inputs: Inputs) -> None:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            path = os.path.join(root, name)
            if name.startswith(".") or not _plain_name(name).endswith(wanted) or not os.path.isfile(path):
                inputs.left_out["other kinds"] += 1
            elif os.path.getsize(path) == 0:
                inputs.left_out["empty files"] += 1
            else:
                inputs.files.append(_input_file(path))


def _plain_name(name: str) -> str:
    """The name without .gz or .zst."""
    return next((name.removesuffix(suffix) for suffix in COMPRESSED_SUFFIXES if name.endswith(suffix)), name)


def _input_file(path: str) -> InputFile:
    return InputFile(path, _plain_name(path).endswith(LINES_SUFFIXES), os.path.getsize(path))


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
    return Chunk(tuple(file.path for file in group), sum(file.size for file in group))


def _line_chunks(file: InputFile) -> Iterator[Chunk]:
    """Runs of whole lines; a file that breaks off yields what came before, and the problem."""
    line, consumed, rest = 1, 0, b""
    try:
        with open(file.path, "rb") as raw, _decompressed(raw, file.path) as stream:
            while block := stream.read(CHUNK_BYTES):
                body, newline, tail = (rest + block).rpartition(b"\n")
                rest = tail
                if newline:
                    place = raw.tell()
                    yield Chunk((file.path,), place - consumed, body, line)
                    line, consumed = line + body.count(b"\n") + 1, place
        yield Chunk((file.path,), file.size - consumed, rest, line)
    except Exception as error:
        if not _unreadable(error):
            raise
        problem = BadRecord(f"{file.path}:{line}", "unreadable file", str(error))
        yield Chunk((file.path,), file.size - consumed, b"", line, problem)


def _decompressed(raw: IO[bytes], path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if path.endswith(".zst"):
        import zstandard

        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return cast(IO[bytes], reader)
    return raw


def _unreadable(error: Exception) -> bool:
    """Whether this is about the file: it cannot be opened, or its compressed stream is broken."""
    return isinstance(error, OSError | EOFError | zlib.error) or type(error).__name__ == "ZstdError"


def parse(chunk: Chunk, text_key: str) -> Iterator[str | BadRecord]:
    """The documents of a chunk, and what is none, in order."""
    if chunk.lines is None:
        for path in chunk.paths:
            yield _read_document(path)
        return
    for number, line in enumerate(chunk.lines.split(b"\n"), start=chunk.first_line):
        if line.strip():
            yield _parse_line(line, f"{chunk.paths[0]}:{number}", text_key)
    if chunk.problem is not None:
        yield chunk.problem


def _read_document(path: str) -> str | BadRecord:
    try:
        with open(path, "rb") as raw, _decompressed(raw, path) as stream:
            content = stream.read()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return BadRecord(f"{path}:{line}", "invalid UTF-8", error.reason)
    except Exception as error:
        if not _unreadable(error):
            raise
        return BadRecord(path, "unreadable file", str(error))
    return text if text.strip() else BadRecord(path, "empty")


def _parse_line(line: bytes, where: str, text_key: str) -> str | BadRecord:
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
    return text if text.strip() else BadRecord(where, "empty")
