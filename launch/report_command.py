"""`ratoon report forgetting`: everything about forgetting, from the metrics that runs have left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.forgetting.curves import find_stages
from trainer.forgetting.metrics import Summary, forgetting_by_set, most_changed, summarise
from trainer.forgetting.picture import write_comparison
from trainer.forgetting.report import Report
from trainer.forgetting.sentences import MOST_ROWS, number
from trainer.forgetting.writing import JSON, PNG, write_reports

COMPARISON = "forgetting-comparison.png"
MEANS = ("average", "forgetting", "forgetting_from_best", "backward_transfer", "forward_transfer")


def report_forgetting(runs: Sequence[Path], *, out: Path | None = None) -> None:
    """Write and print the report of every run; draw several in one picture and print them side by side.

    Args:
        out: the picture that compares them; by default in the folder of the first.

    Raises:
        ValueError: a folder is of no run, or of one that has not been evaluated.
    """
    console = Console(highlight=False)
    if out is not None and len(runs) == 1:
        raise ValueError(f"--out {out} is the picture that compares runs, and there is only {runs[0]}")
    reports = {_label(run, runs): _report(run) for run in runs}
    for (label, report), run in zip(reports.items(), runs, strict=True):
        console.print(Text(label, style="bold"))
        for line in report.lines():
            console.print(Text(line), soft_wrap=True)
        _say_written(console, f"{run / JSON} and {PNG}")
    if len(reports) > 1:
        path = out or runs[0] / COMPARISON
        write_comparison(reports, path)
        console.print(comparison_table(reports))
        _say_written(console, str(path))


def comparison_table(reports: Mapping[str, Report]) -> Table:
    """Forgetting by set, and all means, of runs side by side."""
    table = Table(title="nats per token", title_justify="left", title_style="cyan")
    table.add_column("", overflow="fold")
    for label in reports:
        table.add_column(label, justify="right", overflow="fold")
    first = next(iter(reports.values())).matrix
    for name in (first.sets[index] for index in most_changed(first, MOST_ROWS)):
        cells = [_forgotten(report, name) for report in reports.values()]
        if any(cell is not None for cell in cells):
            table.add_row(f"{name} forgotten", *map(number, cells))
    summaries = [summarise(report.matrix) for report in reports.values()]
    for mean in MEANS:
        table.add_row(mean.replace("_", " "), *(number(_mean(summary, mean)) for summary in summaries))
    return table


def _forgotten(report: Report, name: str) -> float | None:
    by_set = dict(zip(report.matrix.sets, forgetting_by_set(report.matrix), strict=True))
    return by_set.get(name)


def _mean(summary: Summary, name: str) -> float | None:
    value: float | None = getattr(summary, name)
    return value


def _report(run: Path) -> Report:
    report = write_reports(run, find_stages(run))
    if report is None:
        raise ValueError(
            f"{run} has no evaluation after its first step: add a [[data.validation]] to its run file and "
            "let a stage come to its end"
        )
    return report


def _label(run: Path, runs: Sequence[Path]) -> str:
    """The folder's name; the whole path where two have the same."""
    names = [one.resolve().name for one in runs]
    name = run.resolve().name
    return name if names.count(name) == 1 else str(run)


def _say_written(console: Console, what: str) -> None:
    console.print(Text(f"wrote {what}", "green"), soft_wrap=True)
