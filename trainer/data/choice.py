"""Choosing sources in a run file: by name, by group, or by tag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

GROUP, TAG = "group:", "tag:"


class Described(Protocol):
    """What a source is chosen by."""

    @property
    def name(self) -> str: ...
    @property
    def group(self) -> str | None: ...
    @property
    def tags(self) -> Mapping[str, str | int | float | bool]: ...


def is_chosen(source: Described, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns means a source.

    `NAME` is its name, `group:GROUP` its group, `tag:KEY=VALUE` one of its tags and `tag:KEY` any value of
    it. NAME, GROUP and VALUE may have the wildcards *, ? and [...]; numbers and booleans are as TOML has
    them.
    """
    return any(_matches(source, pattern) for pattern in patterns)


def _matches(source: Described, pattern: str) -> bool:
    if pattern.startswith(GROUP):
        return source.group is not None and fnmatchcase(source.group, pattern.removeprefix(GROUP))
    if pattern.startswith(TAG):
        key, equals, value = pattern.removeprefix(TAG).partition("=")
        return key in source.tags and (not equals or fnmatchcase(_word(source.tags[key]), value))
    return fnmatchcase(source.name, pattern)


def choice_problems(patterns: Sequence[str], sources: Sequence[Described]) -> list[str]:
    """A sentence for every pattern that means none of these sources, with what there is instead."""
    return [
        f"{pattern!r}, which is no source; {_there_are(pattern, sources)}"
        for pattern in patterns
        if not any(is_chosen(source, [pattern]) for source in sources)
    ]


def _there_are(pattern: str, sources: Sequence[Described]) -> str:
    if pattern.startswith(GROUP):
        what, known = "their groups are", [source.group for source in sources if source.group is not None]
    elif pattern.startswith(TAG):
        what = "their tags are"
        known = [f"{key}={_word(value)}" for source in sources for key, value in source.tags.items()]
    else:
        what, known = "[[data.sources]] has", [source.name for source in sources]
    return f"{what} {', '.join(dict.fromkeys(known)) or 'none'}"


def _word(value: str | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
