"""What a source says by parameter name, under logical names: per-parameter numbers and optimizer groups."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from checkpoint.source import Source

Names = Mapping[str, Mapping[str, None]]
"""Source name -> the logical names it stands for."""

_STEP = "step"


class Renamed:
    """Numbers and groups of a source under logical names.

    A source's parameter that is several logical ones (a fused qkv) passes its numbers and its group to each.

    Attributes:
        scalars, groups, per_parameter: see `checkpoint.assembly.assemble`.
        left_out: names that no tensor has, a line for each group or state that has some.
    """

    def __init__(self, source: Source, names: Names) -> None:
        self.left_out: list[str] = []
        self.groups = self._groups(source, names)
        self.per_parameter = self._per_parameter(source, names)
        self.scalars = self._scalars(source.step)

    def _groups(self, source: Source, names: Names) -> list[dict[str, Any]]:
        joined: dict[str, tuple[dict[str, Any], dict[str, None]]] = {}
        for group in source.groups:
            settings = dict(group.settings)
            _, into = joined.setdefault(json.dumps(settings, sort_keys=True), (settings, {}))
            into.update(self._renamed(group.names, names, "a parameter group"))
        return [{"names": list(into), **settings} for settings, into in joined.values()]

    def _per_parameter(self, source: Source, names: Names) -> dict[str, dict[str, float | int]]:
        found: dict[str, dict[str, float | int]] = {}
        for state, values in source.scalars.items():
            self._renamed(values, names, f"per-parameter {state}")
            found[state] = {
                logical: value for name, value in values.items() for logical in names.get(name, ())
            }
        return found

    def _scalars(self, step: int) -> dict[str, float | int]:
        scalars: dict[str, float | int] = {}
        steps = set(self.per_parameter.get(_STEP, {}).values())
        if not steps:
            steps = {group[_STEP] for group in self.groups if isinstance(group.get(_STEP), int | float)}
        if len(steps) <= 1:
            self.per_parameter.pop(_STEP, None)
            scalars["updates"] = int(next(iter(steps), step))
        rates = [group["lr"] for group in self.groups if isinstance(group.get("lr"), int | float)]
        if rates:
            scalars["lr"] = max(rates)
        return scalars

    def _renamed(
        self, wanted: Mapping[str, Any] | tuple[str, ...], names: Names, what: str
    ) -> dict[str, None]:
        unknown = [name for name in wanted if name not in names]
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            self.left_out.append(f"{what} names what no tensor is called: {', '.join(unknown[:3])}{more}")
        return {logical: None for name in wanted for logical in names.get(name, ())}
