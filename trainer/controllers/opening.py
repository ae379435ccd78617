"""From `[controller]` to a controller, and what is wrong with the section before a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from trainer.controllers.config import ControllerConfig
from trainer.controllers.plugin import Plugin, find_factory
from trainer.controllers.protocol import MixtureController
from trainer.controllers.raise_replay import RaiseReplay
from trainer.controllers.skillit import SkillIt
from trainer.controllers.tables import read_graph, read_targets
from trainer.controllers.timetable import Timetable, read_log, table_of
from trainer.controllers.velocitune import Velocitune
from trainer.data.config import DataConfig
from trainer.data.mixture_config import nearest, own_weight

T = TypeVar("T")


def open_controller(
    config: ControllerConfig,
    data: DataConfig,
    *,
    first_step: int,
    last_step: int,
    state: Mapping[str, Any] | None = None,
) -> MixtureController:
    """The controller of a stage of these steps.

    Args:
        state: what its `state` returned; None at the beginning of a stage.

    Raises:
        ValueError: a file that it needs is not there or wrong.
    """
    sources, alone = [source.name for source in data.sources], left_alone(config, data)
    sets = held_out_sets(config, data)
    match config.kind:
        case "velocitune":
            targets = _but(alone, read_targets(config.targets or {}))
            return Velocitune(targets, sets, eta=config.eta, loss=config.loss, state=state)
        case "skillit":
            graph = _but(alone, read_graph(config.graph or {}))
            held_out = {entry.name for entry in data.validation}
            names = dict.fromkeys(column for row in graph.values() for column in row)
            columns = {name: name if name in held_out else sets[name] for name in names}
            return SkillIt(
                graph,
                columns,
                eta=config.eta,
                eta_decay=config.eta_decay,
                window=config.window,
                state=state,
            )
        case "raise_replay":
            return RaiseReplay(
                config.watch,
                config.replay,
                tolerance=config.tolerance,
                factor=config.factor,
                limit=config.limit,
                alone=alone,
                state=state,
            )
        case "schedule":
            table = table_of(config.points, sources, first_step=first_step, last_step=last_step)
            return Timetable(table, interpolate=config.interpolate)
        case "replay_log":
            assert config.log is not None, "checked by ControllerConfig"
            return Timetable(read_log(config.log, sources))
        case _:
            assert config.plugin is not None, "checked by ControllerConfig"
            past = state.get("plugin") if state is not None else None
            return Plugin(config.plugin, config.options, sources, timeout=config.timeout, state=past)


def left_alone(config: ControllerConfig, data: DataConfig) -> tuple[str, ...]:
    """The sources whose part of a batch no controller changes: `frozen`, and those with `per_batch`."""
    fixed = [source.name for source in data.sources if source.per_batch is not None]
    return tuple(dict.fromkeys([*config.frozen, *fixed]))


def held_out_sets(config: ControllerConfig, data: DataConfig) -> dict[str, str]:
    """By source, the validation set that its held-out loss is read from; sources without one are left out."""
    found: dict[str, str] = {}
    for entry in data.validation:
        found.setdefault(entry.source or entry.name, entry.name)
    return found | config.validation


def controller_problems(config: ControllerConfig, data: DataConfig, *, eval_every: int) -> list[str]:
    """What is wrong with `[controller]` that the section alone does not show; empty when nothing is."""
    if config.kind is None:
        return []
    problems = _unknown_names(config, data)
    if config.reads_evaluations and config.every is not None:
        if eval_every == 0:
            problems.append(
                f"controller.kind = {config.kind} reads held-out losses, and eval.every is 0: evaluate every "
                f"{config.every} steps"
            )
        elif config.every % eval_every:
            problems.append(
                f"controller.every = {config.every} is not a multiple of eval.every = {eval_every}: it would "
                "decide by losses of earlier steps; make it one"
            )
    if problems:
        return problems
    try:
        problems = _own_problems(config, data)
        if not problems:
            open_controller(config, data, first_step=0, last_step=10**9)  # reads its files
    except ValueError as error:
        return [str(error)]
    return problems


def _unknown_names(config: ControllerConfig, data: DataConfig) -> list[str]:
    sources = [source.name for source in data.sources]
    sets = [entry.name for entry in data.validation]
    inside: list[tuple[str, Sequence[str], list[str]]] = [
        ("frozen", config.frozen, sources),
        ("validation", list(config.validation), sources),
        ("validation", list(config.validation.values()), sets),
        ("replay", config.replay, sources),
        ("watch", config.watch, sets),
    ]
    return [
        f"controller.{key}: no {'source' if known is sources else 'validation set'} is named "
        f"{name!r}{nearest(name, known)}"
        for key, names, known in inside
        for name in names
        if name not in known
    ]


def _own_problems(config: ControllerConfig, data: DataConfig) -> list[str]:
    """Of the numbers that a kind works with."""
    sources = [source.name for source in data.sources]
    alone = left_alone(config, data)
    free = [name for name in sources if name not in alone]
    sets = held_out_sets(config, data)
    problems = _fixed_problems(config, data)
    if config.kind == "velocitune":
        targets = read_targets(config.targets or {})
        problems += _uncovered("targets", targets, sources, free)
        if config.loss == "validation":
            problems += [
                f"controller.validation: source {name!r} has no validation set; add one, name one here, set "
                'loss = "training", or freeze the source'
                for name in free
                if name not in sets
            ]
    elif config.kind == "skillit":
        graph = read_graph(config.graph or {})
        problems += _uncovered("graph", graph, sources, free)
        columns = dict.fromkeys(column for row in graph.values() for column in row)
        known = [*sets, *(entry.name for entry in data.validation)]
        problems += [
            f"controller.graph: column {name!r} is no validation set and no source that has one"
            f"{nearest(name, known)}"
            for name in columns
            if name not in known
        ]
    elif config.kind == "plugin":
        assert config.plugin is not None, "checked by ControllerConfig"
        find_factory(config.plugin)
    elif config.kind == "raise_replay":
        problems += _replay_problems(config, data, free)
    if not free:
        problems.append(
            "controller.frozen: all sources are in it or have per_batch, so there is nothing to change"
        )
    return problems


def _fixed_problems(config: ControllerConfig, data: DataConfig) -> list[str]:
    """Sources with `per_batch` that the section would change."""
    named = {"replay": config.replay, "points": [name for one in config.points for name in one.weights]}
    return [
        f"controller.{key}: source {source.name!r} has per_batch = {source.per_batch}, which no controller "
        "changes; give it a share or a weight instead, or leave it out here"
        for key, names in named.items()
        for source in data.sources
        if source.per_batch is not None and source.name in names
    ]


def _replay_problems(config: ControllerConfig, data: DataConfig, free: Sequence[str]) -> list[str]:
    chosen = [source for source in data.sources if source.name in config.replay]
    if not set(free) - set(config.replay):
        return ["controller.replay: has all sources; leave out what the stage is to learn"]
    if not any(own_weight(data.mixture, source) for source in chosen):
        return [
            f"controller.replay: {', '.join(config.replay)} have weight 0, which multiplied stays 0; give "
            "one a small weight"
        ]
    return []


def _uncovered(key: str, found: Mapping[str, Any], sources: list[str], free: list[str]) -> list[str]:
    problems = [
        f"controller.{key}: no source is named {name!r}{nearest(name, sources)}"
        for name in found
        if name not in sources
    ]
    return problems + [
        f"controller.{key}: source {name!r} is missing; give it one or add it to controller.frozen"
        for name in free
        if name not in found
    ]


def _but(frozen: Sequence[str], found: Mapping[str, T]) -> dict[str, T]:
    return {name: one for name, one in found.items() if name not in frozen}
