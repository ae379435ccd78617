"""How errors reach a person: what they can put right as one panel, what we got wrong with its traceback."""

from __future__ import annotations

import sys
from typing import Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

PACKAGES = frozenset({"launch", "trainer", "checkpoint", "parallel"})

USAGE = 2
"""Exit code for wrong usage or a wrong run file; nothing was started."""
FAILED = 1
"""Exit code for a run that failed."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


class RankError(RuntimeError):
    """The first rank that failed, with its traceback."""

    def __init__(self, rank: int, report: str, *, message: str | None = None) -> None:
        """`message` is what a user should read instead of the report, where the fault is theirs to mend."""
        super().__init__(f"rank {rank} failed:\n{report}")
        self.rank = rank
        self.report = report
        self.message = message


def user_message(error: BaseException) -> str | None:
    """The message of an error that was written for users; None for any other.

    Ours are of exactly the class ValueError, or of a class of our own, and raised by our own code. A
    ValueError from inside torch or numpy is a fault of the program, and keeps its traceback.
    """
    written = type(error) is ValueError or is_ours(type(error).__module__)
    origin = error.__traceback__
    while origin is not None and origin.tb_next is not None:
        origin = origin.tb_next
    if not written or origin is None:
        return None
    return str(error) if is_ours(str(origin.tb_frame.f_globals.get("__name__", ""))) else None


def is_ours(module: str) -> bool:
    """Whether a module, or the logger named after it, belongs to this project."""
    return module.partition(".")[0] in PACKAGES


def show_error(title: str, message: str) -> None:
    """Print one red panel on the error stream."""
    console = Console(stderr=True, highlight=False)
    console.print(Panel(Text(message), title=title, title_align="left", border_style="red"))


class ReportingGroup(typer.core.TyperGroup):
    """A command group whose commands, and theirs in turn, end in a panel or a line rather than a stack."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; turn user errors, failed ranks and Ctrl-C into messages and exit codes."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _leave_live_display()
            Console(stderr=True).print("Interrupted; every process has ended.")
            raise typer.Exit(INTERRUPTED) from None
        except RankError as error:
            _leave_live_display()
            _show_rank_error(error)
            raise typer.Exit(FAILED) from None
        except ValueError as error:
            message = user_message(error)
            if message is None:
                raise
            show_error("Error", message)
            raise typer.Exit(USAGE) from None


def _show_rank_error(error: RankError) -> None:
    console = Console(stderr=True, highlight=False)
    if error.message is not None:
        show_error(f"Rank {error.rank} stopped the run", error.message)
    else:
        console.print(Text(f"Rank {error.rank} failed:", style="bold red"))
        sys.stderr.write(error.report.rstrip() + "\n")
    for note in getattr(error, "__notes__", ()):
        console.print(note, soft_wrap=True, markup=False)


def _leave_live_display() -> None:
    """A rank that was killed while it drew the progress line has left the cursor hidden at its end."""
    console = Console(stderr=True)
    if console.is_terminal:
        console.show_cursor(True)
        console.print()
