"""`ratoon checkpoint convert`: from any format that is read to any that is written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.conversion import Manner, run_conversion
from launch.source_options import (
    FactsOption,
    JSONOption,
    PathArgument,
    SpecOption,
    WorkersOption,
    parse_facts,
)
from launch.target_options import (
    DropOption,
    DryRunOption,
    NoVerifyOption,
    StatesOption,
    TargetArgument,
    parse_states,
)

FORMATS = ("universal", "index", "huggingface", "torch_dist", "deepspeed_universal", "dcp")


def convert(
    source: PathArgument,
    target: TargetArgument,
    to: Annotated[str, typer.Option(metavar="FORMAT", help=", ".join(FORMATS) + ".", show_default=False)],
    states: StatesOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Of the weights: float32, bfloat16 or float16; by default the source's.",
            show_default=False,
        ),
    ] = None,
    shard_gb: Annotated[float, typer.Option(min=0.001, metavar="GB", help="Size of a large file.")] = 4.0,
    names: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="Naming of the target; by default the usual one.", show_default=False
        ),
    ] = None,
    carry: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Copy config.json and tokenizer from here; by default from beside the source.",
            show_default=False,
        ),
    ] = None,
    spec: SpecOption = None,
    fact: FactsOption = None,
    workers: WorkersOption = None,
    drop: DropOption = False,
    no_verify: NoVerifyOption = False,
    dry_run: DryRunOption = False,
    as_json: JSONOption = False,
) -> None:
    """Convert a checkpoint of any trainer, optimizer state included, in one pass.

    The source stays as it is. Interrupted, the same command goes on from the files that were finished.
    """
    from checkpoint.writers.options import WriteOptions

    if to not in FORMATS:
        raise typer.BadParameter(f"{to!r} is none of {', '.join(FORMATS)}", param_hint="--to")
    options = WriteOptions(
        states=parse_states(states),
        dtype=dtype,
        shard_bytes=int(shard_gb * 1e9),
        spec=names,
        facts=parse_facts(fact),
        carry=carry,
    )
    run_conversion(source, target, to, options, Manner(spec, workers, drop, not no_verify, dry_run, as_json))
