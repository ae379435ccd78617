"""What only all ranks together say: global indices of layers and experts, lengths of the ranks' pieces."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from checkpoint.language.problems import Problems
from checkpoint.language.rules import Rule
from checkpoint.language.runs import Cut
from checkpoint.language.template import Value

Coordinates = tuple[tuple[str, int], ...]
"""Axes and coordinates of a rank, sorted, without "data": the ranks of that hold parts of one tensor."""


@dataclass
class Held:
    """A parameter as the ranks of one coordinate hold it: what its states have in common.

    Attributes:
        name: the source's.
        shape: of the parameter, after `view`.
        values: captured fields; after `make_global` indices count over all ranks.
    """

    name: str
    at: Coordinates
    shape: tuple[int, ...]
    rule: int
    values: dict[str, Value]
    cuts: dict[tuple[str, ...], Cut] = field(default_factory=dict)

    @property
    def where(self) -> dict[str, int]:
        return dict(self.at)


class _Place(NamedTuple):
    """One thing that is cut: a dimension or stack axis of one logical tensor."""

    rule: int
    values: Hashable
    axis: int


def axes_of(over: Iterable[str], at: Mapping[str, int]) -> tuple[str, ...]:
    """Those of `over` that the tensor knows; "expert_tensor" is "tensor" where ranks have no such number."""
    named = ("tensor" if axis == "expert_tensor" and axis not in at else axis for axis in over)
    return tuple(axis for axis in named if axis in at)


def make_global(
    items: list[Held],
    rules: tuple[Rule, ...],
    layers: Mapping[tuple[int, int], tuple[int, ...]],
    problems: Problems,
) -> None:
    """Turn indices that count within a stage or an expert rank into global ones, in place."""
    counts: dict[tuple[int, str], dict[int, int]] = {}
    for item in items:
        for name, kind in rules[item.rule].local.items():
            rank = item.where.get("expert")
            if kind == "expert" and rank is not None:
                per_rank = counts.setdefault((item.rule, name), {})
                per_rank[rank] = max(per_rank.get(rank, 0), int(item.values[name]) + 1)
    for item in items:
        for name, kind in rules[item.rule].local.items():
            index, at = int(item.values[name]), item.where
            if kind == "expert" and "expert" in at:
                per_rank = counts[item.rule, name]
                missing = [rank for rank in range(at["expert"]) if rank not in per_rank]
                if missing:
                    problems.add(
                        f"expert ranks {missing} hold nothing, so that experts cannot be counted", item.name
                    )
                item.values[name] = index + sum(per_rank.get(rank, 0) for rank in range(at["expert"]))
            elif kind == "stage" and layers and "pipeline" in at:
                stage = (at["pipeline"], at.get("virtual", 0))
                held = layers.get(stage, ())
                if index < len(held):
                    item.values[name] = held[index]
                else:
                    problems.add(
                        f"stage {stage} (pipeline rank, virtual stage) holds {len(held)} layers, and this "
                        f"would be number {index}",
                        item.name,
                    )


class Extents:
    """How long each rank's piece of every cut dimension is, from the shapes that the ranks hold.

    Args:
        degrees: of the axes; where one is missing, the largest coordinate says.
    """

    def __init__(self, items: list[Held], degrees: Mapping[str, int], problems: Problems) -> None:
        self._degrees = dict(degrees)
        for item in items:
            for axis, coordinate in item.at:
                if axis not in degrees:
                    self._degrees[axis] = max(self._degrees.get(axis, 1), coordinate + 1)
        self._problems = problems
        self._held: dict[_Place, dict[int, int]] = {}
        self._cuts: dict[tuple[_Place, int], Cut | None] = {}

    def index(self, item: Held, over: Iterable[str]) -> int | None:
        """Which rank of the axes this is; None where the tensor does not know them, and so is whole."""
        axes = axes_of(over, item.where)
        return self._index(axes, item.where) if axes else None

    def _index(self, axes: tuple[str, ...], at: Mapping[str, int]) -> int:
        index = 0
        for axis in axes:
            index = index * self._degrees[axis] + at[axis]
        return index

    def record(self, item: Held, axis: int, over: Iterable[str]) -> None:
        """Note how long a rank's piece is. All are noted before `cut` is asked."""
        at = item.where
        axes = axes_of(over, at)
        if not axes:
            return
        place = self._place(item, axis)
        index, extent = self._index(axes, at), item.shape[axis]
        known = self._held.setdefault(place, {}).setdefault(index, extent)
        if known != extent:
            self._problems.add(
                f"rank {index} of {' x '.join(axes)} holds {known} as well as {extent} along axis {axis}",
                item.name,
            )

    def cut(self, item: Held, axis: int, over: Iterable[str], widths: tuple[int, ...] = ()) -> Cut | None:
        """Which piece of an axis this is; None where that cannot be said, which is noted as a problem."""
        at = item.where
        axes = axes_of(over, at)
        if not axes:
            return Cut(0, (item.shape[axis],))
        place, index = self._place(item, axis), self._index(axes, at)
        if (place, index) not in self._cuts:
            self._cuts[place, index] = self._find_cut(item, place, axes, index, widths)
        return self._cuts[place, index]

    def _find_cut(
        self, item: Held, place: _Place, axes: tuple[str, ...], index: int, widths: tuple[int, ...]
    ) -> Cut | None:
        held = self._held[place]
        degree = math.prod(self._degrees[axis] for axis in axes)
        over = " x ".join(axes)
        if widths:
            wrong = [rank for rank, extent in held.items() if rank >= len(widths) or widths[rank] != extent]
            if len(widths) != degree or wrong:
                self._problems.add(
                    f"`widths` says {list(widths)}, but the {degree} ranks of {over} hold {held} "
                    f"(rank: length along axis {place.axis})",
                    item.name,
                )
                return None
            return Cut(index, widths)
        missing = [rank for rank in range(degree) if rank not in held]
        if missing:
            self._problems.add(f"no piece from rank {_some(missing)} of {over}, of {degree}", item.name)
            return None
        return Cut(index, tuple(held[rank] for rank in range(degree)))

    @staticmethod
    def _place(item: Held, axis: int) -> _Place:
        return _Place(item.rule, tuple(sorted(item.values.items())), axis)


def _some(ranks: list[int]) -> str:
    return ", ".join(str(rank) for rank in ranks[:5]) + (", ..." if len(ranks) > 5 else "")
