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
from launch.source_options import FactsOption, JSONOption, SpecOption, parse_facts

if TYPE_CHECKING:
    from rich.console import Console

    from parallel.layout import Layout
    from trainer.model.architecture import Architecture
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
    length: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of the compared sequences.")] = 64,
    spec: SpecOption = None,
    fact: FactsOption = None,
    as_json: JSONOption = False,
) -> None:
    """Compare logits at all positions with transformers; exit 1 and name a suspect where they differ."""
    from rich.console import Console

    from checkpoint.opening import open_checkpoint

    if precision not in ("fp32", "bf16"):
        raise typer.BadParameter(f"{precision} is not one of fp32, bf16", param_hint="--precision")
    degrees = parse_layout(layout)
    facts = parse_facts(fact)
    ours, theirs = open_checkpoint(a, spec=spec, facts=facts), open_checkpoint(b)
    _quieten_libraries()
    from trainer.parity.job import ParityJob, architectures, with_suspects

    models = architectures(ours, theirs)
    _refuse_layout(degrees, models[0], length)
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
    verdict = "[bold green]same[/]" if report.same else "[bold red]not the same[/]"
    console.print(f"{verdict}: {report.sentence()}")
    for suspect in report.suspects:
        console.print(f"suspect: {suspect}", style="yellow", markup=False)


def _quieten_libraries() -> None:
    """megatron-core says at length which libraries it misses; ranks forked from here inherit this."""
    warnings.filterwarnings("ignore", module=r"megatron\.")


def _world_size(layout: Layout) -> int:
    return layout.tensor * layout.pipeline * math.lcm(layout.context, layout.expert)


def _refuse_layout(layout: Layout, model: Architecture, length: int) -> None:
    problems = layout.problems(
        _world_size(layout),
        num_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.mlp_size,
        num_experts=model.num_experts or None,
        sequence_length=length,
    )
    if problems:
        raise ValueError("--layout does not fit this model:\n  " + "\n  ".join(problems))


def _on_ranks(job: ParityJob) -> ParityReport:
    from launch.environment import count_gpus, hide_gpus, prepare_gpus
    from launch.ranks import run_ranks

    layout, world_size = job.layout, _world_size(job.layout)
    gpu = count_gpus() >= world_size
    if gpu:
        prepare_gpus(tensor=layout.tensor, deterministic=False)
    else:
        hide_gpus()
        import trainer.loop  # noqa: F401  # ranks are forked warm
    from trainer.parity.job import run_parity

    reports = run_ranks(run_parity, world_size, job, start_method="spawn" if gpu else "fork")
    report: ParityReport = reports[0]
    return report
