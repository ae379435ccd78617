"""Which of several tensors that hold the same box is the one, and whether there may be several at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from checkpoint.boxes import Box
from checkpoint.language.extents import Held
from checkpoint.language.problems import Problems
from checkpoint.language.rules import AXES, Rule
from checkpoint.language.spec import Spec
from checkpoint.source import Part

Role = Literal["primary", "replica", "average"]


def roles(
    spec: Spec, held: Sequence[tuple[str, Held, tuple[Part, ...]]], problems: Problems
) -> list[list[Role]]:
    """The role of every part of every (state, parameter, parts).

    The same box held at coordinates that differ on axes which no rule allows for is a problem.
    """
    numbers: dict[tuple[str, Box], int] = {}
    known: dict[int, list[int]] = {}
    groups: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for index, (state, _, parts) in enumerate(held):
        if id(parts) not in known:
            known[id(parts)] = [numbers.setdefault((p.name, p.box), len(numbers)) for p in parts]
        for place, number in enumerate(known[id(parts)]):
            groups.setdefault((state, number), []).append((index, place))
    found: list[list[Role]] = [["primary"] * len(parts) for _, _, parts in held]
    given: dict[tuple[int, ...], list[Role]] = {}
    for members in groups.values():
        if len(members) == 1:
            continue
        items = tuple(id(held[index][1]) for index, _ in members)
        if items not in given:
            given[items] = _give(spec, [held[index][1] for index, _ in members], problems)
        for (index, place), role in zip(members, given[items], strict=True):
            found[index][place] = role
    return found


def _give(spec: Spec, members: list[Held], problems: Problems) -> list[Role]:
    own = [member for member in members if not spec.rules[member.rule].tied] or members[:1]
    first = min(own, key=_order)
    replicated, average = _allowed(spec, [spec.rules[member.rule] for member in own])
    averaged = any(len({member.where.get(axis) for member in own}) > 1 for axis in average)
    found: list[Role] = []
    for member in members:
        if not any(member is each for each in own):
            found.append("replica")
            continue
        differing = {axis for axis in AXES if member.where.get(axis) != first.where.get(axis)}
        strange = differing - replicated - average
        if strange or member.name != first.name:
            _refuse(member, first, strange, problems)
        if differing & replicated:
            found.append("replica")
        else:
            found.append("average" if averaged else "primary")
    return found


def _allowed(spec: Spec, rules: list[Rule]) -> tuple[set[str], set[str]]:
    average: set[str] = {axis for rule in rules for axis in rule.average}
    replicated: set[str] = {axis for rule in rules for axis in rule.replicated} | set(spec.replicated)
    replicated |= {axis for rule in rules if rule.regions for axis in rule.regions.over}
    return replicated - average, average


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
