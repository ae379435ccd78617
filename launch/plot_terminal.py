"""The learning rate and the sources' shares in characters, for a terminal or a pipe."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.plot_curves import MOST_SOURCES, Axis, StageCurve, main_sources, share_notes, shares_by_name

HEIGHT = 12
"""Lines of the curve."""
WIDEST = 120
LABEL = 9
"""Columns to the left of the axis."""
NARROWEST = 7
"""Columns of a part of a stage whose shares are shown: a number and the rule before it."""
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each of the 4 x 2 dots of a Braille character, from the top left (Unicode block U+2800)."""


class Canvas:
    """Dots on lines of characters: eight to a character as Braille, or one where only ASCII is understood."""

    def __init__(self, columns: int, lines: int, *, ascii_only: bool) -> None:
        """An empty canvas."""
        self.down, self.across = (1, 1) if ascii_only else (4, 2)
        self.width, self.height = columns * self.across, lines * self.down
        self._cells = [[0] * columns for _ in range(lines)]

    def column(self, x: int, low: int, high: int) -> None:
        """Draw the dots of column `x` from height `low` to height `high`, counted from the bottom."""
        for y in range(low, high + 1):
            down = self.height - 1 - y
            bit = _BRAILLE[down % self.down][x % self.across]
            self._cells[down // self.down][x // self.across] |= bit

    def lines(self, rules: Sequence[int]) -> list[str]:
        """The canvas as text, with a vertical rule in the empty characters of the columns `rules`."""
        ascii_only = self.down == 1
        rule = ":" if ascii_only else "┊"

        def character(bits: int, column: int) -> str:
            if not bits:
                return rule if column in rules else " "
            return "*" if ascii_only else chr(0x2800 + bits)

        return ["".join(character(bits, i) for i, bits in enumerate(cells)) for cells in self._cells]


def print_curves(curves: Sequence[StageCurve], console: Console, title: str) -> None:
    """Draw the stages: the learning rate, the shares under it, and a table of the phases."""
    width, ascii_only = min(console.width, WIDEST), console.options.ascii_only
    lines = [
        title,
        "",
        *learning_rate_lines(curves, width, ascii_only=ascii_only),
        "",
        *share_lines(curves, width, ascii_only=ascii_only),
    ]
    for line in lines:
        console.print(Text(line.rstrip()), soft_wrap=True)
    console.print(phase_table(curves))
    for note in share_notes(curves):
        console.print(Text("note: ", "yellow") + Text(note, "default"))


def learning_rate_lines(curves: Sequence[StageCurve], width: int, *, ascii_only: bool) -> list[str]:
    """The curve over its axis, no line longer than `width`."""
    axis, columns = Axis(curves), width - LABEL - 2
    top = max(curve.peak for curve in curves) or 1.0
    canvas = Canvas(columns, HEIGHT, ascii_only=ascii_only)
    for x in range(canvas.width):
        low, high = _rates_between(axis, x / canvas.width, (x + 1) / canvas.width)
        canvas.column(x, *(round(rate / top * (canvas.height - 1)) for rate in (low, high)))
    labels = {0: f"{top:.2e}", HEIGHT // 2: f"{top * (HEIGHT - 1 - HEIGHT // 2) / (HEIGHT - 1):.2e}"}
    labels[HEIGHT - 1] = "0"
    corner, side, bar = ("+", "|", "-") if ascii_only else ("└", "│", "─")
    return [
        "learning rate",
        *(
            f"{labels.get(number, ''):>{LABEL}} {side}{line}"
            for number, line in enumerate(canvas.lines(_borders(axis, columns)[1:]))
        ),
        f"{'':{LABEL}} {corner}{bar * columns}",
        f"{'step':>{LABEL}}  {_tick_line(axis, columns)}",
        f"{'stage':>{LABEL}} {_segments(axis, columns, [curve.name for curve in curves], side)}",
    ]


def _rates_between(axis: Axis, begin: float, end: float) -> tuple[float, float]:
    """Lowest and highest learning rate between two parts of the axis' length; stages do not mix."""
    starts = axis.starts
    positions = starts[-1] * begin, starts[-1] * end
    stage = next(i for i in range(len(axis.curves)) if positions[0] < starts[i + 1])
    curve, start = axis.curves[stage], starts[stage]
    first, last = (position - start + curve.first_step for position in positions)
    steps = [step for step, _ in curve.points]
    inside = curve.points[bisect_left(steps, first) : bisect_left(steps, last)]
    rates = [_rate_at(curve, steps, first), *(rate for _, rate in inside)]
    if positions[1] <= starts[stage + 1]:
        rates.append(_rate_at(curve, steps, last))
    return min(rates), max(rates)


def _rate_at(curve: StageCurve, steps: Sequence[int], step: float) -> float:
    """The learning rate on the straight line between the two points around `step`."""
    right = bisect_left(steps, step)
    if right in (0, len(steps)):
        return curve.points[min(right, len(steps) - 1)][1]
    (x0, y0), (x1, y1) = curve.points[right - 1], curve.points[right]
    return y0 + (y1 - y0) * (step - x0) / (x1 - x0)


def _borders(axis: Axis, columns: int) -> list[int]:
    """The column that each stage begins in."""
    return [start * columns // axis.starts[-1] for start in axis.starts[:-1]]


def _tick_line(axis: Axis, columns: int) -> str:
    """Numbers of steps, each beginning under its position as far as the width allows."""
    line = ""
    for position, step in axis.ticks(columns // 12):
        number = f"{step:,}"
        column = min(position * columns // axis.starts[-1], columns - len(number))
        if not line or column > len(line):
            line = line.ljust(column) + number
    return line


def _segments(axis: Axis, columns: int, texts: Sequence[str], rule: str) -> str:
    """A text under each stage, cut to the stage's width."""
    borders = [*_borders(axis, columns), columns]
    parts = []
    for number, text in enumerate(texts):
        room = borders[number + 1] - borders[number]
        parts.append((rule + text)[: max(0, room)].ljust(room))
    return "".join(parts)


def share_lines(curves: Sequence[StageCurve], width: int, *, ascii_only: bool) -> list[str]:
    """A line for each source: its share under each part of each stage, with the number where it fits."""
    axis, columns = Axis(curves), width - LABEL - 2
    names, others = main_sources(curves, MOST_SOURCES)
    borders: list[int] = []
    parts: list[dict[str, float]] = []
    for start, shares in axis.spans:
        border = start * columns // axis.starts[-1]
        if start in axis.starts or border - borders[-1] >= NARROWEST:
            borders.append(border)
            parts.append(shares_by_name(shares, names, others))
    rooms = [end - begin for begin, end in pairwise([*borders, columns])]
    rule = "|" if ascii_only else "│"
    found = ["shares of the sources"]
    for name in parts[0]:
        bars = [
            (rule + _share_bar(shares[name], room - 1, ascii_only))[: max(0, room)].ljust(room)
            for shares, room in zip(parts, rooms, strict=True)
        ]
        found.append(f"{_cut(name, LABEL):>{LABEL}} {''.join(bars)}")
    return found


def _share_bar(share: float, room: int, ascii_only: bool) -> str:
    """A bar as long as the share of the room, and the number where it fits beside or over it."""
    bar = ("=" if ascii_only else "▬") * round(share * room) if share else ""
    number = f"{share:.0%}" if share == 0 or share >= 0.01 else f"{share:.1%}"
    if len(number) + 1 > room:
        return bar
    if len(bar) + len(number) + 1 <= room:
        return f"{bar} {number}" if bar else number
    return f"{bar[: room - len(number) - 1]} {number}"


def phase_table(curves: Sequence[StageCurve]) -> Table:
    """First step, steps, and learning rates of every phase of every stage."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("stage", overflow="fold")
    table.add_column("phase", overflow="fold")
    for heading in ("first step", "steps", "lr at first", "lr at last"):
        table.add_column(heading, justify="right", overflow="fold")
    for curve in curves:
        rates = dict(curve.points)
        for number, (phase, (first, last)) in enumerate(curve.phases.items()):
            ends = (f"{rates[step]:.2e}" if rates[step] else "0" for step in (first, last))
            name = Text(curve.name if number == 0 else "")
            table.add_row(name, phase, f"{first:,}", f"{last - first + 1:,}", *ends)
    return table


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "~"
