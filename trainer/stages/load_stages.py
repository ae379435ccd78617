"""The stages of a run file, each with its first and last step, its folder, and what it starts from."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoint.opening import open_checkpoint
from trainer.config import RunConfig, decide_start, parse_config, schedule, start_decisions
from trainer.config_problems import report
from trainer.run_file import RunFile, apply_overrides, read_run_file
from trainer.schedule import Anchor
from trainer.stages.anchoring import anchor_of
from trainer.stages.decisions import Held
from trainer.stages.expand import stage_files
from trainer.stages.stage import Origin, Stage

OURS = Held("Ratoon", moments=True, schedule=True, data=True, weights_format=False)
"""What a checkpoint of an earlier stage will hold."""


def load_stages(path: Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """The stages of a run file in order; one, called as the run, where it has no `[[stage]]`.

    `overrides` are `--set` assignments; `stage.1.steps=20` is the second stage's.

    Raises:
        ValueError: listing what is wrong with the run file, or with the first stage that cannot be planned.
    """
    run_file = apply_overrides(read_run_file(path), overrides)
    if "stage" not in run_file.values:
        config = parse_config(run_file)
        return [Stage(config.run.name, 0, config, 0, config.run.folder)]
    stages: list[Stage] = []
    for own, file in stage_files(run_file):
        stages.append(_stage(own, file, stages))
    return _keeping_branches(_measured_from_the_start(stages))


def _measured_from_the_start(stages: Sequence[Stage]) -> list[Stage]:
    """The same stages; where others follow a first one, it evaluates before its first step as well.

    Forward transfer compares with these losses. A stage that goes on from a checkpoint does so anyway, and
    `eval.at_start` of the run file stands.
    """
    if len(stages) < 2:
        return list(stages)
    config = stages[0].config
    if config.checkpoint.load is not None or config.eval.at_start is not None:
        return list(stages)
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"at_start": True})})
    return [replace(stages[0], config=config), *stages[1:]]


def _keeping_branches(stages: Sequence[Stage]) -> list[Stage]:
    """The same stages, each saving and keeping the checkpoints that a later one branches off."""
    branches: dict[str, set[int]] = {}
    for stage in stages:
        if stage.origin is not None and stage.origin.step is not None:
            branches.setdefault(stage.origin.stage, set()).add(stage.origin.step)
    return [_saving_at(stage, branches.get(stage.name, set())) for stage in stages]


def _saving_at(stage: Stage, steps: set[int]) -> Stage:
    checkpoint = stage.config.checkpoint
    at = tuple(sorted(steps | set(checkpoint.at)))
    config = stage.config.model_copy(update={"checkpoint": checkpoint.model_copy(update={"at": at})})
    return replace(stage, config=config)


def _stage(own: dict[str, Any], file: RunFile, before: Sequence[Stage]) -> Stage:
    name = own["name"]
    origin = _place(file, before)
    file.values.setdefault("train", {})["steps"] = 1  # until its first step is known
    if origin is not None:
        checkpoints = _named(before, origin.stage).config.run.checkpoints
        file.values.setdefault("checkpoint", {})["load"] = str(origin.path(checkpoints))
    config = parse_config(file)
    run_folder = config.run.folder
    run = config.run.model_copy(update={"dir": run_folder / name, "stage": name})
    config = config.model_copy(update={"run": run})
    first = _first_step(config, origin, before)
    config = _numbered(config, len(before))
    length = _length(own, config, first, origin, before)
    train = config.train.model_copy(update={"steps": first + length})
    config = config.model_copy(update={"train": train})
    return Stage(name, len(before), config, first, run_folder, origin)


def _numbered(config: RunConfig, number: int) -> RunConfig:
    """The envelope of the schedule's peaks knows which stage this is, unless the run file says so."""
    envelope = config.schedule.envelope
    if "stage" in envelope.model_fields_set:
        return config
    envelope = envelope.model_copy(update={"stage": number})
    return config.model_copy(update={"schedule": config.schedule.model_copy(update={"envelope": envelope})})


def _place(file: RunFile, before: Sequence[Stage]) -> Origin | None:
    """Take `start.from` out of the file: what is no stage's name is the path of a checkpoint."""
    start = dict(file.values.get("start", {}))
    said = start.pop("from", None)
    file.values["start"] = start
    if said is None and (not before or _loads(file)):
        return None
    word, _, step = str(said or before[-1].name).partition("@")
    if word not in [stage.name for stage in before]:
        file.values.setdefault("checkpoint", {})["load"] = said
        return None
    stage = _named(before, word)
    if not step:
        return Origin(word, newest_stable_step(stage, before))
    if step == "end":
        return Origin(word)
    if not step.isdigit() or not stage.first_step < int(step) <= stage.last_step:
        raise ValueError(
            report(
                file.name,
                [
                    f"start.from = {said}: after @ stands a step of stage {word}, from "
                    f"{stage.first_step + 1} to {stage.last_step}, or end; found {step!r}"
                ],
            )
        )
    return Origin(word, int(step))


def newest_stable_step(stage: Stage, stages: Sequence[Stage]) -> int | None:
    """The last step before the stage began to anneal; None where it did not, or was never stable.

    Other data go on from before the anneal, as with the infinite schedule (Ibrahim et al. 2024, arXiv
    2403.08763).
    """
    plan, anchor = schedule(stage.config), planned_anchor(stage, stages)
    steps = range(stage.first_step, stage.last_step)
    border = bisect_left(steps, True, key=lambda step: plan.phase(step, anchor) == "annealed")
    if border in (0, len(steps)) or plan.phase(steps[border - 1], anchor) != "stable":
        return None
    return steps[border]


def _loads(file: RunFile) -> bool:
    return "load" in file.values.get("checkpoint", {})


def _named(stages: Sequence[Stage], name: str) -> Stage:
    return next(stage for stage in stages if stage.name == name)


def _first_step(config: RunConfig, origin: Origin | None, before: Sequence[Stage]) -> int:
    if origin is not None:
        last = _named(before, origin.stage).last_step
        kept = decide_start(config, OURS)["step"].verdict == "keep"
        return (origin.step if origin.step is not None else last) if kept else 0
    if config.checkpoint.load is None:
        return 0
    opened = open_checkpoint(
        config.checkpoint.load, spec=config.checkpoint.spec, facts=config.checkpoint.facts
    )
    kept = start_decisions(config, opened, same_run=False)["step"].verdict == "keep"
    return opened.manifest.step if kept else 0


def _length(
    own: dict[str, Any], config: RunConfig, first: int, origin: Origin | None, before: Sequence[Stage]
) -> int:
    """Steps of the stage; tokens are rounded up to whole global batches.

    Raises:
        ValueError: a number that is not a whole one above 0, or a learning rate that is never reached.
    """
    name = own["name"]
    if "until" not in own:
        key = "steps" if "steps" in own else "tokens"
        value = own[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"stage {name}: {key} = {value!r}: expected a whole number above 0")
        return value if key == "steps" else -(-value // config.tokens_per_step)
    until = own["until"]
    if not isinstance(until, dict) or set(until) != {"lr_below"}:
        raise ValueError(f"stage {name}: until = {until!r}: expected until = {{ lr_below = LEARNING_RATE }}")
    return _steps_until(until["lr_below"], name, config, first, origin, before)


def _steps_until(
    lr: float, name: str, config: RunConfig, first: int, origin: Origin | None, before: Sequence[Stage]
) -> int:
    plan = schedule(config)
    if config.schedule.steps is None:
        raise ValueError(
            f"stage {name}: until.lr_below asks where the schedule falls to {lr}, and it has no length of "
            "its own: set schedule.steps"
        )
    state: dict[str, Any] = {}
    if origin is not None:  # a kept schedule began where the stage before began its own
        state["schedule"] = {"anchor": planned_anchor(_named(before, origin.stage), before).to_json()}
    anchor = anchor_of(config.start, plan, decide_start(config, OURS), step=first, state=state)
    step = plan.first_step_below(lr, anchor)
    if step is None or step <= first:
        raise ValueError(
            f"stage {name}: until.lr_below = {lr}: the schedule never falls to it after step {first}; "
            f"optimizer.lr is {config.optimizer.lr}, optimizer.min_lr {config.optimizer.min_lr}"
        )
    return step - first


def planned_anchor(stage: Stage, stages: Sequence[Stage]) -> Anchor:
    """Where the schedule of a stage begins, as far as the run file alone says it."""
    plan = schedule(stage.config)
    if stage.origin is None:
        return plan.begin(stage.first_step)
    state: dict[str, Any] = {}
    decisions = decide_start(stage.config, OURS)
    before = _named(stages, stage.origin.stage)
    anchor = planned_anchor(before, stages)
    state["schedule"] = {"anchor": anchor.to_json()}
    last = (stage.origin.step if stage.origin.step is not None else before.last_step) - 1
    state["scalars"] = {"lr": schedule(before.config).lr(last, anchor)}
    return anchor_of(stage.config.start, plan, decisions, step=stage.first_step, state=state)
