"""Which hooks a run file asks for."""

from __future__ import annotations

from parallel.engine import Engine
from trainer.config import RunConfig
from trainer.controllers.hook import make_controller
from trainer.hooks.hooks import Hooks
from trainer.losses.hook import make_losses
from trainer.model.architecture import Architecture
from trainer.updates.opening import make_updates


def make_hooks(config: RunConfig, engine: Engine, model: Architecture) -> Hooks:
    """The hooks, before a checkpoint is loaded: whatever they keep in tensors is in `engine.slices()` now.

    Every rank calls it.
    """
    return Hooks({**make_updates(config, engine, model), **make_losses(config), **make_controller(config)})
