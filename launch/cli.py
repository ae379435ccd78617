"""The `ratoon` command. Everything heavy is imported inside the commands: `ratoon --help` answers at once."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launch import checkpoint_cli, controller_cli, data_cli, plot_cli, report_cli
from launch.errors import ReportingGroup
from launch.recipe_cli import recipe

app = typer.Typer(
    name="ratoon",
    cls=ReportingGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFileArgument = Annotated[
    Path, typer.Argument(metavar="RUN.toml", help="The run file.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the run file, as in [cyan]train.steps=100[/]. May be given many times.",
        show_default=False,
    ),
]
RanksOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Processes on this machine; by default one a GPU, or what the layout needs.",
        show_default=False,
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        Console().print(f"ratoon {version('ratoon')}", highlight=False)
        raise typer.Exit


@app.callback()
def ratoon(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train language models the Megatron way, and go on training them.

    New here? [bold cyan]ratoon demo[/] trains a small model in a few minutes, without a GPU.
    """


app.add_typer(data_cli.app, name="data")
app.add_typer(checkpoint_cli.app, name="checkpoint")
app.add_typer(plot_cli.app, name="plot")
app.add_typer(report_cli.app, name="report")
app.add_typer(controller_cli.app, name="weights")
app.command()(recipe)


@app.command()
def demo(
    folder: Annotated[
        Path,
        typer.Option("--dir", metavar="DIR", help="For everything it makes; if full, a new folder inside."),
    ] = Path("runs/demo"),
    ranks: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="1, 2, 4 or 8 processes; by default 4, or the GPUs.", show_default=False
        ),
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A few steps only: does it run at all?")] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the weights and of the order of the documents.")
    ] = 1234,
) -> None:
    """Watch a small model learn prose, go on with code in two ways, and forget prose more or less.

    Takes a few minutes. Needs no GPU and downloads nothing.
    """
    from launch.demo.command import demo as run_demo

    run_demo(folder, ranks=ranks, fast=fast, seed=seed)


@app.command()
def train(run_file: RunFileArgument, overrides: SetOption = None, ranks: RanksOption = None) -> None:
    """Train as a run file says, and resume where its last checkpoint left off.

    Starts one process a rank on this machine. Under torchrun or srun, joins their ranks instead.
    """
    from launch.train_command import train as run_training

    run_training(run_file, overrides or [], ranks=ranks)


@app.command()
def check(run_file: RunFileArgument, overrides: SetOption = None, ranks: RanksOption = None) -> None:
    """Check a run file: resolved settings, layout, memory and compute. Starts nothing."""
    from launch.check_command import check as run_check

    run_check(run_file, overrides or [], ranks=ranks)


@app.command()
def plan_resume(run_file: RunFileArgument, overrides: SetOption = None, ranks: RanksOption = None) -> None:
    """Show what each stage keeps of the checkpoint that it starts from. Starts nothing."""
    from launch.plan_command import plan_resume as show_plan

    show_plan(run_file, overrides or [], ranks=ranks)


def main() -> None:
    """Entry point of the `ratoon` command."""
    app()


if __name__ == "__main__":
    main()
