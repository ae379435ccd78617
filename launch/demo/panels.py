"""Curves of the second stage in characters, beside each other on one scale."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from launch.plot_terminal import Canvas

HEIGHT = 7
"""Lines of a panel."""
LABEL = 6
"""Columns of the numbers to the left of a panel."""
GAP = 2
"""Columns between two panels."""
BARS = "▁▂▃▄▅▆▇█"
Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Panel:
    """A curve of (step, value) and what stands above it; the steps begin at 0."""

    title: str
    curve: Curve


def panel_lines(panels: Sequence[Panel], width: int, *, ascii_only: bool) -> list[str]:
    """The panels beside each other, no line longer than `width`; dots at the height where a curve begins.

    What is not finite is left out.
    """
    values = [value for panel in panels for _, value in panel.curve if math.isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    columns = (width - (len(panels) - 1) * GAP) // len(panels) - LABEL - 2
    drawn = [_draw(panel, columns, (low, high), ascii_only) for panel in panels]
    return [(" " * GAP).join(parts).rstrip() for parts in zip_longest(*drawn, fillvalue="")]


def _draw(panel: Panel, columns: int, scale: tuple[float, float], ascii_only: bool) -> list[str]:
    """One panel; all lines of the same length."""
    low, high = scale
    canvas = Canvas(columns, HEIGHT, ascii_only=ascii_only)
    finite = [point for point in panel.curve if math.isfinite(point[1])]

    def height(value: float) -> int:
        return round((value - low) / ((high - low) or 1.0) * (canvas.height - 1))

    last = panel.curve[-1][0] or 1
    for x in range(canvas.width):
        if between := _values_between(finite, x / canvas.width * last, (x + 1) / canvas.width * last):
            canvas.column(x, height(min(between)), height(max(between)))
        if finite and x % (2 * canvas.across) == 0:
            canvas.column(x, height(finite[0][1]), height(finite[0][1]))
    corner, side, bar = ("+", "|", "-") if ascii_only else ("└", "│", "─")
    labels = {0: f"{high:.2f}", HEIGHT - 1: f"{low:.2f}"}
    lines = [
        f"{'':{LABEL}}  {panel.title}",
        *(f"{labels.get(row, ''):>{LABEL}} {side}{line}" for row, line in enumerate(canvas.lines(()))),
        f"{'':{LABEL}} {corner}{bar * columns}",
        f"{'step':>{LABEL}}  0{f'{last:,}':>{columns - 1}}",
    ]
    return [line.ljust(LABEL + 2 + columns) for line in lines]


def _values_between(curve: Curve, begin: float, end: float) -> list[float]:
    """What a curve of straight lines goes through from `begin` to `end`: both ends and the points between."""
    steps = [step for step, _ in curve]
    if not curve or end < steps[0] or begin > steps[-1]:
        return []
    inside = [value for step, value in curve if begin < step < end]
    return [_value_at(curve, steps, begin), *inside, _value_at(curve, steps, end)]


def _value_at(curve: Curve, steps: Sequence[int], step: float) -> float:
    right = bisect_left(steps, step)
    if right in (0, len(steps)):
        return curve[min(right, len(steps) - 1)][1]
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (y1 - y0) * (step - x0) / (x1 - x0)


def sparklines(series: Sequence[Sequence[float]], *, top: float, width: int = 50) -> str:
    """Curves one after the other, from 0 to `top`, `width` characters together; each is a mean."""
    points = sum(map(len, series))
    drawn = []
    for values in series:
        cells = max(1, min(len(values), width * len(values) // points))
        edges = [cell * len(values) // cells for cell in range(cells + 1)]
        means = [sum(values[begin:end]) / (end - begin) for begin, end in pairwise(edges)]
        drawn.append("".join(BARS[round((len(BARS) - 1) * mean / (top or 1))] for mean in means))
    return " ".join(drawn)
