"""`ratoon weights`: numbers that controllers of the mixture need. Heavy imports are inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.errors import ReportingGroup

app = typer.Typer(
    name="weights",
    cls=ReportingGroup,
    help="Measure what dynamic weights of the sources need.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.callback()
def weights() -> None:
    """Measure what dynamic weights of the sources need."""


@app.command()
def graph(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file.", show_default=False)],
    steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Length of the run on each source.", show_default=False)
    ],
    stage: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of a run file with stages: which one.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a key of the run file. May be given many times.",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Processes on this machine; by default one a GPU, or what the layout needs.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Where graph.json and logs go; by default graph/ in the run's or stage's folder.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure Skill-it's graph: how far training on each source lowers each held-out loss.

    A short run on each source alone, all from what the run or stage starts from.
    They leave nothing but DIR/graph.json, for [cyan]controller.graph[/].

    Starts one process a rank on this machine. Under torchrun or srun, joins their ranks instead.
    """
    from launch.controller_command import show_graph

    show_graph(run_file, overrides or [], stage=stage, steps=steps, ranks=ranks, out=out)


@app.command()
def targets(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, or of a stage.", show_default=False)
    ],
    tokens: Annotated[
        float,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens of the run to come, of all sources, as in 2e9.",
            show_default=False,
        ),
    ],
    stage: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a run with stages: which one.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="JSON",
            help="The file to write; by default targets.json in the run's or stage's folder.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Fit Velocitune's targets: the held-out losses that a short run would reach after N tokens.

    From its evaluations, four or more. Writes JSON for [cyan]controller.targets[/].
    """
    from launch.controller_command import show_targets

    show_targets(run, tokens, stage=stage, out=out)
