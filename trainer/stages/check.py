"""What keeps the stages of a run from running, found before the first of them starts."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config import RunConfig, schedule, validate
from trainer.config_problems import report
from trainer.schedule import ScheduleConfig
from trainer.stages.load_stages import planned_anchor
from trainer.stages.plan import takeover
from trainer.stages.stage import Stage


def check_stages(stages: Sequence[Stage], world_sizes: Sequence[int], *, name: str) -> None:
    """Raise one ValueError with all that is wrong with the stages of the run file `name`.

    What a stage takes from one that has not run is checked as far as the run file says it.
    """
    problems: list[str] = []
    for stage, world_size in zip(stages, world_sizes, strict=True):
        found = stage_problems(stage, stages, world_size)
        problems += [f"stage {stage.name}: {one}" for one in found] if len(stages) > 1 else found
    if problems:
        raise ValueError(report(name, problems))


def stage_problems(stage: Stage, stages: Sequence[Stage], world_size: int) -> list[str]:
    """Everything that is wrong with one stage, a sentence each."""
    if not stage.waits:
        found = validate(stage.config, world_size)
    else:
        found = validate(_without_start(stage.config), world_size)
        found += schedule(stage.config).problems(planned_anchor(stage, stages))
    return found or list(takeover(stage, stages).problems)


def _without_start(config: RunConfig) -> RunConfig:
    """The stage as if it began from nothing, its schedule left out: its checkpoint is still to be made."""
    checkpoint = config.checkpoint.model_copy(update={"load": None})
    return config.model_copy(update={"checkpoint": checkpoint, "schedule": ScheduleConfig(kind="constant")})
