"""A controller that somebody else wrote: found by its name, asked under a deadline, never trusted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.controllers.protocol import History, KeepWeightsError, MixtureController, as_json
from trainer.controllers.shares import checked
from trainer.entry_points import find_entry_point

GROUP = "ratoon.controllers"
"""The entry points that are controllers."""

Factory = Callable[[dict[str, Any], tuple[str, ...], dict[str, Any] | None], MixtureController]
"""(`controller.options`, names of the sources, what `state()` returned or None) -> the controller."""


def find_factory(name: str) -> Factory:
    """The factory of the entry point `name`, or of "module:attribute".

    Raises:
        ValueError: there is none, or its module cannot be imported.
    """
    found = find_entry_point(name, group=GROUP, key="controller.plugin")
    if not callable(found):
        raise ValueError(f"controller.plugin: {name} is no callable (options, sources, state) -> controller")
    factory: Factory = found
    return factory


class Plugin:
    """Asks a plug-in, in a thread of its own.

    A call that raises, answers nonsense or is late changes nothing: neither the weights nor the state. The
    plug-in is then opened again from its last good state, as a resume would, so that a run that goes on from
    a checkpoint does the same. A late call cannot be ended; as long as it runs, the plug-in is not asked.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        sources: Sequence[str],
        *,
        timeout: float,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Nothing is imported or started before the first call."""
        self._name, self._options, self._sources = name, dict(options), tuple(sources)
        self._timeout = timeout
        self._state = state
        self._open: MixtureController | None = None
        self._asking: threading.Thread | None = None

    def weights(self, history: History) -> dict[str, float]:
        """As `MixtureController.weights`."""
        if self._asking is not None and self._asking.is_alive():
            raise KeepWeightsError(f"{self._name} is still busy with an earlier call")
        answers: list[_Answer | BaseException] = []
        self._asking = threading.Thread(
            target=self._ask, args=(self._open, history, answers), name="controller", daemon=True
        )
        self._open = None  # until it has answered well
        self._asking.start()
        self._asking.join(self._timeout)
        if not answers:
            raise KeepWeightsError(f"{self._name} has not answered within {self._timeout:g} s")
        answer = answers[0]
        if isinstance(answer, BaseException):
            raise KeepWeightsError(f"{self._name}: {type(answer).__name__}: {answer}") from answer
        self._open, weights, self._state = answer
        return weights

    def state(self) -> dict[str, Any]:
        """What the plug-in's own `state` returned after its last good call."""
        return {"plugin": self._state}

    def _ask(
        self, plugin: MixtureController | None, history: History, answers: list[_Answer | BaseException]
    ) -> None:
        try:
            if plugin is None:
                state = None if self._state is None else as_json(self._state)  # a copy of its own
                plugin = find_factory(self._name)(dict(self._options), self._sources, state)
            weights = checked(plugin.weights(history), self._sources)
            answers.append((plugin, weights, as_json(plugin.state())))
        except BaseException as error:  # whatever it is, it is the plug-in's, and the run goes on
            answers.append(error)


_Answer = tuple[MixtureController, dict[str, float], dict[str, Any]]
