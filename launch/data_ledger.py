"""`ratoon data ledger`: what a run has read."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from checkpoint.folder import list_complete, read_manifest, resolve
from trainer.data.indexed import IndexedReader
from trainer.data.ledger import Ledger, SourceEntry
from trainer.data.segments import Segment
from trainer.run_config import RunSettings


@dataclass(frozen=True)
class Documents:
    """Documents of a source.

    Attributes:
        read: those read to their end at least once; None when they cannot be looked at.
        all: of the source.
        problem: why they cannot.
    """

    read: int | None
    all: int | None
    problem: str = ""


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint meant by one, by a run's or stage's folder, or by a run file: that with most steps.

    Raises:
        ValueError: there is none.
    """
    folder = _folder_of(path) if path.is_file() and path.suffix == ".toml" else path
    found = [
        one for place in (folder, *sorted(folder.glob("*/"))) for one in list_complete(place / "checkpoints")
    ]
    return max(found, key=lambda one: (one.step, one.path.stat().st_mtime)).path if found else resolve(folder)


def _folder_of(run_file: Path) -> Path:
    """Where a run file says that its run lies."""
    try:
        run = tomllib.loads(run_file.read_text(encoding="utf-8")).get("run", {})
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{run_file}: {error}") from None
    return RunSettings.model_validate(run).folder


def read_ledger(path: Path) -> tuple[Path, Ledger]:
    """The checkpoint meant by `path`, and what had been read when it was saved.

    Raises:
        ValueError: there is none, or it has no data position of ours.
    """
    folder, manifest = read_manifest(newest_checkpoint(path))
    state = manifest.state.get("data")
    if not state or "sources" not in state:
        raise ValueError(f"{folder} has no data position of ours: it was converted from another trainer's")
    return folder, Ledger.of(state)


def count_documents(ledger: Ledger, entry: SourceEntry) -> Documents:
    """How many documents of a source were read."""
    try:
        if entry.replays is not None:
            replayed = ledger.documents_replayed(entry.name)
            return Documents(sum(map(len, replayed.documents.values())), replayed.available)
        corpus = IndexedReader(entry.path)
        read = ledger.documents_read(entry.name, corpus=corpus)
    except ValueError as error:
        return Documents(None, None, str(error))
    return Documents(len(read), corpus.num_documents)


def show_ledger(path: Path, *, as_json: bool, segments: bool, console: Console | None = None) -> None:
    """Print the ledger of the newest checkpoint at `path`. Raises ValueError as `read_ledger` does."""
    console = console or Console(highlight=False)
    folder, ledger = read_ledger(path)
    documents = {entry.name: count_documents(ledger, entry) for entry in ledger.sources}
    if as_json:
        console.print(json.dumps(_as_json(folder, ledger, documents), indent=2), soft_wrap=True, markup=False)
        return
    console.print(Text(f"{folder}: {ledger.step:,} steps", style="bold"), soft_wrap=True)
    console.print(_table(ledger, documents))
    for name, found in documents.items():
        if found.problem:
            console.print(Text(f"documents of {name}: {found.problem}", style="yellow"))
    for reading in ledger.replaced:
        console.print(
            f"{reading.name}: {reading.tokens:,} tokens before, of other data or in another order",
            markup=False,
        )
    if segments:
        _show_segments(console, ledger)
    elif len(ledger.segments) > 1:
        console.print(Text(f"{len(ledger.segments)} segments; --segments shows the shares of each", "dim"))


def _table(ledger: Ledger, documents: dict[str, Documents]) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("source", overflow="fold", max_width=20)
    for name in ("documents", "tokens", "epochs", "share\nasked", "share\nrealised"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in ledger.sources:
        read = documents[entry.name].read
        table.add_row(
            Text(entry.name),
            "?" if read is None else f"{read:,}",
            f"{entry.fed:,}",
            f"{entry.epochs:.2f}",
            f"{entry.asked:.3%}",
            f"{entry.realised:.3%}",
        )
    if len(ledger.sources) > 1:
        known = [one.read for one in documents.values() if one.read is not None]
        total = f"{sum(known):,}" if len(known) == len(documents) else "?"
        table.add_row("all", total, f"{sum(one.fed for one in ledger.sources):,}", "", "", "", style="bold")
    return table


def _show_segments(console: Console, ledger: Ledger) -> None:
    for segment in ledger.segments:
        last = segment.step + segment.steps
        stage = f", stage {segment.stage}" if segment.stage else ""
        heading = (
            f"\nsteps {segment.step} to {last}{stage}: {segment.sequences:,} sequences of {segment.length}"
        )
        console.print(Text(heading, style="bold"))
        console.print(_segment_table(segment))


def _segment_table(segment: Segment) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("source", overflow="fold", max_width=30)
    for name in ("sequences", "share asked", "share realised"):
        table.add_column(name, justify="right")
    for name, (asked, realised) in segment.shares().items():
        table.add_row(Text(name), f"{segment.dealt[name]:,}", f"{asked:.3%}", f"{realised:.3%}")
    return table


def _as_json(folder: Path, ledger: Ledger, documents: dict[str, Documents]) -> dict[str, Any]:
    return {
        "checkpoint": str(folder),
        "step": ledger.step,
        "sources": [
            {
                "source": entry.name,
                "path": entry.path,
                "documents": documents[entry.name].read,
                "documents_in_source": documents[entry.name].all,
                "tokens": entry.fed,
                "tokens_of_metadata": entry.metadata,
                "tokens_in_epoch": entry.epoch_tokens,
                "epochs": entry.epochs,
                "share_asked": entry.asked,
                "share_realised": entry.realised,
                **(
                    {"replays": [one.name for one in entry.replays.seen]} if entry.replays is not None else {}
                ),
            }
            for entry in ledger.sources
        ],
        "segments": [_segment_json(segment) for segment in ledger.segments],
        "replaced": [asdict(reading) for reading in ledger.replaced],
    }


def _segment_json(segment: Segment) -> dict[str, Any]:
    shares = segment.shares()
    return {
        "first_step": segment.step,
        "steps": segment.steps,
        "stage": segment.stage,
        "sequence_length": segment.length,
        "sources": [
            {
                "source": name,
                "sequences": segment.dealt[name],
                "share_asked": asked,
                "share_realised": realised,
            }
            for name, (asked, realised) in shares.items()
        ],
    }
