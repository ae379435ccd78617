"""The learning rate and the sources' shares as a PNG that is legible without its colours."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.plot_curves import MOST_SOURCES, Axis, StageCurve, main_sources, share_notes, shares_by_name
from trainer.schedule import Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

STYLES: dict[Phase, dict[str, Any]] = {
    "warmup": {"linestyle": (0, (1, 1)), "linewidth": 1.6},
    "cooldown": {"linestyle": (0, (5, 1.5)), "linewidth": 1.6},
    "stable": {"linestyle": "-", "linewidth": 3.0},
    "decay": {"linestyle": "-", "linewidth": 1.4},
    "annealed": {"linestyle": (0, (6, 1.5, 1, 1.5)), "linewidth": 1.6},
}
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")
WIDTH, HEIGHT, DPI = 9.0, 5.4, 150
"""In inches, and dots in an inch."""
NAME_WIDTH = 0.012
"""Of a letter of a stage's name, as a share of the axis."""


def write_picture(curves: Sequence[StageCurve], path: Path, title: str) -> None:
    """Draw the stages to the PNG `path`, making its folder.

    Raises:
        ValueError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no state shared with others
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    top, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (2, 1)})
    axis = Axis(curves)
    _draw_rates(top, axis)
    _draw_shares(below, axis)
    _draw_stages(top, below, axis)
    figure.suptitle(title, fontsize=11, parse_math=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.print_png(path)
    except OSError as error:
        raise ValueError(f"cannot write the picture {path}: {error.strerror or error}") from None


def _draw_rates(axes: Axes, axis: Axis) -> None:
    """A line in each phase's style; a plateau is level, so what joins it is drawn as its neighbours are."""
    named: set[Phase] = set()
    for start, curve in zip(axis.starts, axis.curves, strict=False):
        for phase, (first, last) in curve.phases.items():
            begin = first - ("stable" in curve.phases and curve.phases["stable"][1] == first - 1)
            points = [point for point in curve.points if begin <= point[0] <= last + (phase != "stable")]
            axes.plot(
                [start + step - curve.first_step for step, _ in points],
                [rate for _, rate in points],
                color="black",
                label=phase if phase not in named else None,
                solid_capstyle="butt",
                **STYLES[phase],
            )
            named.add(phase)
    axes.set_ylabel("learning rate")
    axes.set_ylim(0, 1.06 * max(curve.peak for curve in axis.curves) or 1.0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, handlelength=3.2, title="phase")


def _draw_shares(axes: Axes, axis: Axis) -> None:
    """Stacked bars, one for each stage or part of one, as wide as it is."""
    from matplotlib import colormaps

    names, others = main_sources(axis.curves, MOST_SOURCES)
    parts = [shares_by_name(shares, names, others) for _, shares in axis.spans]
    starts = [start for start, _ in axis.spans]
    widths = [end - start for start, end in pairwise([*starts, axis.starts[-1]])]
    bottoms = [0.0] * len(parts)
    bars: list[Patch] = []
    for number, name in enumerate(parts[0]):
        heights = [100 * shares[name] for shares in parts]
        lightness = _lightness(number, len(parts[0]))
        bars += axes.bar(
            starts,
            heights,
            widths,
            bottom=bottoms,
            align="edge",
            color=colormaps["cividis"](lightness),
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="white" if lightness < 0.45 else "0.25",
            linewidth=0.0,
        )[:1]
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_ylabel("share, %")
    axes.set_ylim(0, 100)
    names = list(parts[0])[::-1]
    legend = axes.legend(
        bars[::-1],
        [f"{number}" for number in range(len(names))],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.05),
        frameon=False,
        title="source",
        fontsize=9 if len(names) <= 5 else 7.5,
        labelspacing=0.4,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):  # as labels, _names would be left out
        text.set_parse_math(False)
        text.set_text(name)


def _draw_stages(top: Axes, below: Axes, axis: Axis) -> None:
    """Borders and names of the stages, and the numbers of steps."""
    starts, total = axis.starts, axis.starts[-1]
    for start in starts[1:-1]:
        for axes in (top, below):
            axes.axvline(start, color="0.35", linewidth=0.9, linestyle=(0, (4, 2)))
    below.set_xlim(0, total)
    below.set_xlabel("\n".join(["step", *share_notes(axis.curves)]), parse_math=False)
    ticks = axis.ticks(9)
    below.set_xticks([position for position, _ in ticks], [f"{step:,}" for _, step in ticks])
    if ticks[-1][0] == total:  # clear of the legend
        below.get_xticklabels()[-1].set_horizontalalignment("right")
    for start, curve in zip(starts, axis.curves, strict=False):
        narrow = curve.steps / total < NAME_WIDTH * (len(curve.name) + 1)
        top.annotate(
            curve.name,
            (start + curve.steps / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="left" if narrow else "center",
            va="bottom",
            rotation=30 if narrow else 0,
            fontsize=9,
            parse_math=False,
        )


def _lightness(number: int, count: int) -> float:
    """Of a source's colour: every second one is of the darker half, so that neighbours differ."""
    rank = number // 2 + (number % 2) * ((count + 1) // 2)
    return 0.95 - 0.75 * rank / max(1, count - 1)
