"""`ratoon weights`: measure the skill graph, and fit the targets of Velocitune."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.environment import read_environment
from launch.errors import USAGE
from launch.rank_logs import start_logging
from launch.terminal import Terminal
from launch.train_command import call_ranks, choose_world_size, join_launcher
from trainer.config import RunConfig
from trainer.config_problems import report
from trainer.controllers.config import ControllerConfig
from trainer.metrics.sink import EvaluationRecord, RunInfo
from trainer.stages.check import stage_problems
from trainer.stages.load_stages import load_stages
from trainer.stages.stage import Stage

T = TypeVar("T")


def show_graph(
    run_file: Path,
    overrides: Sequence[str],
    *,
    stage: str | None,
    steps: int,
    ranks: int | None,
    out: Path | None,
) -> None:
    """Measure the skill graph of a run file, or of one of its stages, print it and say where it is.

    Raises:
        ValueError: before any process starts, with everything that is wrong.
        RankError: from the first rank that failed.
    """
    environment = read_environment()
    try:
        stages = load_stages(run_file, overrides)
        chosen = choose_stage({one.name: one for one in stages}, stage, str(run_file))
        chosen = _without_controller(chosen)
        world_size = choose_world_size(chosen.config, environment, ranks)
        folder = out or chosen.config.run.folder / "graph"
        if problems := _problems(chosen, stages, world_size, folder):
            raise ValueError(report(str(run_file), problems))
    except ValueError:
        if environment.rank != 0:
            sys.exit(USAGE)  # the first rank says it for all
        raise
    arguments = (chosen.config, folder, steps)
    if environment.launcher != "local":
        join_launcher(partial(_measure, *arguments), [chosen], environment)
    else:
        with _tidying(chosen.config, folder):
            call_ranks(
                _measure, arguments, _logging_in(chosen.config, folder), world_size, gpus=environment.gpus
            )


def _without_controller(stage: Stage) -> Stage:
    """The runs have none, and its graph may be what is to be measured."""
    return dataclasses.replace(
        stage, config=stage.config.model_copy(update={"controller": ControllerConfig()})
    )


def _problems(stage: Stage, stages: Sequence[Stage], world_size: int, folder: Path) -> list[str]:
    from trainer.controllers.graph import graph_problems  # brings torch, which no wrong key needs

    if stage.waits:
        assert stage.origin is not None
        return [
            f"stage {stage.name} starts from a checkpoint of stage {stage.origin.stage} that is still to be "
            "made: run ratoon train until it is there"
        ]
    return stage_problems(stage, stages, world_size) + graph_problems(stage.config, folder)


def choose_stage(stages: Mapping[str, T], name: str | None, where: str) -> T:
    """The stage of this name; the only one where none is given.

    Raises:
        ValueError: there is no such stage, or there are several to choose from.
    """
    if name is None and len(stages) == 1:
        return next(iter(stages.values()))
    if name is None:
        raise ValueError(f"{where} has several stages: choose one with --stage, of {', '.join(stages)}")
    if name not in stages:
        raise ValueError(f"--stage {name}: {where} has {', '.join(stages)}")
    return stages[name]


@contextmanager
def _tidying(config: RunConfig, folder: Path) -> Iterator[None]:
    """Leave nothing of the runs, none of which was there before, where one fails or is interrupted."""
    from trainer.controllers.graph import measured_sources

    try:
        yield
    finally:
        for source in measured_sources(config):
            shutil.rmtree(folder / source.name, ignore_errors=True)


def _logging_in(config: RunConfig, folder: Path) -> RunConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": folder})})


def _measure(config: RunConfig, folder: Path, steps: int) -> None:
    """On every rank."""
    import torch.distributed as dist

    rank = dist.get_rank()
    console = Console(highlight=False, stderr=rank != 0)
    start_logging(folder, rank=rank, console=console)
    from trainer.controllers.graph import GRAPH, measure_graph

    graph = measure_graph(config, folder, steps=steps, watch=lambda source: _Brief(console, source))
    if rank == 0:
        console.print(graph_table(graph))
        _say_written(console, folder / GRAPH, "graph")


class _Brief(Terminal):
    """Says no more of a run than its source and the steps."""

    def __init__(self, console: Console, source: str) -> None:
        super().__init__(console)
        self._source = source

    def start(self, info: RunInfo) -> None:
        """Begin, without notes."""
        super().start(dataclasses.replace(info, name=f"on {self._source} alone", parameters=0, notes=()))

    def event(self, text: str, *, step: int) -> None:
        """Nothing that happens matters."""

    def evaluation(self, record: EvaluationRecord) -> None:
        """The graph says what came of it."""


def graph_table(graph: Mapping[str, Mapping[str, float]]) -> Table:
    """Rows of sources and columns of validation sets, in percent."""
    table = Table(title="how far training on a source lowers a held-out loss", title_justify="left")
    table.add_column("on", overflow="fold")
    for name in next(iter(graph.values())):
        table.add_column(Text(name), justify="right", overflow="fold")
    for source, row in graph.items():
        table.add_row(Text(source), *(f"{drop:.2%}" for drop in row.values()))
    return table


def show_targets(run: Path, tokens: float, *, stage: str | None, out: Path | None) -> None:
    """Fit the targets of a run's folder, or of one of its stages, print them and say where they are.

    Raises:
        ValueError: there is no such run or stage, or it has too few evaluations.
    """
    from trainer.controllers.targets import fit_targets
    from trainer.forgetting.curves import find_stages

    found = choose_stage({one.name: one for one in find_stages(run)}, stage, str(run))
    output = out or found.folder / "targets.json"
    if not output.parent.is_dir():
        raise ValueError(f"--out {output}: the folder {output.parent} does not exist; make it first")
    targets = fit_targets(found.folder, tokens, output)
    console = Console(highlight=False)
    table = Table(title=f"held-out losses after {tokens:,.0f} tokens, in nats", title_justify="left")
    table.add_column("source", overflow="fold")
    table.add_column("target", justify="right")
    for source, loss in targets.items():
        table.add_row(Text(source), f"{loss:.4f}")
    console.print(table)
    _say_written(console, output, "targets")


def _say_written(console: Console, path: Path, key: str) -> None:
    console.print(
        Text(f'wrote {path}; in the run file: controller.{key} = "{path}"', "green"), soft_wrap=True
    )
