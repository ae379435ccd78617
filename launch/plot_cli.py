"""`ratoon plot`: pictures of a run. Heavy imports are inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.errors import ReportingGroup

app = typer.Typer(
    name="plot",
    cls=ReportingGroup,
    help="Draw what a run file describes.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.callback()
def plot() -> None:
    """Draw what a run file describes."""


@app.command()
def schedule(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a key of the run file. May be given many times.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PNG",
            help="The picture to write; by default RUN-schedule.png beside the run file.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draw the learning rate and the sources' shares over all stages, here and as a PNG.

    Starts nothing, and reads no tokens.
    """
    from launch.plot_command import plot_schedule

    plot_schedule(run_file, overrides or [], out=out)
