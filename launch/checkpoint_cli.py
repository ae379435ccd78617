"""`ratoon checkpoint`: look into checkpoints of any trainer, check them, compare them, convert them."""

from __future__ import annotations

import inspect as introspection
from collections.abc import Callable

import typer
from rich.markup import escape

from launch.convert_command import convert
from launch.diff_command import diff
from launch.errors import ReportingGroup
from launch.inspect_command import inspect
from launch.parity_command import parity
from launch.reshard_command import reshard
from launch.verify_command import verify

app = typer.Typer(name="checkpoint", cls=ReportingGroup, no_args_is_help=True, rich_markup_mode="rich")

EXAMPLES: dict[Callable[..., None], tuple[str, ...]] = {
    inspect: ("inspect runs/first", "inspect megatron-run --tensors"),
    verify: ("verify runs/first", "verify zero3-run --json"),
    diff: ("diff runs/first runs/second", "diff zero3-run converted --all"),
    convert: (
        "convert runs/first first-hf --to huggingface --drop",
        "convert zero3-run converted --to torch_dist --dry-run",
        "convert zero3-run first-hf --to huggingface --drop --carry hf",
    ),
    reshard: ("reshard runs/first cut --layout tensor=4,pipeline=2",),
    parity: ("parity runs/first first-hf --layout tensor=2",),
}
"""Command -> what is shown under its options, after `ratoon checkpoint`."""


@app.callback()
def checkpoint() -> None:
    """Look into checkpoints of any trainer, check, compare and convert them."""


def _paragraphs(text: str) -> str:
    """Lines are broken by the terminal's width instead of the source's; [...] stays as it is."""
    paragraphs = introspection.cleandoc(text).split("\n\n")
    return escape("\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))


for command, examples in EXAMPLES.items():
    lines = "\n".join(f"  ratoon checkpoint {example}" for example in examples)
    app.command(help=_paragraphs(command.__doc__ or ""), epilog=f"[dim]Examples[/]\n{lines}")(command)
