"""`ratoon checkpoint verify`: everything that can be known of a checkpoint without its trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launch.errors import FAILED
from launch.progress import byte_progress
from launch.sizes import readable_size
from launch.source_options import (
    FactsOption,
    JSONOption,
    PathArgument,
    SpecOption,
    WorkersOption,
    parse_facts,
)

if TYPE_CHECKING:
    from rich.console import Console

    from checkpoint.opening import Opened
    from checkpoint.verification.finding import Finding, Report

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
_SHOWN = 40


def verify(
    path: PathArgument,
    spec: SpecOption = None,
    fact: FactsOption = None,
    workers: WorkersOption = None,
    as_json: JSONOption = False,
) -> None:
    """Read all of a checkpoint of any trainer and report damage with its likely cause; exit 1 on damage.

    Checked: every element held exactly once, copies equal, rounded masters equal to their weights, finite
    numbers, steps and groups, shapes, hashes, files.
    """
    from rich.console import Console

    report = run_verification(path, spec, parse_facts(fact), workers)
    console = Console(highlight=False)
    if as_json:
        console.print(json.dumps(report.to_json(), indent=2), soft_wrap=True, markup=False)
    else:
        show(console, report)
    if not report.is_sound:
        raise typer.Exit(FAILED)


def run_verification(path: Path, spec: str | None, facts: dict[str, int], workers: int | None) -> Report:
    """The report, with a progress bar while it is made."""
    from checkpoint.opening import UnreadableError, open_checkpoint
    from checkpoint.verification.finding import Finding, Report
    from checkpoint.verification.report import verify_checkpoint

    try:
        opened = open_checkpoint(path, spec=spec, facts=facts)
    except UnreadableError as error:
        findings = [Finding("error", "open", reason) for reason in error.reasons]
        return Report(str(error.folder), error.format, findings=findings)
    more = {} if workers is None else {"workers": workers}
    with byte_progress("verifying") as advance:
        return verify_checkpoint(opened, expected=expected_shapes(opened), progress=advance, **more)


def expected_shapes(opened: Opened) -> dict[str, tuple[int, ...]] | None:
    """Logical name -> shape as the model's own configuration has it; None where it is not known."""
    from trainer.model.of_checkpoint import architecture_of
    from trainer.model.parameters import logical_parameters

    try:
        model = architecture_of(opened)
    except ValueError:
        return None  # a family that Ratoon does not train
    return None if model is None else logical_parameters(model)


def show(console: Console, report: Report) -> None:
    """The report for a person."""
    from rich.markup import escape

    sound = "[bold green]sound[/]" if report.is_sound else "[bold red]damaged[/]"
    console.print(f"[bold]{escape(report.path)}[/]  {sound}", soft_wrap=True)
    size = readable_size(report.num_bytes)
    console.print(
        f"{report.format}: step {report.step}, {report.num_tensors:,} tensors in {report.num_pieces:,} "
        f"pieces, {size}, {report.seconds:.1f} s",
        markup=False,
    )
    failed = {finding.check for finding in report.errors}
    for check, compared in report.checks.items():
        mark = "[red]fails[/]" if check in failed else "[green]ok[/]   "
        console.print(f"  {mark} {check:<9} {escape(compared)}")
    for finding in report.findings[:_SHOWN]:
        _show_finding(console, finding)
    if len(report.findings) > _SHOWN:
        console.print(f"... and {len(report.findings) - _SHOWN} more; --json lists all")
    for line in report.left_out:
        console.print(f"not looked at: {line}", style="dim", markup=False)


def _show_finding(console: Console, finding: Finding) -> None:
    from rich.text import Text

    style = _STYLES[finding.severity]
    console.print(Text(f"{finding.severity} ", style=style) + Text(str(finding), style="default"))
