"""Controllers as somebody else writes them, well and badly."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from trainer.controllers.protocol import History

RELEASE = threading.Event()
"""What a hanging plug-in waits for, so that no test leaves a thread behind."""


class Counting:
    """Gives the first source one more at each call, or does what `options["at"]` says at that call."""

    def __init__(
        self, options: dict[str, Any], sources: tuple[str, ...], state: dict[str, Any] | None
    ) -> None:
        self.options, self.sources = options, sources
        self.calls = state["calls"] if state else 0

    def weights(self, history: History) -> Mapping[str, float]:
        self.calls += 1
        self._misbehave(self.options.get(str(history.step)))
        return {name: float(self.calls + 1 if number == 0 else 1) for number, name in enumerate(self.sources)}

    def _misbehave(self, how: str | None) -> None:
        if how == "raise":
            raise RuntimeError("no idea")
        if how == "exit":
            raise SystemExit(3)
        if how == "hang":
            RELEASE.wait(60)

    def state(self) -> dict[str, Any]:
        return {"calls": self.calls}


class Answers:
    """Answers what the options say."""

    def __init__(self, options: dict[str, Any], sources: tuple[str, ...], state: object) -> None:
        self.options = options

    def weights(self, history: History) -> Any:
        return self.options["weights"]

    def state(self) -> Any:
        return self.options.get("state", {})


NOT_CALLABLE = 3
