"""Where the schedule of a run begins that goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.schedule import Anchor, Schedule
from trainer.stages.decisions import Decision
from trainer.stages.start_config import StartConfig


def anchor_of(
    start: StartConfig,
    plan: Schedule,
    decisions: Mapping[str, Decision],
    *,
    step: int,
    state: Mapping[str, Any],
) -> Anchor:
    """The anchor of the schedule `plan`.

    Weights without a learning rate go on from the one that a new run begins with.

    Args:
        step: the next step.
        state: of the checkpoint's manifest.
    """
    verdict = decisions["schedule"].verdict
    if verdict == "keep":
        return Anchor.from_json(state["schedule"]["anchor"]) if "schedule" in state else plan.begin()
    if verdict == "reset":
        return plan.begin(step)
    # an anneal goes down from where it branches off
    origin = "current" if plan.config.kind == "anneal" else start.rewarm_from
    current = float(state.get("scalars", {}).get("lr", 0.0)) or plan.config.warmup_init_lr
    return Anchor(step, {"current": current, "zero": 0.0, "min_lr": plan.floor}[origin])
