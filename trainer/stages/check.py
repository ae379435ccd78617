"""What keeps the stages of a run from running, found before the first of them starts."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config import (
    RunConfig,
    open_start,
    schedule,
    starting_checkpoint,
    validate,
)
from trainer.config_problems import report
from trainer.data.mixture_config import nearest
from trainer.schedule import ScheduleConfig
from trainer.stages.load_stages import planned_anchor
from trainer.stages.plan import takeover
from trainer.stages.replay_check import data_position, replay_problems
from trainer.stages.stage import Stage


def check_stages(stages: Sequence[Stage], world_sizes: Sequence[int], *, name: str) -> None:
    """Raise one ValueError with all that is wrong with the stages of the run file `name`.

    What a stage takes from one that has not run is checked as far as the run file says it.
    """
    found: dict[str, list[str]] = {}
    for stage, world_size in zip(stages, world_sizes, strict=True):
        for problem in stage_problems(stage, stages, world_size):
            found.setdefault(problem, []).append(stage.name)
    problems = [
        f"stage{'s' * (len(names) > 1)} {', '.join(names)}: {problem}" if len(stages) > 1 else problem
        for problem, names in found.items()
    ]
    problems += validation_problems(stages)
    if problems:
        raise ValueError(report(name, problems))


def stage_problems(stage: Stage, stages: Sequence[Stage], world_size: int) -> list[str]:
    """Everything that is wrong with one stage, a sentence each."""
    if not stage.waits:
        found = validate(stage.config, world_size)
    else:
        found = validate(_without_start(stage.config), world_size)
        found += schedule(stage.config).problems(planned_anchor(stage, stages))
    return found or [
        *takeover(stage, stages).problems,
        *replay_problems(stage, stages),
        *_cap_problems(stage),
    ]


def validation_problems(stages: Sequence[Stage]) -> list[str]:
    """Validation sets held out of a source that no stage has, nor the run whose checkpoint the first goes on
    from; a stage need not have the sources that it is evaluated on."""
    sets = {one.name: one.source for stage in stages for one in stage.config.data.validation if one.source}
    known = {source.name for stage in stages for source in stage.config.data.sources}
    if not known.issuperset(sets.values()):
        known |= {name for stage in stages for name in _read_before(stage)}
    return [
        f"data.validation {name!r}: source = {source!r} is no source of the run; leave it out where the "
        f"set is held out of none{nearest(source, known)}"
        for name, source in sets.items()
        if source not in known
    ]


def _read_before(stage: Stage) -> list[str]:
    """Sources of the checkpoint that a stage goes on from, where no stage of this run file makes it."""
    if stage.origin is not None:
        return []
    try:
        path = starting_checkpoint(stage.config)
        state = open_start(stage.config, path).manifest.state if path is not None else {}
    except ValueError:
        return []  # said already
    return [one["name"] for one in (state.get("data") or {}).get("sources", ())]


def _cap_problems(stage: Stage) -> list[str]:
    """Sources that do not last for the stage; what an earlier stage is still to read is not counted."""
    from trainer.data.caps import cap_problems  # brings numpy, which no wrong key needs

    config = stage.config
    state, first = (None, stage.first_step) if stage.waits else data_position(config)
    return cap_problems(
        config.data,
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        first_step=first,
        last_step=stage.last_step,
        state=state,
        stage=config.run.stage,
    )


def _without_start(config: RunConfig) -> RunConfig:
    """The stage as if it began from nothing, its schedule left out: its checkpoint is still to be made."""
    checkpoint = config.checkpoint.model_copy(update={"load": None})
    return config.model_copy(update={"checkpoint": checkpoint, "schedule": ScheduleConfig(kind="constant")})
