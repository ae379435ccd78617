"""Whether what a stage replays will have been read when it begins, as far as the run file says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import (
    RunConfig,
    decide_start,
    open_start,
    resumes_itself,
    start_decisions,
    starting_checkpoint,
)
from trainer.data.mixture_config import nearest, takes_part
from trainer.stages.load_stages import OURS
from trainer.stages.stage import Stage


def replay_problems(stage: Stage, stages: Sequence[Stage]) -> list[str]:
    """What keeps a stage from replaying; of a checkpoint that is still to be made, by the sources' names."""
    config = stage.config
    if not any(source.replay and takes_part(config.data.mixture, source) for source in config.data.sources):
        return []
    if stage.waits:
        return _unread(config, _read_by(stage, stages))
    from trainer.data.replay.opening import replay_problems as problems_of  # brings numpy

    return problems_of(config.data, data_position(config)[0], seed=config.run.seed)


def data_position(config: RunConfig) -> tuple[Mapping[str, Any] | None, int]:
    """The data position that a stage goes on from, None where it begins anew, and its first step."""
    path = starting_checkpoint(config)
    if path is None:
        return None, 0
    opened = open_start(config, path)
    decisions = start_decisions(config, opened, same_run=resumes_itself(config, path))
    state = opened.manifest.state.get("data") if decisions["data"].verdict == "keep" else None
    return state, opened.manifest.step if decisions["step"].verdict == "keep" else 0


def _read_by(stage: Stage, stages: Sequence[Stage]) -> set[str] | None:
    """Sources that will have been read; None where the stage does not keep how far they were."""
    if stage.origin is None:
        state, _ = data_position(stage.config)
        return None if state is None else {one["name"] for one in state.get("sources", ()) if one["tokens"]}
    if decide_start(stage.config, OURS)["data"].verdict != "keep":
        return None
    before = next(one for one in stages if one.name == stage.origin.stage)
    data = before.config.data
    own = {one.name for one in data.sources if one.replay is None and takes_part(data.mixture, one)}
    return own | (_read_by(before, stages) or set())


def _unread(config: RunConfig, read: set[str] | None) -> list[str]:
    """As `past` would say it when the stage begins."""
    from trainer.data.replay.opening import NO_LEDGER  # brings numpy

    problems, data = [], config.data
    for source in data.sources:
        if source.replay is None or not takes_part(data.mixture, source):
            continue
        where = f"data.sources {source.name!r}: "
        if read is None:
            problems.append(where + NO_LEDGER.format(name=source.name))
            continue
        known = read | ({one.name for one in data.sources} if source.replay.refresh_every else set())
        if read.isdisjoint(source.replay.of):
            known = read  # a reservoir begins with what was read before the stage
        problems += [
            f"{where}replay.of: no stage before this one reads source {name!r}{nearest(name, known)}"
            for name in source.replay.of
            if name not in known
        ]
    return problems
