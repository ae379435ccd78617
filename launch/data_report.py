"""What `ratoon data` shows: progress while it works, then what came of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from launch.terminal import count
from trainer.data.metadata import METADATA
from trainer.data.prepare import PrepareOptions, PrepareReport
from trainer.data.summary import Summary
from trainer.data.tokenizer import Tokenizer
from trainer.data.train_tokenizer import TokenizerReport

PLAIN_SECONDS = 10.0
BAR_SECONDS = 0.1
PREVIEW_CHARACTERS = 300


class Counts(Protocol):
    """What both reports count while they work."""

    input_bytes: int
    read_bytes: int
    documents: int
    text_bytes: int


class DataProgress:
    """A bar on a terminal, a line every ten seconds elsewhere.

    It draws only when it is told of progress: no thread of its own, which a fork of the workers could copy
    while it holds a lock.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._started = self._shown = time.monotonic()
        columns = (BarColumn(24), TextColumn("{task.percentage:3.0f}%"), TextColumn("{task.fields[text]}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, auto_refresh=False)
        self._task = self._bar.add_task("", total=None, text="")

    def __enter__(self) -> DataProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.refresh()
            self._bar.stop()

    def update(self, report: Counts) -> None:
        """Take note of a report; draw now and then."""
        now = time.monotonic()
        if now - self._shown < (BAR_SECONDS if self._console.is_terminal else PLAIN_SECONDS):
            return
        self._shown = now
        tokens = getattr(report, "tokens", None)
        amount, unit = (report.text_bytes, "bytes") if tokens is None else (tokens, "tokens")
        rate = amount / max(now - self._started, 1e-9)
        text = f"{count(report.documents)} documents  {count(amount)} {unit}  {count(rate)} {unit}/s"
        if self._console.is_terminal:
            self._bar.update(self._task, total=report.input_bytes, completed=report.read_bytes, text=text)
            self._bar.refresh()
        else:
            share = report.read_bytes / max(report.input_bytes, 1)
            self._console.print(f"{share:4.0%}  {text}", soft_wrap=True)


def print_prepared(report: PrepareReport, options: PrepareOptions, console: Console | None = None) -> None:
    """Say what was written, what was skipped, and how a run file names it."""
    console = console or Console(highlight=False)
    rows = [
        ("documents", f"{report.documents:,}"),
        ("tokens", f"{report.tokens:,}"),
        ("speed", f"{count(report.tokens_per_second)} tokens/s, {report.seconds:.1f} s"),
        ("bytes per token", f"{report.text_bytes / report.tokens:.2f}"),
    ]
    if report.validation_documents:
        held_out = f"{report.validation_documents:,} documents, {report.validation_tokens:,} tokens"
        rows.append(("held out of these", held_out))
    if options.metadata:
        rows.append(("with metadata", _with_metadata(report)))
    rows.append(("bad records", _listed(report.bad) or "none"))
    if report.left_out:
        rows.append(("files left out", _listed(report.left_out)))
    console.print(_grid(rows))
    _print_bad(console, report)
    for prefix in report.outputs:
        beside = f" and {prefix}{METADATA}.*" if options.metadata else ""
        console.print(Text(f"wrote {prefix}.bin, .idx, .json{beside}"), soft_wrap=True)
    console.print(Text("\nIn a run file:", style="dim"))
    console.print(Text(_run_file_lines(report.outputs, options)), soft_wrap=True)


def _with_metadata(report: PrepareReport) -> str:
    without = report.documents - report.with_metadata
    text = f"{report.with_metadata:,} documents, {report.metadata_tokens:,} tokens"
    return text + (f"; {without:,} have none" if without else "")


def _print_bad(console: Console, report: PrepareReport) -> None:
    for example in report.bad_examples:
        console.print(Text(f"  {example}", style="yellow"), soft_wrap=True)
    hidden = report.bad.total() - len(report.bad_examples)
    if hidden > 0:
        console.print(Text(f"  and {hidden:,} more", style="yellow"))


def _run_file_lines(outputs: Sequence[str], options: PrepareOptions) -> str:
    name = Path(options.output).name
    eod = f"eod = {_toml(options.eod)}\n" if options.eod else ""
    text = f"[data]\ntokenizer = {_toml(options.tokenizer)}\n{eod}"
    for section, prefix in zip(("sources", "validation"), outputs, strict=False):
        text += f"[[data.{section}]]\nname = {_toml(name)}\npath = {_toml(prefix)}\n"
        text += "weight = 1.0\n" if section == "sources" else ""
    return text + '[[data.transforms]]\nkind = "metadata"' if options.metadata else text.rstrip()


def _toml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def print_trained_tokenizer(report: TokenizerReport, output: str, wanted: int) -> None:
    """Say what the tokenizer was trained on, and how large it came out."""
    console = Console(highlight=False)
    rows = [
        ("documents", f"{report.documents:,}"),
        ("text", f"{count(report.text_bytes)} bytes"),
        ("vocabulary", f"{report.vocab_size:,}"),
        ("bad records", _listed(report.bad) or "none"),
    ]
    console.print(_grid(rows))
    if report.vocab_size < wanted:
        console.print(Text(f"the text has no more pairs to merge: {report.vocab_size:,} ids, not {wanted:,}"))
    console.print(Text(f"wrote {output}"), soft_wrap=True)


def print_summary(summary: Summary) -> None:
    """Counts, tokenizer and lengths of a prepared corpus."""
    console = Console(highlight=False)
    rows = [
        ("documents", f"{summary.documents:,}"),
        ("tokens", f"{summary.tokens:,}, {summary.dtype}, {count(summary.file_bytes)} bytes"),
        ("a document", f"{summary.shortest:,} to {summary.longest:,} tokens, median {summary.median:,.0f}"),
    ]
    if (made := summary.sidecar) is not None:
        rows += [
            ("tokenizer", f"{made.tokenizer}, {made.vocab_size:,} ids, documents end with {made.eod_id}"),
            ("bytes per token", f"{made.text_bytes / max(made.tokens, 1):.2f}"),
            ("bad records", _listed(made.bad_records) or "none"),
            ("made from", ", ".join(made.inputs)),
            ("made by", f"ratoon {made.ratoon}"),
        ]
    console.print(Text(summary.prefix, style="bold"), soft_wrap=True)
    console.print(_grid(rows))
    console.print()
    console.print(_histogram(summary))


def _histogram(summary: Summary) -> Table:
    table = Table(box=None, padding=(0, 1), show_header=False, title="tokens in a document")
    table.title_justify, table.title_style = "left", "dim"
    for justify in ("right", "right", "left"):
        table.add_column(justify=justify)  # type: ignore[arg-type]
    most = max(documents for _, _, documents in summary.histogram)
    for low, high, documents in summary.histogram:
        length = -(-40 * documents // most)  # rounded up: one document is seen
        table.add_row(f"{low:,} to {high:,}", f"{documents:,}", Text("█" * length, style="cyan"))
    return table


def print_preview(documents: Sequence[tuple[int, Any]], tokenizer: Tokenizer | str) -> None:
    """The beginnings of documents: their text, or their ids where the tokenizer is unknown."""
    console = Console(highlight=False)
    if isinstance(tokenizer, str):
        console.print(Text(f"\nshown as ids: {tokenizer}", style="yellow"), soft_wrap=True)
    for number, (length, ids) in enumerate(documents):
        console.print(Text(f"\ndocument {number}, {length:,} tokens", style="dim"))
        text = " ".join(map(str, ids)) if isinstance(tokenizer, str) else tokenizer.decode(ids)
        shown = text[:PREVIEW_CHARACTERS].rstrip()
        console.print(Text(shown + (" ..." if len(shown) < len(text.rstrip()) or length > len(ids) else "")))


def _grid(rows: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in rows:
        grid.add_row(label, Text(value))
    return grid


def _listed(counts: Mapping[str, int]) -> str:
    """`12: invalid JSON 10, empty 2`"""
    if not counts:
        return ""
    total = sum(counts.values())
    return f"{total:,}: " + ", ".join(f"{reason} {n:,}" for reason, n in Counter(counts).most_common())
