"""Carrying out a conversion for a person: say what will be done, do it, say what was done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from launch.errors import FAILED, INTERRUPTED, show_error
from launch.progress import byte_progress
from launch.sizes import counted, readable_size

if TYPE_CHECKING:
    from rich.console import Console

    from checkpoint.convert.run import Conversion, Converted
    from checkpoint.writers.options import WriteOptions


class Manner(NamedTuple):
    """How a conversion is carried out and shown, whatever it writes.

    Attributes:
        verify: read the source once more before.
    """

    spec: str | None
    workers: int | None
    drop: bool
    verify: bool
    dry_run: bool
    as_json: bool


def run_conversion(source: Path, target: Path, to: str, options: WriteOptions, manner: Manner) -> None:
    """Prepare, say what will be done, do it, say what was done.

    Raises:
        ValueError: it is refused, see `prepare` and `convert` of `checkpoint.convert.run`.
        typer.Exit: it was interrupted, or the disk is full or fails; a message has said so.
    """
    from rich.console import Console

    from checkpoint.convert.execute import WORKERS
    from checkpoint.convert.run import convert as write
    from checkpoint.convert.run import prepare

    threads = WORKERS if manner.workers is None else manner.workers
    console = Console(highlight=False)
    conversion = prepare(source, to, options, spec=manner.spec, facts=options.facts, workers=threads)
    if manner.dry_run:
        with ending_in_a_message(target):
            _show_plan(console, conversion, target, as_json=manner.as_json)
        return
    before = "checking the source" if manner.verify else None
    with ending_in_a_message(target), byte_progress("converting", before=before) as advance:
        done = write(
            conversion, target, drop=manner.drop, verify=manner.verify, workers=threads, progress=advance
        )
    _show_done(console, conversion, done, manner)


@contextmanager
def ending_in_a_message(target: Path) -> Iterator[None]:
    """Ctrl-C and what the file system refuses are told without a traceback, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        show_error("Interrupted", _how_to_go_on(target) or f"Nothing was written to {target} yet.")
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        show_error("Not converted", f"{error}\n{_how_to_go_on(target)}".strip())
        raise typer.Exit(FAILED) from None


def _how_to_go_on(target: Path) -> str:
    partial = target.with_name(target.name + ".partial-convert")
    if not _begun(partial):
        return ""
    return f"The same command goes on from the files finished in {partial}; to give up, remove that folder."


def _begun(partial: Path) -> bool:
    try:
        return partial.is_dir()
    except OSError:
        return False


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


def _show_done(console: Console, conversion: Conversion, done: Converted, manner: Manner) -> None:
    if manner.as_json:
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
    files = counted(done.num_files, "file")
    console.print(f"{done.target}: {done.format}, {files}{_pace(done, manner)}", markup=False)


def _pace(done: Converted, manner: Manner) -> str:
    """Bytes, seconds and speed, where there were large files; what was checked before and kept."""
    writing = max(done.seconds - done.verify_seconds, 1e-9)
    text = ""
    if done.bytes_written:
        speed = f"{done.bytes_written / 1e9 / writing:.2f} GB/s"
        text = f", {readable_size(done.bytes_written)} in {writing:.1f} s ({speed})"
    if manner.verify:
        text += f", source checked before in {done.verify_seconds:.1f} s"
    if done.resumed:
        text += f", {counted(done.resumed, 'file')} kept from before"
    return text
