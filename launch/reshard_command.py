"""`ratoon checkpoint reshard`: cut a checkpoint as a layout holds it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from launch.convert_command import (
    DryRunOption,
    JSONOption,
    Manner,
    TargetArgument,
    VerifyOption,
    run_conversion,
)
from launch.layout_option import LayoutOption, parse_layout
from launch.source_options import FactsOption, PathArgument, SpecOption, WorkersOption, parse_facts


def reshard(
    source: PathArgument,
    target: TargetArgument,
    layout: LayoutOption,
    states: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Only these, as weight,master; by default all.", show_default=False),
    ] = None,
    spec: SpecOption = None,
    fact: FactsOption = None,
    workers: WorkersOption = None,
    verify: VerifyOption = True,
    dry_run: DryRunOption = False,
    as_json: JSONOption = False,
) -> None:
    """Write a checkpoint of any trainer as Ratoon's own, one file for each model-parallel rank of a layout.

    No run needs it: `[checkpoint] load` reads any checkpoint on any layout. It pays where many ranks start
    often from one checkpoint on a file system that is slow at small reads.
    """
    from checkpoint.writers.options import WriteOptions

    degrees = {key: value for key, value in asdict(parse_layout(layout)).items() if type(value) is int}
    options = WriteOptions(
        states=None if states is None else tuple(part.strip() for part in states.split(",")),
        facts=parse_facts(fact),
        layout=degrees,
    )
    manner = Manner(spec, workers, False, verify, dry_run, as_json)
    run_conversion(source, target, "ranks", options, manner)
