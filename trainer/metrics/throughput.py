"""Tokens per second and time to the end, from the recent steps."""

from __future__ import annotations

from collections import deque
from statistics import median


class Throughput:
    """Speed over a sliding window of steps.

    The median of the window decides, so that one step slowed by a save or a neighbour does not move the
    numbers. The first step since the start is left out: it compiles, allocates and opens connections.
    """

    def __init__(self, window: int = 20) -> None:
        """Watch the last `window` steps."""
        self._seconds: deque[float] = deque(maxlen=window)
        self._seconds_per_token: deque[float] = deque(maxlen=window)
        self._first = True

    def add(self, seconds: float, tokens: int) -> None:
        """Count a step of `tokens` tokens, over all data ranks, that took `seconds`."""
        if self._first:
            self._first = False
            return
        self._seconds.append(seconds)
        if tokens > 0:
            self._seconds_per_token.append(seconds / tokens)

    @property
    def tokens_per_second(self) -> float | None:
        """Median speed; None until two steps are done."""
        return 1.0 / median(self._seconds_per_token) if self._seconds_per_token else None

    @property
    def step_seconds(self) -> float | None:
        """Median wall time of a step; None until two steps are done."""
        return median(self._seconds) if self._seconds else None

    def eta_seconds(self, steps_left: int) -> float | None:
        """Wall time of `steps_left` more steps; None until two steps are done."""
        return None if self.step_seconds is None else steps_left * self.step_seconds
