"""Templates of names: "decoder.layers.{layer}.mlp.{kind:weight|bias}". They read names and write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

Value = int | str
_FIELD = re.compile(r"(?P<name>[a-z_][a-z0-9_]*)(?P<shift>[+-]\d+)?(?P<regex>:.*)?", re.DOTALL)


@dataclass(frozen=True)
class Field:
    """A placeholder. Without a regex it is a whole number, and the name shows it plus `shift`."""

    name: str
    regex: str | None = None
    shift: int = 0


@dataclass(frozen=True)
class Template:
    """Literal text and fields in turn.

    Raises:
        ValueError: from `parse`, for unbalanced braces or a placeholder that is none.
    """

    text: str
    parts: tuple[str | Field, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Split at braces; a regex may contain balanced ones ("{digits:\\d{2}}")."""
        parts: list[str | Field] = []
        rest = text
        while rest:
            literal, brace, rest = rest.partition("{")
            if "}" in literal:
                raise ValueError(f"the template {text!r} has a '}}' without its '{{'")
            if literal:
                parts.append(literal)
            if brace:
                end = _closing(rest)
                match = _FIELD.fullmatch(rest[:end]) if end >= 0 else None
                if match is None:
                    raise ValueError(
                        f"the template {text!r} has {'{' + rest!r} where {{name}}, {{name+1}} or "
                        "{name:REGEX} should be; a name has small letters, digits and _"
                    )
                regex = match["regex"][1:] if match["regex"] else None
                parts.append(Field(match["name"], regex, int(match["shift"] or 0)))
                rest = rest[end + 1 :]
        return cls(text, tuple(parts))

    @cached_property
    def fields(self) -> dict[str, Field]:
        return {part.name: part for part in self.parts if isinstance(part, Field)}

    @cached_property
    def prefix(self) -> str:
        """Literal text before the first field: what every name begins with."""
        return self.parts[0] if self.parts and isinstance(self.parts[0], str) else ""

    @cached_property
    def suffix(self) -> str:
        """Literal text behind the last field."""
        return self.parts[-1] if self.parts and isinstance(self.parts[-1], str) else ""

    def pattern(self, regexes: Mapping[str, str]) -> re.Pattern[str]:
        """What recognises the names; `regexes` go before the fields' own. A repeated field must repeat."""
        seen: set[str] = set()
        text = ""
        for part in self.parts:
            if isinstance(part, str):
                text += re.escape(part)
            elif part.name in seen:
                text += f"(?P={part.name})"
            else:
                seen.add(part.name)
                text += f"(?P<{part.name}>{regexes.get(part.name, part.regex or chr(92) + 'd+')})"
        return re.compile(text)

    def fill(self, values: Mapping[str, Value]) -> str:
        """The name for these values."""
        text = ""
        for part in self.parts:
            if isinstance(part, str):
                text += part
            else:
                value = values[part.name]
                text += str(value + part.shift if isinstance(value, int) else value)
        return text


def _closing(text: str) -> int:
    """Where the brace closes that was opened before `text`; -1 if nowhere."""
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return at
    return -1
