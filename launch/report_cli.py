"""`ratoon report`: what runs have come to. Heavy imports are inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.errors import ReportingGroup

app = typer.Typer(
    name="report",
    cls=ReportingGroup,
    help="Say what runs have come to.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.callback()
def report() -> None:
    """Say what runs have come to."""


@app.command()
def forgetting(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Folders of runs; several are also compared.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PNG",
            help="The comparison to draw; by default forgetting-comparison.png in the first RUN.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure forgetting stage by stage, from the metrics of runs.

    Writes RUN/forgetting.json, RUN/forgetting.png and TensorBoard scalars.
    """
    from launch.report_command import report_forgetting

    report_forgetting(runs, out=out)
