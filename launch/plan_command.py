"""`ratoon plan-resume`: what every stage of a run takes over from where it starts. Starts nothing."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.environment import read_environment
from launch.train_command import choose_world_size
from trainer.stages.check import check_stages
from trainer.stages.load_stages import load_stages
from trainer.stages.plan import Takeover, takeover
from trainer.stages.stage import Stage

_STYLES = {"kept": "green", "reset": "yellow", "re-anchored": "cyan", "changed": "yellow"}


def plan_resume(run_file: Path, overrides: list[str], *, ranks: int | None = None) -> None:
    """Print a table for each stage, then refuse the run if a stage is wrong or ambiguous.

    Raises:
        ValueError: with everything that keeps the stages from running.
    """
    stages = load_stages(run_file, overrides)
    console = Console(highlight=False)
    for stage in stages:
        console.print(_table(stage, takeover(stage, stages)))
    environment = read_environment()
    worlds = [choose_world_size(stage.config, environment, ranks) for stage in stages]
    check_stages(stages, worlds, name=str(run_file))
    console.print(Text(f"{run_file}: nothing is ambiguous", "green"), soft_wrap=True)


def _table(stage: Stage, found: Takeover) -> Table:
    title = f"{stage.name}: steps {stage.first_step:,} to {stage.last_step:,}"
    if stage.is_finished:
        title += ", done"
    table = Table(
        box=SIMPLE_HEAD,
        title=Text(f"{title}\nfrom {found.origin or 'nothing: new weights'}"),
        title_justify="left",
        title_style="bold",
        padding=(0, 1, 0, 0),
    )
    for heading in ("", "in the checkpoint", "in this stage", "", "why"):
        table.add_column(heading, overflow="fold")
    for row in found.rows:
        verdict = Text(row.verdict, _STYLES[row.verdict])
        table.add_row(row.field, row.held, row.now, verdict, row.reason)
    for problem in found.problems:
        table.add_row("", Text(problem, "red"))
    return table
