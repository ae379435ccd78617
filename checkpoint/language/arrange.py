"""The way back, for writers: which tensors a spec's names ask for, and what goes into them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from checkpoint.language.layout import stack_axes, whole_parts
from checkpoint.language.matching import SHOWN, cut
from checkpoint.language.rules import AXES, Fused, Padded, Rule
from checkpoint.language.sizes import Facts, UnknownFactError
from checkpoint.language.spec import Spec, SpecError
from checkpoint.language.template import Value
from checkpoint.source import Part

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Arranged:
    """A whole tensor in a spec's names.

    Attributes:
        parts: cover every element exactly once, except for padding, which is zero.
    """

    name: str
    shape: Shape
    parts: tuple[Part, ...]


@dataclass
class _Group:
    """The logical tensors that one rule puts into one target.

    Attributes:
        members: (part or None, indices of the stack) -> logical name.
    """

    rule: Rule
    values: dict[str, Value]
    members: dict[tuple[str | None, tuple[int, ...]], str] = field(default_factory=dict)


def arrange(
    spec: Spec, logical: Mapping[str, Shape], *, facts: Mapping[str, int] | None = None
) -> list[Arranged]:
    """Every target tensor, stored whole, in the order in which their first logical tensors come.

    The first rule that can write a tensor does. Rules with `tied`, `ignore`, `view`, or a `regex` without
    `write_as` only read.

    Args:
        facts: as for `place`; `padded_vocab_size` says how many rows a padded tensor gets.

    Raises:
        SpecError: logical tensors that no rule can write, with what is missing, and contradictory shapes.
    """
    ranks = {f"{axis}_ranks": 1 for axis in AXES}
    known = Facts(spec.facts, {**ranks, **(facts or {})})
    try:
        active = [rule for rule in spec.rules if rule.when is None or known.size(rule.when)]
    except ValueError as error:
        raise SpecError(f"the spec {spec.name!r} cannot write this model:", [str(error)]) from None
    order = {name: number for number, name in enumerate(logical)}
    remaining = dict(logical)
    found: list[tuple[int, Arranged]] = []
    incomplete: dict[str, str] = {}
    problems: list[str] = []
    for rule in active:
        for group in _groups(rule, remaining):
            missing = _missing(group)
            if missing:
                incomplete |= dict.fromkeys(group.members.values(), missing)
                continue
            try:
                target = _target(group, logical, known)
            except ValueError as error:
                problems.append(f"{', '.join(list(group.members.values())[:3])}: {error}")
                target = None
            first = min(order[name] for name in group.members.values())
            found += [(first, target)] if target is not None else []
            for name in group.members.values():
                del remaining[name]
    if remaining:
        lines = [f"{name} ({incomplete.get(name) or _nearest(active, name)})" for name in remaining]
        problems.insert(
            0, cut(f"logical tensors without a rule ({len(remaining)}):", lines[:SHOWN], len(remaining))
        )
    if problems:
        raise SpecError(f"the spec {spec.name!r} cannot write this model:", problems[: SHOWN + 1])
    return [target for _, target in sorted(found, key=lambda each: each[0])]


def _groups(rule: Rule, names: Mapping[str, Shape]) -> list[_Group]:
    """What the rule could write, by target."""
    pattern = _inverse(rule)
    if pattern is None:
        return []
    prefix, suffix = rule.target.prefix, rule.target.suffix
    indices = [each.index for each in rule.stacked]
    numbers = {*indices, *_numbers(rule)}
    inverse = {name: {v: k for k, v in table.items()} for name, table in rule.values.items()}
    groups: dict[tuple[tuple[str, Value], ...], _Group] = {}
    for name in names:
        if not (name.startswith(prefix) and name.endswith(suffix)):
            continue
        hit = pattern.fullmatch(name)
        if hit is None or (rule.names and name not in rule.names):
            continue
        values: dict[str, Value] = {}
        for key, text in hit.groupdict().items():
            number = key in numbers and text.isdecimal()
            values[key] = int(text) - rule.target.fields[key].shift if number else text
        part = str(values.pop("part")) if rule.has_parts else None
        at = tuple(int(values.pop(index)) for index in indices)
        bound = tuple(sorted(values.items()))
        if bound not in groups:
            written = {key: inverse[key][str(v)] if key in inverse else v for key, v in values.items()}
            groups[bound] = _Group(rule, written)
        groups[bound].members[part, at] = name
    return list(groups.values())


def _numbers(rule: Rule) -> list[str]:
    """The captured fields that are whole numbers."""
    return [key for key in rule.pattern.groupindex if rule.is_number(key)] if not rule.names else []


def _inverse(rule: Rule) -> re.Pattern[str] | None:
    """What recognises the logical names that the rule can write; None where it only reads."""
    if rule.ignore or rule.tied or rule.view:
        return None
    if rule.names:
        return rule.target.pattern({"name": ".+"}) if rule.to is None else None
    if rule.source is None or not set(rule.source.fields) <= set(rule.target.fields):
        return None
    regexes = {name: "|".join(map(re.escape, table.values())) for name, table in rule.values.items()}
    for name, source in rule.source.fields.items():
        captured = source.regex if rule.match is not None else r"\d+|.+?"
        regexes.setdefault(name, captured or r"\d+")
    if rule.fused is not None and rule.has_parts:
        regexes["part"] = "|".join(map(re.escape, rule.fused.names))
    return rule.target.pattern(regexes)


def _missing(group: _Group) -> str:
    """What the target lacks; empty when it is complete."""
    parts: Sequence[str | None] = [None]
    if group.rule.fused is not None and group.rule.has_parts:
        parts = group.rule.fused.names
    lengths = [1 + max(at[axis] for _, at in group.members) for axis in range(len(group.rule.stacked))]
    for at in itertools.product(*(range(length) for length in lengths)):
        for part in parts:
            if (part, at) not in group.members:
                wanted = [f"part {part!r}"] if part is not None else []
                wanted += [f"{each.index} {i}" for each, i in zip(group.rule.stacked, at, strict=True)]
                return f"{group.rule} needs {' of '.join(wanted)} as well"
    return ""


def _target(group: _Group, logical: Mapping[str, Shape], facts: Facts) -> Arranged:
    rule = group.rule
    by_part: dict[str | None, Shape] = {}
    for (part, _), name in group.members.items():
        shape = logical[name][::-1] if rule.transposed else logical[name]
        if by_part.setdefault(part, shape) != shape:
            raise ValueError(f"it is {list(shape)}, but others of the same stack {list(by_part[part])}")
    rule, inner = _concrete(rule, by_part, facts)
    stacked = [1 + max(at[axis] for _, at in group.members) for axis in range(len(rule.stacked))]
    axes = stack_axes(rule, len(stacked) + len(inner))
    rest = iter(inner)
    shape = tuple(
        stacked[axes.index(axis)] if axis in axes else next(rest) for axis in range(len(stacked) + len(inner))
    )
    read = {key: rule.values[key][str(v)] if key in rule.values else v for key, v in group.values.items()}
    source = rule.source
    name = source.fill(group.values) if source is not None else next(iter(group.members.values()))
    return Arranged(name, shape, whole_parts(rule, read, shape, facts))


def _concrete(rule: Rule, by_part: Mapping[str | None, Shape], facts: Facts) -> tuple[Rule, Shape]:
    """The rule with numbers for sizes, from the logical shapes, and the shape of one tensor of the stack."""
    first = next(iter(by_part.values()))
    shape = list(first)
    changes: dict[str, object] = {}
    if rule.fused is not None and rule.has_parts:
        dim = rule.fused.dim % len(shape)
        for part, other in by_part.items():
            if len(other) != len(first) or other[:dim] + other[dim + 1 :] != first[:dim] + first[dim + 1 :]:
                raise ValueError(f"part {part!r} is {list(other)}, which does not fit to {list(first)}")
        lengths = {str(part): each[dim] for part, each in by_part.items()}
        shape[dim] = sum(lengths.values())
        changes["fused"] = _concrete_fused(rule.fused, lengths, facts)
    if rule.padded is not None:
        dim = rule.padded.dim % len(shape)
        changes["padded"] = Padded(dim=dim, size=shape[dim])
        try:
            shape[dim] = facts.size("padded_vocab_size")
        except UnknownFactError:
            pass
    return rule.model_copy(update=changes), tuple(shape)


def _concrete_fused(fused: Fused, lengths: Mapping[str, int], facts: Facts) -> Fused:
    repeat = facts.size(fused.repeat)
    sizes = dict(zip(fused.names, fused.sizes, strict=True)) if fused.sizes is not None else {}
    if not sizes and len(set(lengths.values())) > 1:
        raise ValueError(f"its parts should be equally long, but are {dict(lengths)}")
    for part, length in lengths.items():
        size = sizes.get(part, -1)
        rows = length // max(repeat, 1) if size == -1 else facts.size(size)
        if rows * repeat != length:
            known = facts.explain(fused.repeat, size)
            raise ValueError(
                f"part {part!r} has {length} rows, but `fused` says {repeat} x {rows}"
                + (f" ({known})" if known else "")
            )
    return Fused(dim=fused.dim, repeat=repeat, parts={part: lengths[part] // repeat for part in fused.names})


def _nearest(rules: Sequence[Rule], name: str) -> str:
    targets = [rule.to for rule in rules if rule.to is not None]
    close = get_close_matches(name, targets, n=1, cutoff=0)
    return f"nearest rule writes {close[0]}" if close else "the spec has no rules that write"
