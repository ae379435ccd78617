"""Which files hold documents, and of what kind: text and source code, or JSON lines."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from trainer.data.blocks import COMPRESSED_SUFFIXES
from trainer.data.documents import BadRecord, InputFile, begins_with_record

CODE_SUFFIXES = (
    ".bash .bat .c .cc .clj .cmake .cpp .cs .css .cu .cuh .cxx .dart .erl .ex .exs .f90 .fs .go .gradle "
    ".groovy .h .hpp .hs .html .hxx .java .jl .js .jsx .kt .kts .lisp .lua .m .mjs .ml .mm .pas .php "
    ".pl .pm .proto .ps1 .py .pyi .pyx .r .rb .rs .rst .scala .scm .sh .sql .svelte .swift .tcl .tex .toml "
    ".ts .tsx .vim .vue .xml .yaml .yml .zig"
).split()
LINES_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md", *CODE_SUFFIXES)
UNDECIDED_SUFFIXES = ("", ".json")
"""Used for JSON lines as well as for other things: the first line decides."""


@dataclass(frozen=True)
class Inputs:
    """What the inputs of a command come to."""

    files: list[InputFile] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """files inside folders that are not read, by reason"""
    bad: list[BadRecord] = field(default_factory=list)
    """folders that cannot be read"""


def find_inputs(paths: Sequence[str], suffixes: Sequence[str] = (), *, text_key: str = "text") -> Inputs:
    """The files to read, in an order that depends on their names only.

    Folders are searched recursively, through links too, hidden ones and `__pycache__` excepted.

    Args:
        suffixes: what to take from folders; a file that is named itself is also read with any suffix that is
            known. Upper and lower case are the same.
        text_key: tells JSON lines from other JSON.

    Raises:
        ValueError: names every path that does not exist and every file that cannot hold documents.
    """
    inputs = Inputs()
    problems: list[str] = []
    known = (*TEXT_SUFFIXES, *LINES_SUFFIXES)
    wanted = tuple(suffix.lower() for suffix in suffixes) or known
    for path in paths:
        if os.path.isdir(path):
            _search(path, wanted, text_key, inputs)
        elif not os.path.isfile(path):
            problems.append(f"{path} does not exist")
        elif path.endswith((".bin", ".idx")):
            problems.append(f"{path} is prepared already; name it in [[data.sources]]")
        else:
            file = _input_file(path, os.path.basename(path), text_key)
            if file.lines or _plain_name(path).endswith((*known, *wanted)) or not _suffix(path):
                inputs.files.append(file)
            else:
                problems.append(_unknown(path, text_key))
    if problems:
        raise ValueError("; ".join(problems))
    if not inputs.files:
        unread = "".join(f"; {record}" for record in inputs.bad)
        raise ValueError(f"no file to read in {', '.join(paths)}; looked for {' '.join(wanted)}{unread}")
    return inputs


def _search(folder: str, wanted: tuple[str, ...], text_key: str, inputs: Inputs) -> None:
    for root, names in _walk(folder, inputs.bad):
        for name in names:
            path = os.path.join(root, name)
            if name.startswith(".") or not _plain_name(name).endswith(wanted) or not os.path.isfile(path):
                inputs.left_out["other kinds"] += 1
            elif os.path.getsize(path) == 0:
                inputs.left_out["empty files"] += 1
            else:
                inputs.files.append(_input_file(path, os.path.relpath(path, folder), text_key))


def _walk(folder: str, bad: list[BadRecord]) -> Iterator[tuple[str, list[str]]]:
    """Each folder and the names of its files, sorted; a folder that several links lead to comes once."""

    def note(error: OSError) -> None:
        bad.append(BadRecord(str(error.filename), "unreadable folder", error.strerror or ""))

    seen: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(folder, onerror=note, followlinks=True):
        status = os.stat(root)
        identity = status.st_dev, status.st_ino
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        yield root, sorted(names)


def _plain_name(path: str) -> str:
    """The last part of the path in lower case, without .gz or .zst."""
    name = os.path.basename(path).lower()
    return next((name.removesuffix(suffix) for suffix in COMPRESSED_SUFFIXES if name.endswith(suffix)), name)


def _suffix(path: str) -> str:
    return os.path.splitext(_plain_name(path))[1]


def _input_file(path: str, name: str, text_key: str) -> InputFile:
    lines = _plain_name(path).endswith(LINES_SUFFIXES) or (
        _suffix(path) in UNDECIDED_SUFFIXES and begins_with_record(path, text_key)
    )
    return InputFile(path, lines, os.path.getsize(path), name)


def _unknown(path: str, text_key: str) -> str:
    suffix = _suffix(path)
    why = (
        f"its first line is no JSON object with the key {text_key!r}" if suffix == ".json" else "unknown kind"
    )
    return f"{path}: {why}; to read it as the text of one document, pass --suffix {suffix}" + (
        ", for lines with another key --text-key" if suffix == ".json" else ", for JSON lines name it .jsonl"
    )
