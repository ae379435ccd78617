"""The bar of long work on bytes: how far, how fast, how long still. On the error stream, if a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


@contextmanager
def byte_progress(what: str, *, before: str | None = None) -> Iterator[Callable[[int, int], None]]:
    """Yields what long work calls with the bytes done and the bytes in all, from any thread.

    Args:
        before: what is done until the first call, where that is something else.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(before or what, total=None, speed="")
        first: tuple[float, int] | None = None if before else (time.monotonic(), 0)

        def advance(done: int, total: int) -> None:
            nonlocal first
            now = time.monotonic()
            if first is None:  # the speed is that of the work itself
                first = now, done
            seconds = now - first[0]
            speed = f"{(done - first[1]) / 1e9 / seconds:.2f} GB/s" if seconds > 0 else ""
            bar.update(task, description=what, completed=done, total=max(total, 1), speed=speed)

        yield advance
