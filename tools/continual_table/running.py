"""Run the arms: each is a run file, trained as `ratoon train` does it, on one rank; two at a time."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from launch.environment import hide_gpus
from tools.continual_table.arm import Arm
from tools.continual_table.bed import Bed, Values
from trainer.config import RunConfig
from trainer.run_file import to_toml

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Cost:
    """What an arm took, in seconds.

    Attributes:
        cpu: of the process with all its threads, user and system.
    """

    wall: float
    cpu: float


Done = Callable[[Bed, Arm, Cost], None]


def run_all(work: Sequence[tuple[Bed, Arm]], *, processes: int = 2, done: Done) -> None:
    """Run every arm, as soon as what it needs is done; `done` is told of each.

    What one arm raises is raised here, once those that are running have come to their end.
    """
    hide_gpus()
    _import_once()
    waiting = list(work)
    finished: set[tuple[int, str]] = set()
    running: dict[Future[Cost], tuple[Bed, Arm]] = {}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), initializer=_begin) as pool:
        try:
            while waiting or running:
                for entry in [one for one in waiting if _is_ready(one, finished)][: processes - len(running)]:
                    waiting.remove(entry)
                    running[pool.submit(run_arm, *entry)] = entry
                assert running, f"nothing is ready of {[arm.name for _, arm in waiting]}"
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    bed, arm = running.pop(future)
                    done(bed, arm, future.result())
                    finished.add((bed.seed, arm.name))
        finally:
            pool.shutdown(cancel_futures=True)


def _is_ready(entry: tuple[Bed, Arm], finished: set[tuple[int, str]]) -> bool:
    bed, arm = entry
    return all((bed.seed, name) in finished for name in arm.needs)


def run_arm(bed: Bed, arm: Arm) -> Cost:
    """Prepare and run one arm in this process, which has a process group."""
    began, cpu = time.monotonic(), time.process_time()
    if arm.prepare is not None:
        arm.prepare(bed)
    run(bed.folder / f"{arm.name}.toml", arm.values)
    return Cost(time.monotonic() - began, time.process_time() - cpu)


def run(path: Path, values: Values) -> None:
    """Write the run file and train its stages one after the other.

    Raises:
        ValueError: with all that is wrong with it.
    """
    from launch.train_command import write_run_folder
    from parallel.mesh import destroy_mesh
    from trainer.config import resolve
    from trainer.loop import train
    from trainer.metrics.json_lines import JsonLines
    from trainer.stages.check import check_stages
    from trainer.stages.load_stages import load_stages

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_toml(values), encoding="utf-8")
    stages = load_stages(path)
    check_stages(stages, [1] * len(stages), name=str(path))
    for stage in stages:
        config = resolve(stage.config)
        write_run_folder(config)
        sink = JsonLines(config.run.folder / "metrics.jsonl")
        try:
            train(config, sink=sink)
        finally:
            sink.close()
            destroy_mesh()


def configuration(path: Path, values: Values) -> RunConfig:
    """The run file, written and read back."""
    from trainer.config import parse_config
    from trainer.run_file import read_run_file

    path.write_text(to_toml(values), encoding="utf-8")
    return parse_config(read_run_file(path))


def _import_once() -> None:
    """Import what the arms need, so that the workers are forked warm."""
    import torch

    torch.set_num_threads(1)  # forked workers would wait for ever for OpenMP's threads of their parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import launch.train_command  # noqa: F401
        import trainer.loop  # noqa: F401


def _begin() -> None:
    """Make this worker a run's only rank. It ends with its parent."""
    import torch.distributed as dist

    from launch.process_group import start_process_group

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to all; the parent answers
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    store = dist.HashStore()  # type: ignore[attr-defined]
    start_process_group(0, 1, device=None, threads=1, store=store)
