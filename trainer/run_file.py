"""The text of a run file: TOML with line numbers, `--set` overrides, and TOML written back."""

from __future__ import annotations

import copy
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Key = tuple[str | int, ...]
"""Path of a value in the file: ("data", "sources", 0, "weight")."""

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$")
_ASSIGNMENT = re.compile(r"^\s*([A-Za-z0-9_.\"'-]+)\s*=")
_BARE_KEY = re.compile(r"^[A-Za-z0-9_-]+$")


@dataclass(frozen=True)
class RunFile:
    """What a run file says, and on which line it says it; 0 stands for the command line."""

    name: str
    values: dict[str, Any]
    lines: Mapping[Key, int] = field(default_factory=dict)

    def line(self, key: Key) -> int | None:
        """The line of `key`, or of the nearest table around it; None when the file does not mention it."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.lines:
                return self.lines[key[:length]]
        return None


def read_run_file(path: Path) -> RunFile:
    """Read a TOML file.

    Raises:
        ValueError: no such file, or not TOML; with the line where there is one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the run file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    return RunFile(str(path), values, key_lines(text))


def key_lines(text: str) -> dict[Key, int]:
    """Line number (from 1) of every table header and key that stands at the start of a line.

    Keys inside inline tables and multi-line values have no line of their own.
    """
    lines: dict[Key, int] = {}
    table: Key = ()
    lengths: dict[Key, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _split_key(header[2])
            if header[1] == "[[":
                index = lengths.get(table, 0)
                lengths[table] = index + 1
                lines.setdefault(table, number)
                table = (*table, index)
            lines.setdefault(table, number)
        elif assignment := _ASSIGNMENT.match(line):
            lines.setdefault((*table, *_split_key(assignment[1])), number)
    return lines


def apply_overrides(run_file: RunFile, overrides: Sequence[str]) -> RunFile:
    """The file with `a.b=value` assignments from the command line applied, left to right.

    Values are TOML (`2`, `true`, `[1, 2]`, `"text"`); what is not TOML is taken as a string. Numbers in the
    key index lists (`data.sources.0.weight=2`). An empty value removes the key, so that its default holds.

    Raises:
        ValueError: naming every override that cannot be applied.
    """
    values = copy.deepcopy(run_file.values)
    lines = dict(run_file.lines)
    problems = []
    for override in overrides:
        try:
            key, value = _parse_override(override)
            _assign(values, key, value)
        except ValueError as error:
            problems.append(f"--set {override}: {error}")
        else:
            lines[key] = 0
    if problems:
        raise ValueError("\n".join(problems))
    return RunFile(run_file.name, values, lines)


_REMOVE = object()


def _parse_override(override: str) -> tuple[Key, Any]:
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        raise ValueError("expected KEY=VALUE, for example train.steps=100")
    key = tuple(int(part) if part.isdigit() else part for part in _split_key(name.strip()))
    text = text.strip()
    if not text:
        return key, _REMOVE
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if text[0] in "[{\"'":
            raise ValueError(f"not a TOML value: {error}") from None
        return key, text


def _split_key(text: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in text.split("."))


def _assign(values: Any, key: Key, value: Any) -> None:
    """Put `value` at `key`, making tables on the way; one past the end of a list appends."""
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        where = ".".join(map(str, key[:depth])) or "the file"
        if isinstance(values, list):
            if not isinstance(part, int) or part > len(values):
                raise ValueError(
                    f"{where} is a list: expected an index from 0 to {len(values)}, found {part}"
                )
            if part == len(values):
                values.append({})
        elif isinstance(values, dict):
            part = str(part)
            values.setdefault(part, {})
        else:
            raise ValueError(f"{where} is a value, not a table")
        if last and value is _REMOVE:
            del values[part]
        elif last:
            values[part] = value
        else:
            values = values[part]


def to_toml(values: Mapping[str, Any]) -> str:
    """TOML text of nested tables. None is left out: TOML has no word for it."""
    blocks: list[str] = []
    _write_table(values, (), blocks)
    return "\n\n".join(blocks) + "\n"


def _write_table(
    table: Mapping[str, Any], path: tuple[str, ...], blocks: list[str], header: str = ""
) -> None:
    plain = {k: v for k, v in table.items() if not _is_nested(v) and v is not None}
    nested = {k: v for k, v in table.items() if _is_nested(v)}
    needed = bool(plain) or not nested or header.startswith("[[")
    lines = [header] if header and needed else []
    lines += [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in plain.items()]
    if lines:
        blocks.append("\n".join(lines))
    for key, value in nested.items():
        name = ".".join(map(_toml_key, (*path, key)))
        if isinstance(value, Mapping):
            _write_table(value, (*path, key), blocks, f"[{name}]")
        else:
            for item in value:
                _write_table(item, (*path, key), blocks, f"[[{name}]]")


def _is_nested(value: Any) -> bool:
    if isinstance(value, Mapping):
        return True
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(v, Mapping) for v in value)


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.match(key) else json.dumps(key, ensure_ascii=False)


def _toml_value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            if math.isfinite(value):
                return repr(value) if "." in repr(value) or "e" in repr(value) else f"{value!r}.0"
            return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list() | tuple():
            return "[" + ", ".join(_toml_value(item) for item in value) + "]"
        case Mapping():
            pairs = (f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None)
            return "{ " + ", ".join(pairs) + " }"
        case _:
            raise TypeError(f"no TOML form for {type(value).__name__}")
