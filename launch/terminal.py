"""What a person sees while a run trains: one live line on a terminal, plain lines everywhere else."""

from __future__ import annotations

import math
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainer.metrics.sink import EvaluationRecord, RunInfo, StepRecord


class Terminal:
    """A `MetricSink` over a Rich console.

    On a terminal the last step is a live line under everything that was printed before it. Where output goes
    to a file or a pipe, each record is a line of its own.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Write to `console`; standard output by default."""
        self.console = console or Console(highlight=False)
        self._info: RunInfo | None = None
        self._live: Live | None = None

    def start(self, info: RunInfo) -> None:
        """Say what runs, and begin the live line."""
        self._info = info
        size = f", {count(info.parameters)} parameters" if info.parameters else ""
        self.console.print(Text(info.name, style="bold") + Text(f": {info.layout}{size}", style="default"))
        for note in info.notes:
            self.console.print(Text(note, style="dim"), soft_wrap=not self.console.is_terminal)
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=8, transient=False)
            self._live.start()

    def step(self, record: StepRecord) -> None:
        """Move the live line, or print a line."""
        assert self._info is not None, "start() comes first"
        if self._live is None:
            self.console.print(plain_line(record, self._info.total_steps), soft_wrap=True)
        else:
            self._live.update(live_line(record, self._info.total_steps, self.console.width))

    def event(self, text: str, *, step: int) -> None:
        """Print one line about something that happened after `step` steps."""
        self.console.print(Text(f"step {step}: ", style="cyan") + Text(text, style="default"), soft_wrap=True)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Print the held-out losses, a line for each validation set; those of a dense evaluation in one."""
        if record.dense:
            losses = {**record.losses, **record.dense_losses}
            text = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            self.event(f"held-out  {text}", step=record.step)
        else:
            self.console.print(evaluation_table(record))

    def close(self) -> None:
        """Leave the last line standing."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def plain_line(record: StepRecord, total_steps: int) -> str:
    """One step for a log file."""
    return f"step {record.step}/{total_steps}  " + "  ".join(f"{key} {text}" for key, text in fields(record))


def live_line(record: StepRecord, total_steps: int, width: int) -> Table:
    """One step for a terminal of `width` columns: what does not fit is left out from the right."""
    step = Text(f"{record.step}/{total_steps} ", style="bold")
    parts: list[Text] = []
    room = width - step.cell_len
    for key, text in fields(record):
        part = Text.assemble((f" {key} ", "dim"), text.ljust(5))  # so that the bar keeps its length
        if room < part.cell_len:
            break
        room -= part.cell_len
        parts.append(part)
    line = Table.grid()
    if room > 6:
        bar = ProgressBar(total=total_steps, completed=record.step, width=min(24, room - 1))
        line.add_row(step, bar, *parts)
    else:
        line.add_row(step, *parts)
    return line


def fields(record: StepRecord) -> list[tuple[str, str]]:
    """Names and readable values of one step, the most important first."""
    found = [("loss", f"{record.loss:.4f}"), *_auxiliary(record), ("lr", f"{record.lr:.2e}")]
    if record.tokens_per_second is not None:
        found.append(("tok/s", count(record.tokens_per_second)))
    if record.eta_seconds is not None:
        found.append(("ETA", duration(record.eta_seconds)))
    if (mfu := next(iter(record.mfu.values()), None)) is not None:
        found.append(("MFU", f"{100 * mfu:.1f}%"))
    found.append(("norm", f"{record.grad_norm:.3g}"))
    if len(record.source_losses) > 1:
        found += [(name, f"{loss:.4f}") for name, loss in record.source_losses.items()]
    return found


def _auxiliary(record: StepRecord) -> list[tuple[str, str]]:
    """Means of the auxiliary losses; a dash where the step had no token of their sources."""
    return [(name, "-" if math.isnan(loss) else f"{loss:.3g}") for name, loss in record.auxiliary.items()]


def evaluation_table(record: EvaluationRecord) -> Table:
    """Loss, perplexity, bits per byte and tokens of every validation set."""
    table = Table(title=f"evaluation after step {record.step}", title_justify="left", title_style="cyan")
    table.add_column("validation set", overflow="fold")
    for heading in ("loss", "perplexity", "bits/byte", "tokens"):
        table.add_column(heading, justify="right")
    for name, loss in record.losses.items():
        bits = f"{record.bits_per_byte[name]:.3f}" if name in record.bits_per_byte else ""
        perplexity = f"{record.perplexity(name):.2f}"
        table.add_row(name, f"{loss:.4f}", perplexity, bits, count(record.tokens.get(name, 0)))
    return table


def count(number: float) -> str:
    """1234567 is 1.23M; three significant digits."""
    if not math.isfinite(number):
        return str(number)
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * limit:
            return (
                f"{number / limit:.3g}{unit}"
                if abs(number) < 999.5 * limit
                else f"{number / limit:.0f}{unit}"
            )
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """0:05, 12:34, 3:04:05, or 2 days, 3:04:05."""
    if not math.isfinite(seconds):
        return "?"
    text = str(timedelta(seconds=round(seconds)))
    return text[2:] if text.startswith("0:") else text
