"""Forgetting as a PNG that is legible in grey."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.forgetting.curves import Curve, StageRecords
from trainer.forgetting.metrics import most_changed
from trainer.forgetting.report import Report, StageGap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_SETS = 8
"""Lines that can be told apart."""
MOST_ROWS = 14
"""Of the matrix."""
MOST_PANELS = 6
"""Sets in a comparison of runs."""
DPI = 150
NATS = "held-out loss, nats per token"
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1, 1.5)))
MARKERS = "os^Dv"
BORDER: dict[str, Any] = {"color": "0.35", "linewidth": 0.9, "linestyle": (0, (4, 2))}


def write_picture(report: Report, path: Path) -> None:
    """Draw the curves of all sets over all stages, the matrix, and the rises at the beginning of stages.

    Raises:
        ValueError: the file cannot be written.
    """
    rises = sorted(report.gaps, key=lambda one: -one.gap.depth)[:MOST_SETS]
    figure = _figure(10.0, 7.4)
    top, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.15, 1)).reshape(-1).tolist()
    _draw_curves(top.subplots(), report)
    if rises:
        left, right = below.subplots(1, 2, gridspec_kw={"width_ratios": (1, 1)})
        _draw_rises(right, report, rises)
    else:
        left = below.subplots()
    _draw_matrix(left, report)
    figure.suptitle(f"{report.run}: what it knows, stage by stage", fontsize=11)
    _save(figure, path)


def write_comparison(reports: Mapping[str, Report], path: Path) -> None:
    """Draw a panel for each validation set with a curve for each run.

    Args:
        reports: by what the legend is to call each run.

    Raises:
        ValueError: the file cannot be written.
    """
    first = next(iter(reports.values()))
    names = [first.matrix.sets[index] for index in most_changed(first.matrix, MOST_PANELS)]
    columns = 1 if len(names) == 1 else 2
    rows = -(-len(names) // columns)
    figure = _figure(10.0, 1.2 + 2.9 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).reshape(-1).tolist()
    for axes, name in zip(panels, names, strict=False):
        for number, (label, report) in enumerate(reports.items()):
            style = _style(number, len(reports)) | {"linewidth": 2.8 if number == 0 else 1.6}
            for stage in range(len(report.stages)):
                _plot(axes, report, stage, name, style | {"label": label if stage == 0 else None})
        _draw_borders(axes, first)
        axes.set_title(f"held-out {name}", fontsize=10, fontweight="bold", pad=20)
    for axes in panels[::columns]:
        axes.set_ylabel(NATS)
    for axes in panels[: len(names)][-columns:]:
        axes.set_xlabel("step")
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, handlelength=3.2)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no state shared with others
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    except OSError as error:
        raise ValueError(f"cannot write the picture {path}: {error.strerror or error}") from None


def _style(number: int, count: int) -> dict[str, Any]:
    """A line that differs from its neighbours in lightness and in dashes."""
    from matplotlib import colormaps

    return {
        "color": colormaps["cividis"](0.78 * number / max(1, count - 1)),
        "linestyle": DASHES[number % len(DASHES)],
        "linewidth": 1.6,
    }


def _starts(report: Report) -> list[int]:
    """Where each stage begins on the axis, and where the last ends: steps that were really trained.

    They are the steps' own numbers as long as every stage goes on where the last has ended.
    """
    stages = [stage.stage for stage in report.stages]
    found = [stages[0].first_step]
    for stage in stages:
        found.append(found[-1] + stage.last_step - stage.first_step)
    return found


def _plot(axes: Axes, report: Report, stage: int, name: str, style: Mapping[str, Any]) -> None:
    """The curve of a set in the stage with this index."""
    curve, start = report.stages[stage].curve(name), _starts(report)[stage]
    first = report.stages[stage].stage.first_step
    marker = "." if len(curve) < 30 else None
    steps = [start + step - first for step, _ in curve]
    axes.plot(steps, _drawable([loss for _, loss in curve]), marker=marker, markersize=4, **style)


def _draw_curves(axes: Axes, report: Report) -> None:
    shown = most_changed(report.matrix, MOST_SETS)
    for number, index in enumerate(shown):
        name = report.matrix.sets[index]
        for stage in range(len(report.stages)):
            style = _style(number, len(shown)) | {"label": name if stage == 0 else None}
            _plot(axes, report, stage, name, style)
    _draw_borders(axes, report)
    axes.set_xlabel("step")
    axes.set_ylabel(NATS)
    left_out = len(report.matrix.sets) - len(shown)
    title = "validation set" + (f"\n({left_out} others left out)" if left_out else "")
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, handlelength=3.2, fontsize=9, title=title
    )


def _draw_borders(axes: Axes, report: Report) -> None:
    """A line where a stage begins, and the stages' names above."""
    starts = _starts(report)
    for start in starts[1:-1]:
        axes.axvline(start, **BORDER)
    axes.set_xlim(starts[0], max(starts[-1], starts[0] + 1))
    whole = max(1, starts[-1] - starts[0])
    for start, end, stage in zip(starts, starts[1:], report.stages, strict=False):
        narrow = (end - start) / whole < 0.014 * (len(stage.stage.name) + 1)
        axes.annotate(
            stage.stage.name,
            ((start + end) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="left" if narrow else "center",
            va="bottom",
            rotation=30 if narrow else 0,
            fontsize=9,
        )


def _draw_matrix(axes: Axes, report: Report) -> None:
    """Losses as numbers; the darker, the further above the lowest that the set has had.

    The scale is that of the stages: against an untrained start, all of them would look alike.
    """
    matrix = report.matrix
    shown = most_changed(matrix, MOST_ROWS)
    columns = [[matrix.loss(stage, index) for stage in range(matrix.last + 1)] for index in shown]
    shades = [_above_lowest(values) for values in columns]
    largest = max((one for row in shades for one in row[1:] if math.isfinite(one)), default=0.0)
    scale = largest or 1.0
    axes.imshow(
        [[min(one, 1.2 * scale) for one in row] for row in shades],
        cmap="Greys",
        vmin=0.0,
        vmax=1.5 * scale,
        aspect="auto",
    )
    for row, index in enumerate(shown):
        for stage, value in enumerate(columns[row]):
            axes.text(
                stage,
                row,
                "-" if value is None else f"{value:.3f}",
                ha="center",
                va="center",
                fontsize=8,
                fontweight="bold" if matrix.learned[index] == stage else "normal",
                color="white" if shades[row][stage] > 0.85 * scale else "black",
            )
    axes.set_xticks(range(matrix.last + 1), ["start", *matrix.stages], rotation=0, fontsize=8)
    axes.set_yticks(range(len(shown)), [matrix.sets[index] for index in shown], fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(
        "loss after each stage; bold: where learned; darker: further above the lowest", fontsize=8.5
    )


def _drawable(values: Sequence[float]) -> list[float]:
    """A loss that is not finite leaves a hole."""
    return [value if math.isfinite(value) else math.nan for value in values]


def _above_lowest(values: Sequence[float | None]) -> list[float]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    above = [math.nan if value is None else value - min(known, default=0.0) for value in values]
    return _drawable(above)


def _draw_rises(axes: Axes, report: Report, rises: Sequence[StageGap]) -> None:
    """How far old sources are above the start of a stage; steps on a logarithmic axis, as they were taken."""
    stages = {stage.stage.name: stage for stage in report.stages}
    for number, one in enumerate(rises):
        curve = _after_start(stages[one.stage], one.set_name)
        axes.plot(
            [step for step, _ in curve],
            _drawable([loss - one.gap.start_loss for _, loss in curve]),
            label=f"{one.set_name} in {one.stage}",
            marker=MARKERS[number % len(MARKERS)],
            markersize=3.5,
            **_style(number, len(rises)),
        )
    axes.axhline(0.0, color="0.5", linewidth=0.9)
    longest = max(one.gap.end_step - one.gap.start_step for one in rises)
    axes.set_xscale("log")
    axes.set_xlim(0.85, 1.2 * longest)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.set_xlabel("steps since the stage began")
    axes.set_ylabel("above its start, nats per token")
    axes.set_title("old sources inside a stage", fontsize=8.5)
    axes.legend(frameon=False, fontsize=8, handlelength=3.2)


def _after_start(stage: StageRecords, name: str) -> Curve:
    """Steps since the stage began, without the start, which a logarithm has no place for."""
    first = stage.stage.first_step
    return [(step - first, loss) for step, loss in stage.curve(name) if step > first]
