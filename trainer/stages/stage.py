"""A stage of a run: a configuration of its own, a folder of its own, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from checkpoint.folder import find_latest, step_name
from trainer.config import RunConfig


@dataclass(frozen=True)
class Origin:
    """The earlier stage of the same run that a stage starts from.

    Attributes:
        step: of which checkpoint; None for its newest.
    """

    stage: str
    step: int | None = None

    def path(self, checkpoints: Path) -> Path:
        """What `checkpoint.load` says, under the origin's folder of checkpoints."""
        return checkpoints if self.step is None else checkpoints / step_name(self.step)


@dataclass(frozen=True)
class Stage:
    """One stage, as it is planned.

    Attributes:
        number: from 0.
        config: of this stage alone: `train.steps` is its last step, `checkpoint.load` where it starts from.
        first_step: steps that were done before it.
        run_folder: of the whole run: the stage's own is in it, or is it, where there are no stages.
        origin: None for a stage that starts from nothing, or from a checkpoint of another run.
    """

    name: str
    number: int
    config: RunConfig
    first_step: int
    run_folder: Path
    origin: Origin | None = None

    @property
    def steps(self) -> int:
        """Steps of the stage itself."""
        return self.config.train.steps - self.first_step

    @property
    def last_step(self) -> int:
        """Steps of the run when the stage is done."""
        return self.config.train.steps

    @property
    def done(self) -> int:
        """The step of its newest checkpoint; 0 where there is none."""
        newest = find_latest(self.config.run.checkpoints)
        return int(newest.name.removeprefix("step-")) if newest is not None else 0

    @property
    def is_finished(self) -> bool:
        return self.done >= self.last_step

    @property
    def waits(self) -> bool:
        """Whether the checkpoint that it starts from is still to be made."""
        load = self.config.checkpoint.load
        if self.origin is None or load is None or self.done:
            return False
        return not load.exists() if self.origin.step is not None else find_latest(load) is None
