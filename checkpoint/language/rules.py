"""The rules of a spec: which names each speaks of, what they are called, how their tensors lie on ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from checkpoint.language.sizes import Size, parse_size
from checkpoint.language.template import Template
from parallel.settings import Settings

AXES = ("tensor", "pipeline", "virtual", "expert", "expert_tensor", "data")
Axis = Literal["tensor", "pipeline", "virtual", "expert", "expert_tensor"]


def _as_tuple(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


Axes = Annotated[tuple[Axis, ...], BeforeValidator(_as_tuple)]


class Fused(Settings):
    """Several logical tensors in one, along a dimension.

    Attributes:
        dim: in one tensor of the stack, as stored; negative counts from the end.
        parts: name -> how many rows of it follow in each repetition; or only names, which share evenly.
        repeat: how often the list of parts follows itself (query groups of an interleaved qkv).
    """

    dim: int = 0
    parts: dict[str, Size] | tuple[str, ...]
    repeat: Size = 1

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parts)

    @property
    def sizes(self) -> tuple[Size, ...] | None:
        return tuple(self.parts.values()) if isinstance(self.parts, dict) else None


class Sharded(Settings):
    """Every rank of an axis holds a piece of a dimension.

    Attributes:
        over: the axis, or several, outermost first.
        split: "whole" cuts the stored dimension into contiguous pieces; "each" cuts every part of a fused
            tensor for itself, so that a rank holds a piece of each.
        widths: of every rank, where the ranks' shapes do not say; with split = "each", of every part.
    """

    over: Axes
    dim: int = 0
    split: Literal["whole", "each"] = "whole"
    widths: tuple[Size, ...] | dict[str, tuple[Size, ...]] | None = None


class Padded(Settings):
    """What lies beyond `size` along a dimension is padding and belongs to nothing."""

    dim: int = 0
    size: Size


class Interleaved(Settings):
    """Rotary pairs: in every block of rows, stored rows 2i and 2i + 1 are logical rows i and i + block / 2.

    Attributes:
        parts: of a fused tensor that are stored so; empty means all.
    """

    dim: int = 0
    block: Size
    parts: tuple[str, ...] = ()


class Stacked(Settings):
    """An axis of the stored tensor that counts logical tensors.

    Attributes:
        index: field of `to` that it gives.
        axis: stored axis; left out, the next one from the first.
        over: the axis of ranks it is cut over, in ranks' order.
    """

    index: str
    axis: int | None = None
    over: Axis | None = None


class Region(Settings):
    """A box of a rank's tensor, from `start`, that is the box of the logical tensor from `offset`."""

    start: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]


class Regions(Settings):
    """What nothing else can say: box by box, what every rank holds. A box may be held by several ranks.

    Attributes:
        over: the axis of ranks, or several, outermost first.
        shape: of the logical tensor.
        ranks: the boxes of each.
    """

    over: Axes
    shape: tuple[int, ...]
    ranks: tuple[tuple[Region, ...], ...]


def _as_stacked(value: Any) -> Any:
    return {"index": value} if isinstance(value, str) else value


class Rule(Settings):
    """Which source names it speaks of, what they are called, and how the tensor lies on the ranks.

    Exactly one of `match`, `regex`, `names`. Without anything else a tensor is held once and whole.
    Dimensions count in one tensor of the stack, as it is stored. See docs/checkpoint-language.md.
    """

    match: str | None = None
    regex: str | None = None
    names: tuple[str, ...] = ()
    to: str | None = None
    write_as: str | None = None
    when: Size | None = None
    ignore: bool = False
    optional: bool = False
    any_of: str | None = None
    values: Mapping[str, dict[str, str]] = Field(default_factory=dict)
    local: Mapping[str, Literal["stage", "expert"]] = Field(default_factory=dict)
    view: tuple[Size, ...] = ()
    stacked: tuple[Annotated[Stacked, BeforeValidator(_as_stacked)], ...] = ()
    regions: Regions | None = None
    fused: Fused | None = None
    sharded: Annotated[tuple[Sharded, ...], BeforeValidator(_as_tuple)] = ()
    padded: Padded | None = None
    interleaved: Interleaved | None = None
    transposed: bool = False
    replicated: Axes = ()
    average: Axes = ()
    tied: bool = False

    def __str__(self) -> str:
        return self.match or self.regex or (f"{self.names[0]} and others" if self.names else "?")

    @cached_property
    def source(self) -> Template | None:
        """The template of source names; of a regex what it is written as."""
        text = self.write_as or self.match
        return Template.parse(text) if text is not None else None

    @cached_property
    def target(self) -> Template:
        """The template of logical names."""
        return Template.parse(self.to if self.to is not None else "{name:.+}")

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What a source name must match in full."""
        if self.regex is not None:
            return re.compile(self.regex)
        assert self.match is not None
        return Template.parse(self.match).pattern({key: _either(table) for key, table in self.values.items()})

    @property
    def has_parts(self) -> bool:
        """Whether the parts of the fused tensor are logical tensors of their own."""
        return self.fused is not None and "part" in self.target.fields

    def is_number(self, field: str) -> bool:
        """Whether a captured field is a whole number: an index that can be shifted, or counted by ranks."""
        if field in self.values or self.names:
            return False
        return self.match is None or Template.parse(self.match).fields[field].regex is None

    @model_validator(mode="after")
    def _check(self) -> Rule:
        problems = list(_rule_problems(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _either(texts: dict[str, str]) -> str:
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))


def _rule_problems(rule: Rule) -> Iterator[str]:
    if sum((rule.match is not None, rule.regex is not None, bool(rule.names))) != 1:
        yield "give exactly one of match, regex and names"
        return
    try:
        _ = rule.names or rule.pattern
    except re.error as error:
        yield f"its regex is wrong: {error}"
        return
    if rule.ignore:
        return
    if rule.to is None and not rule.names:
        yield "give `to`, the logical name, or ignore = true"
        return
    yield from _field_problems(rule)
    yield from _placement_problems(rule)
    for size in _sizes(rule):
        try:
            parse_size(size)
        except ValueError as error:
            yield str(error)


def _field_problems(rule: Rule) -> Iterator[str]:
    captured = set(rule.pattern.groupindex) if not rule.names else {"name"}
    stacked = {each.index for each in rule.stacked}
    known = captured | stacked | ({"part"} if rule.fused else set())
    for field in rule.target.fields.values():
        if field.name not in known:
            yield f"`to` names {{{field.name}}}, which nothing gives; given are: {', '.join(sorted(known))}"
    for what, fields in (("values", rule.values), ("local", rule.local)):
        for missing in sorted(set(fields) - captured):
            yield f"`{what}` speaks of {missing!r}, which `match` does not capture"
    if rule.fused and "part" in captured | stacked:
        yield "{part} is what `fused` gives: call the captured field something else"
    for missing in sorted(stacked - set(rule.target.fields)):
        yield f"`stacked` gives {missing!r}, which `to` does not use"
    for field_name, table in rule.values.items():
        if len(set(table.values())) != len(table):
            yield f"`values` of {field_name!r} gives one value twice, so that names could not be written back"


def _placement_problems(rule: Rule) -> Iterator[str]:
    fused = rule.fused
    if rule.regions and (fused or rule.sharded or rule.stacked or rule.padded or rule.interleaved):
        yield "`regions` says everything: remove fused, sharded, stacked, padded and interleaved"
    for each in rule.sharded:
        yield from _sharded_problems(each, fused)
    dims = [each.dim for each in rule.sharded]
    if len(dims) != len(set(dims)):
        yield "one dimension is sharded twice: list the axes in one `over`, outermost first"
    if fused and rule.padded and fused.dim == rule.padded.dim:
        yield "`padded` and `fused` cannot share a dimension"
    if rule.interleaved and rule.interleaved.parts and not fused:
        yield "`interleaved` names parts, but nothing is fused"
    if fused and not fused.names:
        yield "`fused` has no parts"
    if rule.average and rule.tied:
        yield "a tied copy cannot be averaged"


def _sharded_problems(sharded: Sharded, fused: Fused | None) -> Iterator[str]:
    each = sharded.split == "each"
    if each and fused is None:
        yield 'split = "each" is for fused tensors'
    if each and fused is not None and (fused.repeat != 1 or fused.dim != sharded.dim):
        yield 'split = "each" needs the dimension of `fused`, and no `repeat`'
    by_part = isinstance(sharded.widths, dict)
    if by_part and (not each or fused is None or set(sharded.widths or ()) != set(fused.names)):
        yield 'widths of parts need split = "each", and one list for every part'


def _sizes(rule: Rule) -> Iterator[Size]:
    yield from rule.view
    if rule.when is not None:
        yield rule.when
    if rule.fused:
        yield rule.fused.repeat
        yield from rule.fused.sizes or ()
    for each in rule.sharded:
        for widths in each.widths.values() if isinstance(each.widths, dict) else [each.widths or ()]:
            yield from widths
    if rule.padded:
        yield rule.padded.size
    if rule.interleaved:
        yield rule.interleaved.block
