"""Which of several tensors that hold the same boxes is the one, and whether there may be several at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from checkpoint.language.extents import Held
from checkpoint.language.problems import Problems
from checkpoint.language.spec import AXES, Rule, Spec
from checkpoint.source import Part

Role = Literal["primary", "replica", "average"]


def roles(spec: Spec, held: Sequence[tuple[str, Held, tuple[Part, ...]]], problems: Problems) -> list[Role]:
    """The role of every (state, parameter, parts).

    The same boxes held at coordinates that differ on axes which no rule allows for are a problem.
    """
    known: dict[int, int] = {}
    numbers: dict[tuple[object, ...], int] = {}
    groups: dict[tuple[str, int], list[int]] = {}
    for index, (state, _, parts) in enumerate(held):
        number = known.get(id(parts))
        if number is None:
            key = tuple((part.name, part.box) for part in parts)
            number = known[id(parts)] = numbers.setdefault(key, len(numbers))
        groups.setdefault((state, number), []).append(index)
    found: list[Role] = ["primary"] * len(held)
    for indices in groups.values():
        if len(indices) == 1:
            continue
        distinct = {(held[index][1].name, held[index][1].at): held[index][1] for index in indices}
        if len(distinct) > 1:
            given = _give(spec, list(distinct.values()), problems)
            for index in indices:
                found[index] = given[held[index][1].name, held[index][1].at]
    return found


def _give(spec: Spec, members: list[Held], problems: Problems) -> dict[tuple[str, object], Role]:
    own = [member for member in members if not spec.rules[member.rule].tied] or members[:1]
    first = min(own, key=_order)
    replicated, average = _allowed(spec, [spec.rules[member.rule] for member in own])
    found: dict[tuple[str, object], Role] = {}
    for member in members:
        role: Role = "replica"
        if member is first or any(member is each for each in own):
            differing = {axis for axis in AXES if member.where.get(axis) != first.where.get(axis)}
            strange = differing - replicated - average
            if strange or member.name != first.name:
                _refuse(member, first, strange, problems)
            if not differing & (replicated - average):
                role = "average" if average and _spread(own, average) else "primary"
            if not differing:
                role = "average" if role == "average" else "primary"
        found[member.name, member.at] = role
    return found


def _allowed(spec: Spec, rules: list[Rule]) -> tuple[set[str], set[str]]:
    average: set[str] = {axis for rule in rules for axis in rule.average}
    replicated: set[str] = {axis for rule in rules for axis in rule.replicated} | set(spec.replicated)
    return replicated - average, average


def _spread(members: list[Held], axes: set[str]) -> bool:
    """Whether the members differ along one of the axes."""
    return any(len({member.where.get(axis) for member in members}) > 1 for axis in axes)


def _order(member: Held) -> tuple[int, ...]:
    return tuple(member.where.get(axis, -1) for axis in AXES)


def _refuse(member: Held, first: Held, strange: set[str], problems: Problems) -> None:
    if member.name != first.name:
        problems.add(f"holds the same as {first.name}: mark the rule of the copy tied = true", member.name)
        return
    axes = sorted(strange)
    named = ", ".join(f'"{axis}"' for axis in axes)
    ranks = [", ".join(f"{axis} {each.where.get(axis)}" for axis in axes) for each in (first, member)]
    problems.add(
        f"ranks ({ranks[0]}) and ({ranks[1]}) hold the same: say replicated = [{named}] in its rule if they "
        "must be equal, or how it is `sharded`, `stacked` or counted (`local`)",
        member.name,
    )
