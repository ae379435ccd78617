"""A spec: the rules that say how a source's tensors map to logical ones. TOML, checked by pydantic."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from checkpoint.language.sizes import Size, parse_size
from checkpoint.language.template import Template
from parallel.settings import Settings

SHIPPED = Path(__file__).parent / "specs"
AXES = ("tensor", "pipeline", "virtual", "expert", "expert_tensor", "data")
Axis = Literal["tensor", "pipeline", "virtual", "expert", "expert_tensor"]
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Name components that DistributedDataParallel, torch.compile, FSDP1 and checkpoint_wrapper put in."""


class SpecError(ValueError):
    """A spec that is wrong in itself or does not fit a checkpoint.

    Attributes:
        problems: one sentence each, all of them.
        unmatched: how many source names no rule matches.
    """

    def __init__(self, headline: str, problems: list[str], unmatched: int = 0) -> None:
        self.problems = tuple(problems)
        self.unmatched = unmatched
        super().__init__(headline + "".join(f"\n- {problem}" for problem in problems))


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
    for each in rule.sharded:
        if each.split == "each" and fused is None:
            yield 'split = "each" is for fused tensors'
        if each.split == "each" and fused is not None and (fused.repeat != 1 or fused.dim != each.dim):
            yield 'split = "each" needs the dimension of `fused`, and no `repeat`'
        if isinstance(each.widths, dict) and (
            each.split != "each" or fused is None or set(each.widths) != set(fused.names)
        ):
            yield 'widths of parts need split = "each", and one list for every part'
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


class Rename(Settings):
    """A regex that is replaced wherever it occurs in a source name, before any rule sees it."""

    regex: str
    by: str


class Spec(Settings):
    """All rules for a kind of checkpoint.

    Attributes:
        about: one line for lists of specs.
        automatic: whether `choose_spec` may take it without being told to.
        include: shipped specs whose rules, renames, facts and replicated axes follow this one's.
        facts: defaults: numbers, or expressions over other facts.
        strip: components of names that wrappers put in; removed wherever they stand between dots.
        rename: further changes to source names, in order.
        replicated: axes over which every rule's tensors may be repeated.
        placement_from: "checkpoint": how tensors lie on ranks is the checkpoint's own word (DeepSpeed's
            universal_checkpoint_info) where it has one; the rules then see whole tensors.
        placement: the spec made of that word; never in a file.
    """

    name: str
    format: Literal[1] = 1
    about: str = ""
    automatic: bool = True
    include: tuple[str, ...] = ()
    facts: Mapping[str, Size] = Field(default_factory=dict)
    strip: tuple[str, ...] = WRAPPERS
    rename: tuple[Rename, ...] = ()
    replicated: Axes = ()
    placement_from: Literal["rules", "checkpoint"] = "rules"
    placement: Spec | None = None
    rules: tuple[Rule, ...] = Field(alias="rule", default=())


def shipped_specs() -> list[str]:
    """Names of the specs that come with Ratoon."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load_spec(name_or_path: str | Path) -> Spec:
    """A shipped spec by its name, or any by its path.

    Raises:
        SpecError: there is no such spec, or everything that is wrong in it.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml" and str(name_or_path) in shipped_specs():
        path = SHIPPED / f"{name_or_path}.toml"
    if not path.is_file():
        raise SpecError(
            f"there is no spec {str(name_or_path)!r}: give the path of a TOML file, or one of "
            + ", ".join(shipped_specs()),
            [],
        )
    return parse_spec(path.read_text(encoding="utf-8"), str(path))


def parse_spec(text: str, where: str) -> Spec:
    """A spec from TOML; rules of included specs follow its own.

    Raises:
        SpecError: everything that is wrong, with the rule it is in; `where` is named.
    """
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{where} is not TOML: {error}", []) from None
    try:
        spec = Spec.model_validate(tree)
    except ValidationError as error:
        raise SpecError(
            f"{where} is not a spec:", [_sentence(each, tree) for each in error.errors()]
        ) from None
    for name in spec.include:
        other = load_spec(name)
        spec = spec.model_copy(
            update={
                "rules": spec.rules + other.rules,
                "facts": {**other.facts, **spec.facts},
                "rename": spec.rename + other.rename,
                "replicated": spec.replicated + other.replicated,
            }
        )
    return spec


def _sentence(error: Any, tree: dict[str, Any]) -> str:
    """One of pydantic's findings, with the rule by its name instead of its number."""
    place = list(error["loc"])
    rule = ""
    if place[:1] == ["rule"] and len(place) > 1 and isinstance(place[1], int):
        table = tree["rule"][place[1]]
        known = isinstance(table, dict) and (table.get("match") or table.get("regex"))
        rule = f"rule {place[1] + 1}{f' ({known})' if known else ''}: "
        place = place[2:]
    key = ".".join(str(each) for each in place)
    return f"{rule}{key + ': ' if key else ''}{error['msg'].removeprefix('Value error, ')}"
