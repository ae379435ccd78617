"""The next step's micro-batches, built while this step runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls a pure function of the step one step ahead, in one thread.

    Numpy and page faults release the interpreter, so a thread is enough. It starts at the first `get`, never
    before a fork. Asking for a step out of order is allowed; it is only not faster.
    """

    def __init__(
        self,
        build: Callable[[int], T],
        *,
        stop: int | None = None,
        undecided: Callable[[int], bool] = lambda _: False,
    ) -> None:
        """Build nothing yet.

        Args:
            stop: the first step that must not be built ahead; None knows no end.
            undecided: whether what a step is made of is decided only when the one before it is done; such a
                step is built when it is asked for.
        """
        self._build = build
        self._stop = stop
        self._undecided = undecided
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[T]] | None = None

    def get(self, step: int) -> T:
        """What `build(step)` returns, or raises."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == step:
            result = ahead[1].result()
        else:
            result = self._thread.submit(self._build, step).result()
        if (self._stop is None or step + 1 < self._stop) and not self._undecided(step + 1):
            self._ahead = (step + 1, self._thread.submit(self._build, step + 1))
        return result

    def close(self) -> None:
        """End the thread; a step that is being built ahead is thrown away."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = self._ahead = None

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
