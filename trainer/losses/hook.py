"""`[[losses]]` as a hook of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.build import execution_here
from trainer.losses.auxiliary import AuxLosses, StepLosses
from trainer.losses.opening import Origin, Setting, open_losses

if TYPE_CHECKING:
    from parallel.engine import Engine
    from trainer.config import RunConfig
    from trainer.hooks.hooks import Beginning, Hook, Hooks
    from trainer.model.architecture import Architecture

NAME = "losses"


class LossesHook:
    """The auxiliary losses of a run; until `begin` there are none."""

    def __init__(self) -> None:
        self._losses = AuxLosses()

    def begin(self, beginning: Beginning, state: Mapping[str, Any] | None) -> list[str]:
        """Load the references; a new stage has its own start, whatever the stage before it had."""
        setting = setting_of(
            beginning.config,
            beginning.engine,
            beginning.model,
            lineage=beginning.start.lineage,
        )
        saved = None if beginning.new_stage else state
        self._losses = open_losses(beginning.config.losses, setting, saved)
        return self._losses.notes()

    def at(self, step: int) -> StepLosses | None:
        """As `AuxLosses.at`."""
        return self._losses.at(step)

    def state(self) -> dict[str, Any]:
        """Which references the losses have."""
        return self._losses.state()


def make_losses(config: RunConfig) -> dict[str, Hook]:
    """The hook, where the run file asks for it."""
    return {NAME: LossesHook()} if config.losses else {}


def losses_at(hooks: Hooks, step: int) -> StepLosses | None:
    """The auxiliary losses of the step after `step` steps; None where there are none."""
    hook = hooks.by_name.get(NAME)
    return hook.at(step) if isinstance(hook, LossesHook) else None


def setting_of(
    config: RunConfig,
    engine: Engine,
    model: Architecture,
    *,
    lineage: Sequence[Mapping[str, Any]],
) -> Setting:
    """What the losses need to know of a run; the last checkpoint of its lineage is what it started from."""
    origin = Path(lineage[-1]["path"]) if lineage else None
    return Setting(
        engine=engine,
        model=model,
        execution=execution_here(precision=config.train.precision, deterministic=config.run.deterministic),
        sequence_length=config.data.sequence_length,
        global_batch=config.train.global_batch,
        sources=config.data.sources,
        origin=Origin(origin, config.run.seed, config.checkpoint.spec, config.checkpoint.facts),
        document_mask=config.data.document_mask,
    )
