"""Run one function on N ranks of this machine, forked from a parent that has already imported everything.

Fork costs milliseconds a rank once the parent is warm; spawn imports torch and megatron-core again in each
(tens of seconds on a laptop). CUDA cannot be used after a fork of an initialised parent, so ranks that will
use GPUs are spawned unless the parent has kept its hands off CUDA.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any


class RankError(RuntimeError):
    """The first rank that failed, with its traceback."""

    def __init__(self, rank: int, report: str) -> None:
        super().__init__(f"rank {rank} failed:\n{report}")
        self.rank = rank


def run_ranks(
    target: Callable[..., Any],
    world_size: int,
    *args: Any,
    deadline: float | None = None,
    start_method: str = "fork",
) -> list[Any]:
    """Call `target(*args)` on `world_size` processes with torch.distributed initialised; return each result.

    Args:
        deadline: seconds after which the ranks are killed and RankError is raised; None waits for ever.

    Raises:
        RankError: when a rank raises, dies or the deadline passes. The other ranks are ended.
    """
    context = multiprocessing.get_context(start_method)
    with tempfile.TemporaryDirectory(prefix="ratoon-ranks-") as folder:
        store = os.path.join(folder, "store")
        processes: list[BaseProcess] = []
        pipes: list[Connection] = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(  # type: ignore[attr-defined]
                target=_rank_main, args=(sender, store, rank, world_size, target, args), daemon=False
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        try:
            return _collect(processes, pipes, deadline)
        finally:
            _end(processes)


def _rank_main(
    sender: Connection,
    store: str,
    rank: int,
    world_size: int,
    target: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    try:
        use_cuda = torch.cuda.is_available() and torch.cuda.device_count() >= world_size
        if use_cuda:
            torch.cuda.set_device(rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if use_cuda else "gloo",
            store=dist.FileStore(store, world_size),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world_size,
        )
        result = (True, pickle.dumps(target(*args)))
    except BaseException:
        result = (False, traceback.format_exc().encode())
    sender.send(result)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    if not result[0]:
        os._exit(1)  # no collective may run after a failure: the peers are not there for it
    if dist.is_initialized():
        dist.destroy_process_group()


def _collect(
    processes: Sequence[BaseProcess], pipes: Sequence[Connection], deadline: float | None
) -> list[Any]:
    results: dict[int, Any] = {}
    ends = None if deadline is None else time.monotonic() + deadline
    while len(results) < len(processes):
        waiting = {pipes[rank]: rank for rank in range(len(pipes)) if rank not in results}
        remaining = None if ends is None else max(0.0, ends - time.monotonic())
        ready = wait(list(waiting), timeout=remaining)
        if not ready:
            _dump_stacks([processes[rank] for rank in waiting.values()])
            missing = sorted(waiting.values())
            raise RankError(missing[0], f"no answer from ranks {missing} within {deadline} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            results[rank] = _receive(pipe, rank, processes[rank])
    return [results[rank] for rank in range(len(processes))]


def _receive(pipe: Connection, rank: int, process: BaseProcess) -> Any:
    try:
        succeeded, payload = pipe.recv()
    except EOFError:
        process.join(5)
        raise RankError(rank, f"the process died without a report (exit code {process.exitcode})") from None
    if not succeeded:
        raise RankError(rank, payload.decode())
    return pickle.loads(payload)


def _dump_stacks(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.1)  # one after the other: they share one stderr


def _end(processes: Sequence[BaseProcess]) -> None:
    """Join ranks that finish by themselves within a moment; kill the rest."""
    ends = time.monotonic() + (1.0 if any(p.exitcode for p in processes) else 10.0)
    if sys.exc_info()[0] is not None:
        ends = time.monotonic()
    for process in processes:
        process.join(max(0.0, ends - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
