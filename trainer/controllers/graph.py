"""The skill graph by brute force: a short run on each source alone, all from the same start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from parallel.mesh import destroy_mesh
from trainer.config import RunConfig, open_start, resolve, schedule, start_decisions, starting_checkpoint
from trainer.controllers.config import ControllerConfig, Table
from trainer.data.choice import choice_problems
from trainer.data.config import SourceConfig
from trainer.data.mixture_config import MixtureConfig
from trainer.data.transforms.config import TransformConfig
from trainer.loop import train
from trainer.metrics.sink import EvaluationRecord, MetricSink, RunInfo, SinkList, StepRecord
from trainer.stages.anchoring import anchor_of

GRAPH = "graph.json"


def measure_graph(
    config: RunConfig, folder: Path, *, steps: int, watch: Callable[[str], MetricSink] | None = None
) -> Table:
    """A[i][j] = max(0, (L_j(0) - L_j(H)) / L_j(0)) of H = `steps` steps on source i alone.

    i is a source and j a validation set. Every rank calls it, in a process group. The runs start from what
    the run file starts from, not from checkpoints of its own, and have its learning rates. Written to
    FOLDER/graph.json, which `[controller] graph` reads. What the runs leave in FOLDER is removed.

    From Skill-it (Chen et al. 2023, arXiv 2307.14430), where an edge is there if the loss falls.

    Args:
        folder: holds nothing of the same names as the sources.
        watch: makes a sink for the run on a source, on the first rank.

    Raises:
        ValueError: there is nothing to measure, or `folder` is in use.
    """
    if problems := graph_problems(config, folder):
        raise ValueError("\n".join(problems))
    first, length = _start_of(config)
    graph: Table = {}
    for source in measured_sources(config):
        own = _Evaluations()
        sinks = [own] if watch is None or torch.distributed.get_rank() else [own, watch(source.name)]
        train(
            resolve(_alone(config, source, folder, range(first, first + steps), length)), sink=SinkList(sinks)
        )
        destroy_mesh()
        graph[source.name] = relative_drops(own.records[0].losses, own.records[-1].losses)
        torch.distributed.barrier()  # every rank is done with the folder
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(folder / source.name)
    if torch.distributed.get_rank() == 0:
        text = json.dumps(graph, indent=1, ensure_ascii=False)
        (folder / GRAPH).write_text(text + "\n", encoding="utf-8")
    return graph


def measured_sources(config: RunConfig) -> list[SourceConfig]:
    """Sources that a controller may weigh, and that a run can be made of: corpora without `per_batch`."""
    return [one for one in config.data.sources if one.path is not None and one.per_batch is None]


def graph_problems(config: RunConfig, folder: Path) -> list[str]:
    """What keeps the graph from being measured into `folder`; empty when nothing does."""
    problems = []
    if not config.data.validation:
        problems.append(
            "data.validation: no set, and the graph says how far held-out losses fall; add a "
            "[[data.validation]] with name and path"
        )
    measured = measured_sources(config)
    if len(measured) < 2:
        names = ", ".join(one.name for one in measured) or "none"
        problems.append(f"data.sources: a graph needs two or more corpora without per_batch, found {names}")
    taken = [path for one in (*measured, None) if (path := folder / (one.name if one else GRAPH)).exists()]
    if taken:
        problems.append(f"{taken[0]} exists already; remove it, or choose another folder")
    return problems


def relative_drops(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """By validation set, how far the loss has fallen, as a share of what it was; 0 where it has risen."""
    return {name: max(0.0, (loss - after[name]) / loss) for name, loss in before.items()}


def _start_of(config: RunConfig) -> tuple[int, int]:
    """Steps done when the runs begin, and how long their schedule is: as long as the run file's."""
    plan = schedule(config)
    fresh = _without_own(config)
    path = starting_checkpoint(fresh)
    if path is None:
        return 0, plan.length(plan.begin())
    opened = open_start(fresh, path)
    decisions = start_decisions(fresh, opened, same_run=False)
    first = opened.manifest.step if decisions["step"].verdict == "keep" else 0
    anchor = anchor_of(fresh.start, plan, decisions, step=first, state=opened.manifest.state)
    return first, plan.length(anchor)


def _without_own(config: RunConfig) -> RunConfig:
    """The run as if it had no checkpoints of its own."""
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"resume": False})})


def _alone(config: RunConfig, source: SourceConfig, folder: Path, steps: range, length: int) -> RunConfig:
    """The run on one source, without its cap, evaluated at its beginning and its end."""
    plain = {"share": None, "per_batch": None, "max_epochs": None}
    sources = tuple(one.model_copy(update=plain) for one in config.data.sources if one.path is not None)
    data = {
        "sources": sources,
        "mixture": MixtureConfig(weights={one.name: float(one.name == source.name) for one in sources}),
        "transforms": transforms_of(config.data.transforms, sources),
    }
    checkpoint = {"resume": False, "every": steps.stop, "at": (), "keep": 1}
    update = {
        "run": config.run.model_copy(update={"name": source.name, "dir": folder / source.name}),
        "data": config.data.model_copy(update=data),
        "controller": ControllerConfig(),
        "schedule": config.schedule.model_copy(update={"steps": length}),
        "train": config.train.model_copy(update={"steps": steps.stop}),
        "checkpoint": config.checkpoint.model_copy(update=checkpoint),
        "eval": config.eval.model_copy(update={"every": 0, "at_start": True, "dense": False}),
    }
    return config.model_copy(update=update)


def transforms_of(
    transforms: Sequence[TransformConfig], sources: Sequence[SourceConfig]
) -> tuple[TransformConfig, ...]:
    """The transforms as far as they are for these sources: replay, which has none of its own, is left out."""
    found = []
    for one in transforms:
        patterns = one.sources
        if patterns is not None:
            patterns = tuple(text for text in patterns if not choice_problems([text], sources))
        if patterns != ():
            found.append(one.model_copy(update={"sources": patterns}))
    return tuple(found)


class _Evaluations:
    """A sink that keeps the evaluations."""

    def __init__(self) -> None:
        self.records: list[EvaluationRecord] = []

    def start(self, info: RunInfo) -> None: ...

    def step(self, record: StepRecord) -> None: ...

    def event(self, text: str, *, step: int) -> None: ...

    def evaluation(self, record: EvaluationRecord) -> None:
        self.records.append(record)

    def close(self) -> None: ...
