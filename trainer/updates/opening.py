"""`[updates]` and `[slow_weights]` as a hook of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from parallel.engine import Engine
from trainer.config import RunConfig
from trainer.hooks.hooks import Beginning, Hooks
from trainer.model.architecture import Architecture
from trainer.model.parameters import logical_parameters
from trainer.updates.fisher import drawing
from trainer.updates.hook import Updates

_NAME = "updates"


class UpdatesHook:
    """Begins and saves `Updates` with a run."""

    def __init__(self, updates: Updates) -> None:
        """Take what was made before the load."""
        self.updates = updates

    def begin(self, beginning: Beginning, state: Mapping[str, Any] | None) -> list[str]:
        """As `Hook.begin`; measures the Fisher matrix where the anchor needs one."""
        config = beginning.config
        return self.updates.begin(
            beginning.start.missing,
            new_stage=beginning.new_stage,
            state=state,
            draw=drawing(config.data, config.run.seed),
            document_mask=config.data.document_mask,
        )

    def state(self) -> dict[str, Any]:
        """As `Hook.state`."""
        return self.updates.state()


def make_updates(config: RunConfig, engine: Engine, model: Architecture) -> dict[str, UpdatesHook]:
    """The hook by its name where the run file asks for anything; its states are on the engine now."""
    updates, slow = config.updates, config.slow_weights
    if not updates.freeze and updates.anchor is None and slow.kind is None:
        return {}
    return {_NAME: UpdatesHook(Updates(engine, updates, slow, names=list(logical_parameters(model))))}


def averaged(hooks: Hooks) -> contextlib.AbstractContextManager[None] | None:
    """The model computes with the average of its weights inside; None where none is to be evaluated.

    All ranks enter and leave together.
    """
    hook = hooks.by_name.get(_NAME)
    if isinstance(hook, UpdatesHook) and hook.updates.evaluates_average:
        return hook.updates.averaged()
    return None
