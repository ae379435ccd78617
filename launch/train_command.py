"""`ratoon train`: check the run file, then start ranks on this machine or join those of a launcher."""

from __future__ import annotations

import logging
import math
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from launch.environment import (
    Environment,
    announce_rank,
    hide_gpus,
    prepare_gpus,
    read_environment,
    threads_per_rank,
)
from launch.errors import USAGE, RankError, user_message
from launch.process_group import start_process_group
from launch.rank_logs import FAILURE, log_path, start_logging
from launch.ranks import run_ranks
from launch.terminal import Terminal
from trainer.config import RunConfig, config_toml, resolve
from trainer.config_problems import report
from trainer.metrics.json_lines import JsonLines
from trainer.metrics.sink import MetricSink, SinkList
from trainer.metrics.tensorboard import TensorBoard
from trainer.stages.check import check_stages, stage_problems
from trainer.stages.history import write_history
from trainer.stages.load_stages import load_stages
from trainer.stages.plan import takeover
from trainer.stages.stage import Stage


def train(run_file: Path, overrides: list[str], *, ranks: int | None = None) -> None:
    """Train as `run_file` says, on `ranks` processes of this machine or on the ranks of torchrun or srun.

    Raises:
        ValueError: before any process starts, with everything that is wrong with the run file.
        RankError: from the first rank that failed.
    """
    environment = read_environment()
    try:
        stages = load_stages(run_file, overrides)
        worlds = [choose_world_size(stage.config, environment, ranks) for stage in stages]
        check_stages(stages, worlds, name=str(run_file))
    except ValueError:
        if environment.rank != 0:
            sys.exit(USAGE)  # the first rank says it for all
        raise
    if environment.launcher != "local":
        join_launcher(partial(_join_stages, stages, environment), stages, environment)
        return
    for stage, world_size in zip(stages, worlds, strict=True):
        if config := _next_config(stage, stages, world_size):
            write_history(stage, takeover(stage, stages))
            start_ranks(config, world_size, gpus=environment.gpus)
            report_forgetting(stages[: stage.number + 1])


def _next_config(stage: Stage, stages: Sequence[Stage], world_size: int) -> RunConfig | None:
    """The resolved configuration of a stage whose turn has come; None of one that is done.

    Raises:
        ValueError: the checkpoint that was waited for does not fit.
    """
    if len(stages) > 1 and stage.is_finished:
        return None
    if problems := stage_problems(stage, stages, world_size):
        raise ValueError(report(f"stage {stage.name}", problems))
    return resolve(stage.config)


def choose_world_size(config: RunConfig, environment: Environment, ranks: int | None) -> int:
    """How many ranks train: the launcher's, else `ranks`, else what fits the GPUs, else one model replica."""
    if environment.launcher != "local":
        if ranks not in (None, environment.world_size):
            raise ValueError(
                f"--ranks {ranks} under {environment.launcher}, which started {environment.world_size}: "
                "leave --ranks out"
            )
        return environment.world_size
    if ranks is not None:
        return ranks
    layout = config.parallel
    smallest = layout.tensor * layout.pipeline * math.lcm(layout.context, layout.expert)
    return max(smallest, environment.gpus // smallest * smallest)


def start_ranks(config: RunConfig, world_size: int, *, gpus: int) -> None:
    """Run a resolved and checked configuration on `world_size` processes of this machine."""
    write_run_folder(config)
    call_ranks(run_rank, (config,), config, world_size, gpus=gpus)


def call_ranks(
    target: Callable[..., None], args: Sequence[Any], config: RunConfig, world_size: int, *, gpus: int
) -> None:
    """Call `target(*args)` on `world_size` processes of this machine, set up for what `config` trains.

    Ranks with a GPU each are spawned, so that this process never touches CUDA; the others are forked from
    this process, which has imported everything by then.

    Args:
        target: of a module's top level; logs in the run folder of `config`.

    Raises:
        RankError: from the first rank that failed.
    """
    before = signal.signal(signal.SIGTERM, _leave)
    gpu = gpus >= world_size
    _announce(world_size, gpus=gpus)
    if gpu:
        prepare_gpus(tensor=config.parallel.tensor, deterministic=config.run.deterministic)
    else:
        hide_gpus()
        _import_once()
    try:
        run_ranks(target, world_size, *args, start_method="spawn" if gpu else "fork")
    except RankError as error:
        error.add_note(f"Its log is {log_path(config.run.folder, error.rank)}")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _announce(world_size: int, *, gpus: int) -> None:
    """Say what starts: the next line takes some seconds."""
    where = "with a GPU each" if gpus >= world_size else "on the CPU"
    if 0 < gpus < world_size:
        where += f", because there is no GPU for each of them ({gpus} here)"
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    Console(stderr=True, highlight=False).print(f"Starting {ranks} {where} ...", style="dim")


def _import_once() -> None:
    """Import what the ranks need, so that they are forked warm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries that miss each other; the run's notes say it once
        import trainer.loop  # noqa: F401


def _leave(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)  # unwinds, and so ends the ranks


def join_launcher(work: Callable[[], None], stages: Sequence[Stage], environment: Environment) -> None:
    """Do the work as one rank among those that torchrun or srun started, set up for these stages.

    Raises:
        RankError: where it fails.
    """
    assert environment.master_address is not None
    assert environment.master_port is not None
    announce_rank(
        environment.rank,
        environment.world_size,
        local_rank=environment.local_rank,
        master=(environment.master_address, environment.master_port),
    )
    device = environment.device
    if device is None:
        hide_gpus()
    else:
        _prepare_gpus(stages)
    start_process_group(
        environment.rank,
        environment.world_size,
        device=device,
        threads=threads_per_rank(environment.local_world_size),
    )
    import torch.distributed as dist

    try:
        work()
    except Exception as error:
        raise RankError(environment.rank, traceback.format_exc(), message=user_message(error)) from None
    dist.destroy_process_group()


def _prepare_gpus(stages: Sequence[Stage]) -> None:
    """For the widest tensor parallelism of the stages: CUDA reads its environment once."""
    configs = [stage.config for stage in stages]
    prepare_gpus(
        tensor=max(config.parallel.tensor for config in configs),
        deterministic=any(config.run.deterministic for config in configs),
    )


def _join_stages(stages: Sequence[Stage], environment: Environment) -> None:
    for stage in stages:
        _join_stage(stage, stages, environment)


def _join_stage(stage: Stage, stages: Sequence[Stage], environment: Environment) -> None:
    import torch.distributed as dist

    from parallel.mesh import destroy_mesh

    dist.barrier()  # the stage before has been written
    if config := _next_config(stage, stages, environment.world_size):
        if environment.rank == 0:
            write_history(stage, takeover(stage, stages))
            write_run_folder(config)
        dist.barrier()
        run_rank(config)
        destroy_mesh()
        if environment.rank == 0:
            report_forgetting(stages[: stage.number + 1])


def report_forgetting(done: Sequence[Stage]) -> None:
    """Write what the stages so far have forgotten, and say it; nothing of a run that began from nothing."""
    if len(done) == 1 and done[0].config.checkpoint.load is None:
        return
    from trainer.forgetting.writing import write_reports

    folders = [(one.name, one.config.run.folder, one.first_step, one.last_step) for one in done]
    tensorboard = done[-1].config.metrics.tensorboard
    found = write_reports(done[-1].run_folder, folders, tensorboard=tensorboard)
    if found is not None:
        console = Console(highlight=False)
        for line in found.lines():
            console.print(line, soft_wrap=True, markup=False)


def write_run_folder(config: RunConfig) -> None:
    """Make the run's folder and save the resolved configuration in it.

    A `config.toml` of an earlier start that differs is kept beside it, numbered.
    """
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.toml"
    text = config_toml(config)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        number = sum(1 for _ in folder.glob("config.*.toml")) + 1
        path.rename(folder / f"config.{number}.toml")
    path.write_text(text, encoding="utf-8")


def run_rank(config: RunConfig) -> None:
    """Train on this rank, whose process group has started."""
    import torch.distributed as dist

    rank, folder = dist.get_rank(), config.run.folder
    console = Console(highlight=False, stderr=rank != 0)
    start_logging(folder, rank=rank, console=console)  # first, for the warnings of what is imported next
    from trainer.loop import train as run_loop

    sink = SinkList(_sinks(config, console) if rank == 0 else ())
    try:
        run_loop(config, sink=sink)
    except BaseException:
        logging.getLogger(FAILURE).error("the run failed", exc_info=True)
        raise
    finally:
        sink.close()


def _sinks(config: RunConfig, console: Console) -> list[MetricSink]:
    """Everything that takes the records of the run; the first rank's."""
    folder = config.run.folder
    sinks: list[MetricSink] = [Terminal(console), JsonLines(folder / "metrics.jsonl")]
    if config.metrics.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard"))
    return sinks
