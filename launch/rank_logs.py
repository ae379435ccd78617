"""Where log records of a rank go: all of them to its file, the important ones to the terminal."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console
from rich.text import Text

from launch.errors import is_ours

FAILURE = "launch.failure"
"""Logger of a rank's last words. They go to its file alone; who started the ranks shows them."""


def log_path(folder: Path, rank: int) -> Path:
    """`logs/rank-3.log` of a run folder."""
    return folder / "logs" / f"rank-{rank}.log"


def start_logging(folder: Path, *, rank: int, console: Console) -> None:
    """Send this process's log records to the rank's file and to `console`.

    The terminal shows what our own packages say from INFO up on rank 0, and warnings of every rank. The file,
    which goes on where an earlier start of the run left it, also has what libraries say.
    """
    path = log_path(folder, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    root.setLevel(logging.INFO)
    root.addHandler(file)
    root.addHandler(ConsoleHandler(console, rank))
    logging.captureWarnings(True)


class ConsoleHandler(logging.Handler):
    """Prints records above the live line of `console`."""

    def __init__(self, console: Console, rank: int) -> None:
        """Show our INFO on rank 0 and warnings on every rank."""
        super().__init__()
        self._console = console
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the terminal shows this record."""
        if record.name in (FAILURE, "py.warnings"):
            return False
        shown = logging.INFO if is_ours(record.name) and self._rank == 0 else logging.WARNING
        return record.levelno >= shown

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record, with the rank where it is not the first."""
        style = "default" if record.levelno < logging.WARNING else "yellow"
        prefix = f"rank {self._rank}: " if self._rank else ""
        self._console.print(Text(prefix + record.getMessage(), style=style), soft_wrap=True)
