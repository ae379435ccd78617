"""Weights that are known beforehand: a table of the run file, or the log of an earlier run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.controllers.config import PointConfig
from trainer.controllers.protocol import History, KeepWeightsError
from trainer.controllers.shares import checked
from trainer.metrics.json_lines import read_lines


class Timetable:
    """The weights as a function of the step: those of the newest entry, or on the line to the next one."""

    def __init__(self, entries: Mapping[int, Mapping[str, float]], *, interpolate: bool = False) -> None:
        """Take the weights by the step from which they hold; before the first of them nothing changes."""
        self._steps = sorted(entries)
        self._entries = entries
        self._interpolate = interpolate

    def weights(self, history: History) -> dict[str, float]:
        """As `MixtureController.weights`."""
        place = bisect_right(self._steps, history.step)
        if place == 0:
            raise KeepWeightsError(f"the first entry is for step {self._steps[0]}")
        before = self._steps[place - 1]
        here = self._entries[before]
        if not self._interpolate or place == len(self._steps):
            return dict(here)
        after = self._steps[place]
        part = (history.step - before) / (after - before)
        return {name: (1 - part) * one + part * self._entries[after][name] for name, one in here.items()}

    def state(self) -> dict[str, Any]:
        """Nothing: the table is in the run file, or in the log."""
        return {}

    def begins_at(self, step: int) -> bool:
        """Whether an entry holds from this very step on."""
        return step in self._entries


def table_of(
    points: Sequence[PointConfig], sources: Sequence[str], *, first_step: int, last_step: int
) -> dict[int, dict[str, float]]:
    """By step, the weights of `[[controller.points]]` in a stage of these steps.

    Raises:
        ValueError: two points are at the same step, one names another source, or its weights sum to zero.
    """
    table: dict[int, dict[str, float]] = {}
    for point in points:
        step = point.begins(first_step, last_step)
        if step in table:
            raise ValueError(f"controller.points: two of them begin at step {step}; leave one out")
        weights = {name: 0.0 for name in sources} | point.weights
        try:
            table[step] = checked(weights, sources)
        except ValueError as error:
            raise ValueError(f"controller.points of step {step}: {error}") from None
    return table


def read_log(path: Path, sources: Sequence[str]) -> dict[int, dict[str, float]]:
    """By step, the weights of a controller.jsonl, of calls that kept them too.

    Raises:
        ValueError: it is not there, has no call, or is about other sources.
    """
    table = {}
    for line in read_lines(path):
        try:
            table[int(line["step"])] = checked(line.get("weights"), sources)
        except ValueError as error:
            raise ValueError(f"controller.log: {path}, step {line['step']}: {error}") from None
    if not table:
        raise ValueError(f"controller.log: {path} has no call of a controller")
    return table
