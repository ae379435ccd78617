"""`[controller]` as a hook of a run, and what the loop tells it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainer.controllers.driver import Driver
from trainer.metrics.sink import EvaluationRecord
from trainer.step import StepReport

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.hooks.hooks import Beginning, Hook, Hooks

NAME = "controller"
LOG = "controller.jsonl"
"""In the folder of the stage: a line for every call."""


class ControllerHook:
    """Asks a controller for the weights of the sources; without `[controller]` there is none to ask."""

    def __init__(self) -> None:
        self._driver: Driver | None = None

    def begin(self, beginning: Beginning, state: Mapping[str, Any] | None) -> list[str]:
        """Open the controller; a new stage, or a changed one, begins it anew."""
        config, start, stream = beginning.config, beginning.start, beginning.stream
        saved = None if beginning.new_stage else state
        notes = []
        plugin = config.controller.plugin
        now = (config.controller.kind, plugin, list(stream.source_names))
        if saved is not None and (saved["kind"], saved.get("plugin", plugin), saved["sources"]) != now:
            saved = None
            notes.append("the controller begins anew: its kind or the sources are not the checkpoint's")
        self._driver = Driver(
            config.controller,
            config.data,
            stream,
            steps=range(start.first_step, config.train.steps),
            log=config.run.folder / LOG,
            state=saved,
        )
        self._driver.open_log(after=start.step if saved is not None else start.step - 1)
        if self._driver.reinstate(start.step):
            notes.append("the data are dealt on other terms than before: the controller's weights stay")
        return [*notes, f"mixture controller: {config.controller.kind}, calls in {LOG}"]

    def state(self) -> dict[str, Any]:
        """As `Driver.state`."""
        return {} if self._driver is None else self._driver.state()

    @property
    def driver(self) -> Driver:
        """The controller at work; there is one from `begin` on."""
        assert self._driver is not None, "begin() comes first"
        return self._driver


def make_controller(config: RunConfig) -> dict[str, Hook]:
    """The hook by its name, where the run file asks for it."""
    return {NAME: ControllerHook()} if config.controller.kind is not None else {}


class Mixing:
    """The controller of a run as the loop sees it; does nothing where there is none."""

    def __init__(self, hooks: Hooks) -> None:
        """Take the controller out of the hooks that are on."""
        hook = hooks.by_name.get(NAME)
        self._driver = hook.driver if isinstance(hook, ControllerHook) else None

    def is_border(self, step: int) -> bool:
        """Whether the weights may change before `step`: it cannot be built ahead."""
        return self._driver is not None and self._driver.is_border(step)

    def add_step(self, report: StepReport) -> None:
        """Note the losses of a training step."""
        if self._driver is not None:
            self._driver.add_step(report.by_source)

    def add_evaluation(self, record: EvaluationRecord) -> None:
        """Note held-out losses."""
        if self._driver is not None:
            self._driver.add_evaluation(record.step, record.losses)

    def reweigh(self, step: int) -> str | None:
        """As `Driver.reweigh`; call it at every step border on every rank."""
        return None if self._driver is None else self._driver.reweigh(step)
