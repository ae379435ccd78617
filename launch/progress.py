"""The bar of long work on bytes: how far, how fast, how long still. On the error stream, if a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


@contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what long work calls with the bytes done and the bytes in all, from any thread."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, speed="")
        begin = time.monotonic()

        def advance(done: int, total: int) -> None:
            seconds = time.monotonic() - begin
            speed = f"{done / 1e9 / seconds:.2f} GB/s" if seconds > 0 else ""
            bar.update(task, completed=done, total=max(total, 1), speed=speed)

        yield advance
