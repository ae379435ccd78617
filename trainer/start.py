"""What a run starts from: a checkpoint of its own, another run's, or another trainer's; or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.load import LoadedState, load
from checkpoint.opening import Opened
from parallel.engine import Engine
from parallel.layout import Layout
from trainer.config import (
    HUGGING_FACE,
    RunConfig,
    architecture,
    open_start,
    resumes_itself,
    schedule,
    start_decisions,
)
from trainer.model.of_checkpoint import stated_fields
from trainer.parity.start import gate
from trainer.schedule import Anchor, Schedule
from trainer.stages.anchoring import anchor_of
from trainer.stages.decisions import Decision


@dataclass(frozen=True)
class Start:
    """Where a run stands before its first step.

    Attributes:
        step: optimizer steps done; 0 with fresh moments.
        updates: of Adam, which its bias correction counts.
        lr: of the last update.
        anchor: where the schedule began.
        data: position to go on from; None begins every source at its beginning.
        resumed: goes on from a checkpoint of its own.
        lineage: the checkpoints that it comes from, oldest first.
        rank_state: this rank's bytes, on the same layout only.
        hooks: state of the run's hooks, by name.
        first_step: of the stage: steps done before it began.
        missing: (logical name, state) that hooks keep and the checkpoint lacks; None of a run that starts
            from nothing.
    """

    step: int
    updates: int
    lr: float
    anchor: Anchor
    data: Mapping[str, Any] | None
    resumed: bool
    run_id: str | None
    lineage: list[dict[str, Any]]
    rank_state: Mapping[str, bytes]
    hooks: Mapping[str, Any] = field(default_factory=dict)
    first_step: int = 0
    missing: frozenset[tuple[str, str]] | None = None


def begin(plan: Schedule) -> Start:
    """A run that starts from nothing."""
    return Start(0, 0, 0.0, plan.begin(), None, False, None, [], {})


def start_from(
    config: RunConfig, engine: Engine, path: Path, layout: Mapping[str, Any]
) -> tuple[Start, list[str]]:
    """Load the checkpoint at `path` into the engine; say what was recognised, loaded and changed.

    Raises:
        ValueError: on every rank, when the checkpoint is damaged or does not fit.
    """
    plan, same_run = schedule(config), resumes_itself(config, path)
    opened = open_start(config, path)
    decisions = start_decisions(config, opened, same_run=same_run)
    kept = {field for field, decision in decisions.items() if decision.verdict == "keep"}
    loaded = load(
        opened,
        engine.slices(),
        rank=engine.mesh.rank,
        layout=layout,
        weights_only="moments" not in kept,
    )
    notes = _what_was_loaded(opened, loaded) + _changes(opened, config)
    if not same_run and opened.format.startswith(HUGGING_FACE):
        notes += filter(None, [gate(config, engine, opened)])
    found, step = loaded.state, loaded.step if "step" in kept else 0
    scalars = found.get("scalars", {})
    start = Start(
        step=step,
        updates=int(scalars.get("updates", loaded.step)) if "moments" in kept else 0,
        lr=float(scalars.get("lr", 0.0)) if "step" in kept else 0.0,
        anchor=anchor_of(config.start, plan, decisions, step=step, state=found),
        data=found.get("data") if "data" in kept else None,
        resumed=same_run,
        run_id=loaded.run_id if same_run else None,
        lineage=_lineage(opened, loaded, same_run=same_run),
        rank_state=loaded.rank_state if "random" in kept else {},
        hooks=found.get("hooks", {}),
        first_step=_first_step(found) if same_run else step,
        missing=loaded.absent,
    )
    return start, notes + _ways_of_going_on(start, decisions, config, loaded)


def _first_step(state: Mapping[str, Any]) -> int:
    """Where the stage of a run's own checkpoint began; the first versions kept only where it came from."""
    lineage = state.get("lineage") or [{"step": 0}]
    return int(state.get("first_step", lineage[-1]["step"]))


def _what_was_loaded(opened: Opened, loaded: LoadedState) -> list[str]:
    layout = loaded.state.get("layout")
    how = f"saved under {_degrees(layout)}" if layout else opened.format
    amount = f"{loaded.bytes_read / 1e6:,.1f} MB read by this rank in {loaded.seconds:.2f} s"
    notes = [f"loaded {loaded.path}, {how}: step {loaded.step}, {amount}", *opened.notes]
    if opened.left_out:
        notes.append(f"not taken over: {'; '.join(opened.left_out)}")
    return notes


def _lineage(opened: Opened, loaded: LoadedState, *, same_run: bool) -> list[dict[str, Any]]:
    lineage = [*loaded.state.get("lineage", [])]
    if same_run:
        return lineage
    origin: dict[str, Any] = {"path": str(loaded.path), "step": loaded.step}
    if "config" in loaded.state:
        origin["run"] = loaded.state["config"]["run"]["name"]
    else:
        origin["format"] = opened.format
    return [*lineage, origin]


def _ways_of_going_on(
    start: Start, decisions: Mapping[str, Decision], config: RunConfig, loaded: LoadedState
) -> list[str]:
    notes, found = [], loaded.state
    anew = [field for field, one in decisions.items() if one.verdict == "reset" and field != "moments"]
    if loaded.fresh:
        also = f", and so do {', '.join(anew)}" if anew else ""
        notes.append(f"{', '.join(loaded.fresh)} start fresh{also}: {decisions['moments'].reason}")
    elif anew:
        notes.append(f"begin anew: {'; '.join(f'{field} ({decisions[field].reason})' for field in anew)}")
    if "updates" not in found.get("scalars", {}) and start.updates:
        notes.append(
            "the checkpoint's parameters have made different numbers of updates: Adam counts "
            f"{start.updates} for all of them, the checkpoint's step"
        )
    if decisions["schedule"].verdict == "anchor":
        notes.append(
            f"the schedule starts anew: {config.schedule.kind} from step {start.anchor.step}, "
            f"learning rate {start.anchor.lr:.3g}"
        )
    elif "schedule" not in found and decisions["schedule"].verdict == "keep":
        notes.append(
            f"the checkpoint has no schedule of ours: {config.schedule.kind} counts from step "
            f"{start.anchor.step}"
        )
    return notes


def _degrees(layout: Mapping[str, Any]) -> str:
    degrees = {key: value for key, value in layout.items() if key != "world_size"}
    return Layout(**degrees).describe(layout["world_size"])


def _changes(opened: Opened, config: RunConfig) -> list[str]:
    """Fields of the model that the checkpoint states otherwise; its shapes have been compared already."""
    now = architecture(config).model_dump()
    return [
        f"changed since: model.{key} {saved} -> {now[key]}"
        for key, saved in stated_fields(opened).items()
        if key in now and now[key] != saved
    ]
