"""What pydantic finds wrong with a run file, in sentences: the line, what was found, what is expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from trainer.run_file import Key, RunFile

_UNKNOWN = frozenset({"extra_forbidden", "unexpected_keyword_argument"})
_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "a string",
    "path": "a path",
    "list": "a list",
    "tuple": "a list",
    "dict": "a table",
    "model": "a table",
    "dataclass": "a table",
}
_MISSING = frozenset({"missing", "missing_argument", "missing_keyword_only_argument"})


def explain(error: ValidationError, run_file: RunFile, model: type[BaseModel]) -> list[str]:
    """One sentence, or more where a validator reports several lines, for everything in `error`."""
    known = _known_keys(model)
    problems: list[tuple[int, str]] = []
    for item in error.errors():
        key = tuple(item["loc"])
        line = run_file.line(key)
        where = f"line {line}: " if line else "" if line is None else "--set: "
        problems += [(line or 0, where + sentence) for sentence in _sentences(item, key, known)]
    return [sentence for _, sentence in sorted(dict.fromkeys(problems), key=lambda problem: problem[0])]


def report(name: str, problems: list[str]) -> str:
    """The text of the error that lists `problems` of the run file `name`."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{name}: {count}", *(f"  - {problem}" for problem in problems)])


def _sentences(item: Mapping[str, Any], key: Key, known: Mapping[Key, list[str]]) -> list[str]:
    kind, found = item["type"], item.get("input")
    name = show_key(key)
    if kind in _UNKNOWN:
        return [f"{name} is not a key of the run file{_suggestion(key, known)}"]
    if kind in _MISSING:
        return [f"{name} is missing: it has no default"]
    expected = str(item["msg"])
    if kind in ("value_error", "assertion_error"):
        text = expected.partition(", ")[2] if expected.startswith(("Value error", "Assertion")) else expected
        return [_with_key(name, line) for line in text.splitlines() if line.strip()]
    for ending in ("_type", "_parsing", "_from_float"):
        if (wanted := _EXPECTED.get(kind.removesuffix(ending))) and kind.endswith(ending):
            return [f"{name} = {_show(found)}: expected {wanted}, found {_type_name(found)}"]
    expected = expected.replace("Input should be ", "").replace("greater than or equal to", "at least")
    return [f"{name} = {_show(found)}: expected {expected}"]


def _with_key(name: str, line: str) -> str:
    """Validators of a whole section name their keys themselves."""
    return line if name.partition(".")[0] in line else f"{name}: {line}"


def show_key(key: Key) -> str:
    """`data.sources.0.weight`, as `--set` takes it."""
    return ".".join(str(part) for part in key) or "the run file"


def _show(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{...}"
    return str(value)


def _type_name(value: object) -> str:
    names: dict[type, str] = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "a table",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _suggestion(key: Key, known: Mapping[Key, list[str]]) -> str:
    """Nearest key of the same section, else the same or a near key of another."""
    *path, last = key
    table: Key = tuple(0 if isinstance(part, int) else part for part in path)
    if near := difflib.get_close_matches(str(last), known.get(table, []), n=1, cutoff=0.6):
        return f"; did you mean {show_key((*path, near[0]))}?"
    everywhere = {name: table for table, names in known.items() for name in names}
    if near := difflib.get_close_matches(str(last), list(everywhere), n=1, cutoff=0.75):
        return f"; did you mean {show_key((*everywhere[near[0]], near[0]))}?"
    names = known.get(table)
    return f"; {show_key(table)} has {', '.join(names)}" if names else ""


def _known_keys(model: type[BaseModel]) -> dict[Key, list[str]]:
    """The keys of every table of `model`, lists of tables standing under index 0."""
    schema = model.model_json_schema()
    return dict(_tables(schema, schema.get("$defs", {}), ()))


def _tables(
    schema: Mapping[str, Any], definitions: Mapping[str, Any], path: Key
) -> Iterator[tuple[Key, list[str]]]:
    if reference := schema.get("$ref"):
        yield from _tables(definitions[reference.rpartition("/")[2]], definitions, path)
    for alternative in (*schema.get("anyOf", ()), *schema.get("allOf", ())):
        yield from _tables(alternative, definitions, path)
    if properties := schema.get("properties"):
        yield path, list(properties)
        for name, value in properties.items():
            yield from _tables(value, definitions, (*path, name))
    if isinstance(items := schema.get("items"), Mapping):
        yield from _tables(items, definitions, (*path, 0))
