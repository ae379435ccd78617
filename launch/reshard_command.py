"""`ratoon checkpoint reshard`: cut a checkpoint as a layout holds it."""

from __future__ import annotations

from dataclasses import asdict

from launch.conversion import Manner, run_conversion
from launch.layout_option import LayoutOption, parse_layout
from launch.source_options import (
    FactsOption,
    JSONOption,
    PathArgument,
    SpecOption,
    WorkersOption,
    parse_facts,
)
from launch.target_options import DryRunOption, NoVerifyOption, StatesOption, TargetArgument, parse_states


def reshard(
    source: PathArgument,
    target: TargetArgument,
    layout: LayoutOption,
    states: StatesOption = None,
    spec: SpecOption = None,
    fact: FactsOption = None,
    workers: WorkersOption = None,
    no_verify: NoVerifyOption = False,
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
        states=parse_states(states),
        facts=parse_facts(fact),
        layout=degrees,
    )
    manner = Manner(spec, workers, False, not no_verify, dry_run, as_json)
    run_conversion(source, target, "ranks", options, manner)
