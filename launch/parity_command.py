"""`ratoon checkpoint parity`: the logits of a checkpoint against those of transformers."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.errors import FAILED
from launch.layout_option import LayoutOption, parse_layout
from launch.source_options import FactsOption, SpecOption, parse_facts

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.parity.job import ParityJob
    from trainer.parity.report import ParityReport


def parity(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="A checkpoint of any format, which Ratoon computes.")
    ],
    b: Annotated[
        Path, typer.Argument(metavar="B", help="A Hugging Face folder, which transformers computes.")
    ],
    layout: LayoutOption = "",
    precision: Annotated[str, typer.Option(metavar="fp32|bf16", help="Of weights and activations.")] = "fp32",
    length: Annotated[int, typer.Option(min=2, help="Tokens of the compared sequences.")] = 64,
    spec: SpecOption = None,
    fact: FactsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Compare logits at all positions with transformers; exit 1 and name a suspect where they differ."""
    from rich.console import Console

    from checkpoint.opening import open_checkpoint
    from trainer.parity.job import ParityJob, architectures, with_suspects

    if precision not in ("fp32", "bf16"):
        raise typer.BadParameter(f"{precision} is not one of fp32, bf16", param_hint="--precision")
    degrees = parse_layout(layout)
    facts = parse_facts(fact)
    ours, theirs = open_checkpoint(a, spec=spec, facts=facts), open_checkpoint(b)
    models = architectures(ours, theirs)
    job = ParityJob(a, theirs.folder, models[0], degrees, precision, spec, facts, length)
    report = with_suspects(_on_ranks(job), ours, theirs, models)
    console = Console(highlight=False)
    if as_json:
        console.print(json.dumps(report.to_json(), indent=2), soft_wrap=True, markup=False)
    else:
        show(console, report)
    if not report.same:
        raise typer.Exit(FAILED)


def show(console: Console, report: ParityReport) -> None:
    """The differences as a table, the verdict, the suspects."""
    from rich.table import Table

    table = Table("point", "difference", "allowed", "", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for difference in report.differences:
        verdict = "[green]same[/]" if difference.same else "[bold red]differs[/]"
        table.add_row(difference.point, f"{difference.relative:.1e}", f"{difference.allowed:.1e}", verdict)
    console.print(table)
    style = "green" if report.same else "bold red"
    console.print(report.sentence(), style=style)
    for suspect in report.suspects:
        console.print(f"suspect: {suspect}", style="yellow", markup=False)


def _on_ranks(job: ParityJob) -> ParityReport:
    from launch.environment import count_gpus, hide_gpus, prepare_gpus
    from launch.ranks import run_ranks

    layout = job.layout
    world_size = layout.tensor * layout.pipeline * math.lcm(layout.context, layout.expert)
    gpu = count_gpus() >= world_size
    if gpu:
        prepare_gpus(tensor=layout.tensor, deterministic=False)
    else:
        hide_gpus()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import trainer.loop  # noqa: F401  # ranks are forked warm
    from trainer.parity.job import run_parity

    reports = run_ranks(run_parity, world_size, job, start_method="spawn" if gpu else "fork")
    report: ParityReport = reports[0]
    return report
