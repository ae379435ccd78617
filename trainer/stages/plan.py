"""What a stage takes over from where it starts: a table that is drawn up before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from parallel.layout import Layout
from trainer.config import (
    RunConfig,
    architecture,
    decide_start,
    open_start,
    schedule,
    start_decisions,
    starting_checkpoint,
)
from trainer.model.architecture import Architecture
from trainer.model.parameters import logical_parameters
from trainer.schedule import Anchor, Schedule, ScheduleConfig
from trainer.stages.anchoring import anchor_of
from trainer.stages.decisions import Decision
from trainer.stages.fitting import (
    SHAPING,
    fingerprint_of,
    held_fields,
    held_shapes,
    shape_problems,
    tokenizer_problems,
)
from trainer.stages.load_stages import OURS, planned_anchor
from trainer.stages.stage import Stage

ROPE = ("rope_theta", "rope_scaling", "rope_scaling_factor")
SAME_RATE = 1e-6
"""Relative difference of two learning rates that are the same."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        held: in the checkpoint, in words.
        now: in the stage.
        verdict: "kept", "reset", "re-anchored" or "changed".
    """

    field: str
    held: str
    now: str
    verdict: str
    reason: str


@dataclass(frozen=True)
class Takeover:
    """What a stage starts from and what becomes of it.

    Attributes:
        origin: the checkpoint, in words; empty for a stage that starts from nothing.
        rows: one a field.
        problems: what keeps the stage from starting like this, a sentence each.
    """

    stage: str
    origin: str
    rows: tuple[Row, ...] = ()
    problems: tuple[str, ...] = ()


def takeover(stage: Stage, stages: Sequence[Stage]) -> Takeover:
    """The table of a stage: from its checkpoint, or from what the stage before it will leave.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    config = stage.config
    if stage.waits:
        state = planned_state(stage, stages)
        before = Architecture.model_validate(state["model"])
        shapes, stated = logical_parameters(before), before.model_dump(include=set(SHAPING))
        origin, same_run = f"{config.checkpoint.load}, which is still to be made", False
    else:
        path = starting_checkpoint(config)
        if path is None:
            return Takeover(stage.name, "")
        opened = open_start(config, path)
        shapes, stated = held_shapes(opened), held_fields(opened)
        same_run = path.parent == config.run.checkpoints and config.checkpoint.resume
        origin = f"{path} ({opened.format})"
        state = {"step": opened.manifest.step, **opened.manifest.state}
    try:
        decisions = (
            decide_start(config, OURS) if stage.waits else start_decisions(config, opened, same_run=same_run)
        )
    except ValueError as error:
        return Takeover(stage.name, origin, (), tuple(str(error).splitlines()))
    rows, problems = _rows(config, decisions, state)
    problems += shape_problems(architecture(config), shapes, stated)
    problems += tokenizer_problems(config, state, keeps_data=decisions["data"].verdict == "keep")
    if not same_run:
        problems += _schedule_problems(config, decisions, state) + _anneal_problems(config, state)
    return Takeover(stage.name, origin, tuple(rows), tuple(problems))


def planned_state(stage: Stage, stages: Sequence[Stage]) -> dict[str, Any]:
    """What will be in the checkpoint of an earlier stage, as far as its configuration says it."""
    assert stage.origin is not None
    before = next(one for one in stages if one.name == stage.origin.stage)
    config, step = before.config, stage.origin.step or before.last_step
    anchor = planned_anchor(before, stages)
    return {
        "step": step,
        "scalars": {"lr": schedule(config).lr(step - 1, anchor), "updates": step},
        "schedule": {
            "anchor": anchor.to_json(),
            "phase": schedule(config).phase(step - 1, anchor),
            "form": config.schedule.model_dump(mode="json"),
        },
        "data": {
            "sequence_length": config.data.sequence_length,
            "tokenizer": fingerprint_of(config),
        },
        "model": architecture(config).model_dump(mode="json"),
        "config": config.model_dump(mode="json"),
        "layout": asdict(config.parallel),
    }


def _rows(
    config: RunConfig, decisions: Mapping[str, Decision], state: Mapping[str, Any]
) -> tuple[list[Row], list[str]]:
    words = {"keep": "kept", "reset": "reset", "anchor": "re-anchored"}
    step = int(state["step"])
    first = step if decisions["step"].verdict == "keep" else 0
    plan = schedule(config)
    anchor = anchor_of(config.start, plan, decisions, step=first, state=state)
    scalars = state.get("scalars", {})
    held = {
        "moments": f"{scalars.get('updates', step)} updates",
        "step": str(step),
        "schedule": _schedule_words(state.get("schedule"), scalars.get("lr")),
        "data": _data_words(state),
        "random": "streams of its ranks",
    }
    now = {
        "moments": held["moments"] if decisions["moments"].verdict == "keep" else "0 updates",
        "step": f"{first} to {config.train.steps}",
        "schedule": f"{config.schedule.kind} from step {anchor.step}, lr {plan.lr(first, anchor):.3g}",
        "data": ", ".join(source.name for source in config.data.sources),
        "random": f"seed {config.run.seed}",
    }
    rows = [Row("weights", "all", "all", "kept", "always")]
    for field, decision in decisions.items():
        rows.append(Row(field, held[field], now[field], words[decision.verdict], decision.reason))
    return _with_sameness(rows, config, state)


def _with_sameness(
    rows: list[Row], config: RunConfig, state: Mapping[str, Any]
) -> tuple[list[Row], list[str]]:
    """Rows for what the checkpoint and the run file both say, and what must be the same and is not."""
    model, problems = architecture(config), []
    pairs = {
        "vocabulary": _vocabularies(config, model, state),
        "sequence_length": (state.get("data", {}).get("sequence_length"), config.data.sequence_length),
        "rope": (_rope(state.get("model", {})), _rope(model.model_dump(mode="json"))),
        "layout": (_layout(state.get("layout")), _layout(asdict(config.parallel))),
    }
    for field, (before, now) in pairs.items():
        same = before is None or before == now
        rows.append(
            Row(field, str(before or "not said"), str(now), "kept" if same else "changed", "the run file")
        )
        if not same and field != "vocabulary" and getattr(config.start, field) == "keep":
            problems.append(
                f"start.{field} is keep, the checkpoint has {before} and the run file {now}: make them "
                f'equal, or set start.{field} = "change"'
            )
    return rows, problems


def _vocabularies(config: RunConfig, model: Architecture, state: Mapping[str, Any]) -> tuple[str | None, str]:
    """Ids and tokenizer of the checkpoint, as far as it says them, and of the run file."""
    now = fingerprint_of(config)
    ids, before = state.get("model", {}).get("vocab_size"), state.get("data", {}).get("tokenizer", now)
    return None if ids is None else f"{ids} ids, {before}", f"{model.vocab_size} ids, {now}"


def _schedule_words(saved: Mapping[str, Any] | None, lr: float | None) -> str:
    rate = f", lr {lr:.3g}" if lr is not None else ""
    if saved is None:
        return f"none of ours{rate}"
    return f"{saved['form']['kind']} from step {saved['anchor']['step']}{rate}"


def _data_words(state: Mapping[str, Any]) -> str:
    data = state.get("data") or {}
    read = [f"{one['name']} {one['tokens']:,}" for one in data.get("sources", ())]
    return f"tokens read: {', '.join(read)}" if read else "a position" if data else "none of ours"


def _rope(model: Mapping[str, Any]) -> str | None:
    if "rope_theta" not in model:
        return None
    scaling = model.get("rope_scaling") or "none"
    factor = "" if scaling == "none" else f" x {model.get('rope_scaling_factor')}"
    return f"theta {model['rope_theta']:g}, scaling {scaling}{factor}"


def _layout(layout: Mapping[str, Any] | None) -> str | None:
    if not layout:
        return None
    degrees = Layout(**{key: value for key, value in layout.items() if key != "world_size"})
    return degrees.describe(degrees.model_parallel).replace(" DP1", "")  # data ranks may come and go


def _anneal_problems(config: RunConfig, state: Mapping[str, Any]) -> list[str]:
    """An anneal that branches off where nothing was stable."""
    phase = (state.get("schedule") or {}).get("phase", "stable")  # another trainer's says nothing of it
    if config.schedule.kind != "anneal" or phase == "stable":
        return []
    return [
        f"schedule.kind is anneal, and the checkpoint of step {state['step']} is in the phase {phase!r} of "
        "its schedule: an anneal branches off a stable one, of a constant, infinite or wsd schedule; choose "
        "such a stage, or a step of it, with start.from = STAGE@STEP"
    ]


def _schedule_problems(
    config: RunConfig, decisions: Mapping[str, Decision], state: Mapping[str, Any]
) -> list[str]:
    """A kept schedule that gives another learning rate than the checkpoint's at the first new step."""
    saved, run = state.get("schedule"), state.get("config")
    if decisions["schedule"].verdict != "keep" or saved is None or run is None:
        return []
    form = ScheduleConfig(**{k: v for k, v in saved["form"].items() if k in ScheduleConfig.model_fields})
    optimizer = run["optimizer"]
    old = Schedule(form, optimizer["lr"], optimizer["min_lr"], run["train"]["steps"])
    anchor, step = Anchor.from_json(saved["anchor"]), int(state["step"])
    before, now = old.lr(step, anchor), schedule(config).lr(step, anchor)
    if math.isclose(before, now, rel_tol=SAME_RATE, abs_tol=0.0):
        return []
    return [
        f"start.schedule is keep, and at step {step} the checkpoint's schedule gives a learning rate of "
        f"{before:.4g}, the run file's {now:.4g}: a kept schedule needs the same [schedule] and [optimizer] "
        f'and a length of its own (schedule.steps = {old.length(anchor)}); or set start.schedule = "anchor"'
    ]
