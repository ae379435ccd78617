"""The skill graph by brute force: a short run on each source alone, all from the same checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from parallel.mesh import destroy_mesh
from trainer.config import RunConfig, open_start, resolve, start_decisions, starting_checkpoint
from trainer.controllers.config import ControllerConfig, Table
from trainer.data.mixture_config import MixtureConfig
from trainer.loop import train
from trainer.metrics.sink import EvaluationRecord, RunInfo, StepRecord


def measure_graph(config: RunConfig, folder: Path, *, steps: int) -> Table:
    """A[i][j] = max(0, (L_j(0) - L_j(H)) / L_j(0)) of H = `steps` steps on source i alone.

    i is a source and j a validation set. Every rank calls it, in a process group. The runs start from what
    the run file starts from, with its learning rates. Written to FOLDER/graph.json, which
    `[controller] graph` reads; the runs lie beside it.

    From Skill-it (Chen et al. 2023, arXiv 2307.14430), where an edge is there if the loss falls.
    """
    first = _first_step(config)
    graph: Table = {}
    for source in config.data.sources:
        sink = _Evaluations()
        train(resolve(_alone(config, source.name, folder, first + steps)), sink=sink)
        destroy_mesh()
        graph[source.name] = relative_drops(sink.records[0].losses, sink.records[-1].losses)
    if torch.distributed.get_rank() == 0:
        text = json.dumps(graph, indent=1, ensure_ascii=False)
        (folder / "graph.json").write_text(text + "\n", encoding="utf-8")
    return graph


def relative_drops(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """By validation set, how far the loss has fallen, as a share of what it was; 0 where it has risen."""
    return {name: max(0.0, (loss - after[name]) / loss) for name, loss in before.items()}


def _first_step(config: RunConfig) -> int:
    """Steps done when the runs begin."""
    if config.checkpoint.load is None:
        return 0
    fresh = _without_own(config)
    path = starting_checkpoint(fresh)
    assert path is not None, "checkpoint.load says where"
    opened = open_start(fresh, path)
    kept = start_decisions(fresh, opened, same_run=False)["step"].verdict == "keep"
    return opened.manifest.step if kept else 0


def _without_own(config: RunConfig) -> RunConfig:
    """The run as if it had no checkpoints of its own."""
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"resume": False})})


def _alone(config: RunConfig, source: str, folder: Path, last_step: int) -> RunConfig:
    """The run on one source, evaluated at its beginning and its end."""
    shares = {one.name: float(one.name == source) for one in config.data.sources}
    config = _without_own(config)
    update = {
        "run": config.run.model_copy(update={"name": source, "dir": folder / source}),
        "data": config.data.model_copy(update={"mixture": MixtureConfig(weights=shares)}),
        "controller": ControllerConfig(),
        "train": config.train.model_copy(update={"steps": last_step}),
        "eval": config.eval.model_copy(update={"every": 0, "at_start": True, "dense": False}),
    }
    return config.model_copy(update=update)


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
