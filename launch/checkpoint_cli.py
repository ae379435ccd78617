"""`ratoon checkpoint`: look into checkpoints of any trainer, check them, compare them, convert them."""

from __future__ import annotations

import typer

from launch.convert_command import convert
from launch.diff_command import diff
from launch.errors import ReportingGroup
from launch.inspect_command import inspect
from launch.parity_command import parity
from launch.reshard_command import reshard
from launch.verify_command import verify

app = typer.Typer(name="checkpoint", cls=ReportingGroup, no_args_is_help=True)


@app.callback()
def checkpoint() -> None:
    """Look into checkpoints of any trainer, check, compare and convert them."""


for command in (inspect, verify, diff, convert, reshard, parity):
    app.command()(command)
