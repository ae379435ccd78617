"""Options of every command that writes a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TargetArgument = Annotated[Path, typer.Argument(metavar="TARGET", help="A new folder.", show_default=False)]
StatesOption = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Only these, as weight,master; by default all.", show_default=False),
]
DropOption = Annotated[
    bool, typer.Option("--drop", help="Leave out what the target cannot hold, which is listed.")
]
NoVerifyOption = Annotated[
    bool,
    typer.Option("--no-verify", help="Do not read the source once more before, which would refuse damage."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done: files, bytes, memory, time, losses.")
]


def parse_states(text: str | None) -> tuple[str, ...] | None:
    """The states of --states; None means all."""
    return None if text is None else tuple(part.strip() for part in text.split(","))
