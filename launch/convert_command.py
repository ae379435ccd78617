"""`ratoon checkpoint convert`: from any format that is read to any that is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from launch.progress import byte_progress
from launch.sizes import readable_size
from launch.source_options import FactsOption, PathArgument, SpecOption, WorkersOption, parse_facts

if TYPE_CHECKING:
    from rich.console import Console

    from checkpoint.convert.run import Conversion, Converted
    from checkpoint.writers.options import WriteOptions

TargetArgument = Annotated[Path, typer.Argument(metavar="TARGET", help="A new folder.", show_default=False)]
DropOption = Annotated[
    bool, typer.Option("--drop", help="Leave out what the target cannot hold, which is listed.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done: files, bytes, memory, time, losses.")
]
VerifyOption = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Read the source once more before, and refuse damage.")
]
JSONOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def convert(
    source: PathArgument,
    target: TargetArgument,
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="universal, index, huggingface, torch_dist, deepspeed_universal or dcp.",
            show_default=False,
        ),
    ],
    states: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Only these, as weight,master; by default all.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="Of the weights; by default the source's.", show_default=False),
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
        typer.Option(help="Folder with config.json and tokenizer to copy along.", show_default=False),
    ] = None,
    spec: SpecOption = None,
    fact: FactsOption = None,
    workers: WorkersOption = None,
    drop: DropOption = False,
    verify: VerifyOption = True,
    dry_run: DryRunOption = False,
    as_json: JSONOption = False,
) -> None:
    """Convert a checkpoint of any trainer, optimizer state included, in one pass. The source stays as it is.

    Killed in the middle, the same command goes on where it was.
    """
    from checkpoint.writers.options import WriteOptions

    options = WriteOptions(
        states=None if states is None else tuple(part.strip() for part in states.split(",")),
        dtype=dtype,
        shard_bytes=int(shard_gb * 1e9),
        spec=names,
        facts=parse_facts(fact),
        carry=carry,
    )
    run_conversion(source, target, to, options, Manner(spec, workers, drop, verify, dry_run, as_json))


class Manner(NamedTuple):
    """How a conversion is carried out and shown, whatever it writes."""

    spec: str | None
    workers: int | None
    drop: bool
    verify: bool
    dry_run: bool
    as_json: bool


def run_conversion(source: Path, target: Path, to: str, options: WriteOptions, manner: Manner) -> None:
    """Prepare, say what will be done, do it, say what was done."""
    from rich.console import Console

    from checkpoint.convert.execute import WORKERS
    from checkpoint.convert.run import convert as write
    from checkpoint.convert.run import prepare

    threads = WORKERS if manner.workers is None else manner.workers
    console = Console(highlight=False)
    conversion = prepare(source, to, options, spec=manner.spec, facts=options.facts, workers=threads)
    if manner.dry_run:
        _show_plan(console, conversion, target, as_json=manner.as_json)
        return
    with byte_progress("converting") as advance:
        done = write(
            conversion, target, drop=manner.drop, verify=manner.verify, workers=threads, progress=advance
        )
    _show_done(console, conversion, done, as_json=manner.as_json)


def _show_plan(console: Console, conversion: Conversion, target: Path, *, as_json: bool) -> None:
    from checkpoint.convert.estimate import estimate_seconds

    opened, plan = conversion.opened, conversion.plan
    facts = {
        "source": f"{opened.format}: {opened.folder}",
        "target": f"{plan.format}: {target}",
        "files": len(plan.files) + len(plan.small) + len(plan.carried),
        "bytes_read": conversion.bytes_read,
        "bytes_written": conversion.bytes_written,
        "peak_memory": conversion.peak_bytes,
        "seconds": round(estimate_seconds(conversion, target), 1),
        "lost": plan.lost,
        "notes": [*opened.notes, *plan.notes],
        "left_out": list(opened.left_out),
    }
    if as_json:
        console.print(json.dumps(facts, indent=2), soft_wrap=True, markup=False)
        return
    for name, value in facts.items():
        if isinstance(value, list):
            for line in value:
                console.print(f"{name.replace('_', ' ')}: {line}", markup=False)
        else:
            text = readable_size(value) if name.startswith(("bytes", "peak")) else str(value)  # type: ignore[arg-type]
            console.print(f"{name.replace('_', ' ')}: {text}", markup=False)


def _show_done(console: Console, conversion: Conversion, done: Converted, *, as_json: bool) -> None:
    if as_json:
        facts = {
            "target": str(done.target),
            "format": done.format,
            "files": done.num_files,
            "bytes_written": done.bytes_written,
            "seconds": done.seconds,
            "verify_seconds": done.verify_seconds,
            "resumed_files": done.resumed,
            "dropped": list(done.dropped),
            "findings": [str(finding) for finding in done.findings],
        }
        console.print(json.dumps(facts, indent=2), soft_wrap=True, markup=False)
        return
    for line in (*conversion.opened.notes, *conversion.plan.notes):
        console.print(line, style="dim", markup=False)
    for line in done.dropped:
        console.print(f"dropped: {line}", style="yellow", markup=False)
    for finding in done.findings:
        console.print(f"{finding.severity}: {finding}", style="yellow", markup=False)
    writing = max(done.seconds - done.verify_seconds, 1e-9)
    kept = f", {done.resumed} files kept from before" if done.resumed else ""
    console.print(
        f"{done.target}: {done.format}, {done.num_files} files, {readable_size(done.bytes_written)} in "
        f"{writing:.1f} s ({done.bytes_written / 1e9 / writing:.2f} GB/s), checked before in "
        f"{done.verify_seconds:.1f} s{kept}",
        markup=False,
    )
