"""Run one function on N ranks of this machine, forked from a parent that has already imported everything.

Fork costs milliseconds a rank once the parent is warm; spawn imports torch and megatron-core again in each
(tens of seconds on a laptop). CUDA cannot be used after a fork of an initialised parent, so ranks that will
use GPUs are spawned unless the parent has kept its hands off CUDA. Ranks use GPUs where there is one for
each of them, and see none otherwise.

No rank outlives its parent: Ctrl-C reaches the parent only, which ends them, and where the parent itself is
killed the kernel ends them (Linux).
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from launch.environment import announce_rank, count_gpus, hide_gpus, threads_per_rank
from launch.errors import RankError, user_message
from launch.process_group import start_process_group

_GRACE = 0.5  # seconds in which other failures may still turn out to be the earlier ones
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STDERR = 2  # sys.stderr may be an object without a file descriptor


@dataclass(frozen=True)
class _Place:
    """Where a rank belongs; crosses the process boundary."""

    rank: int
    world_size: int
    store: str
    parent: int
    gpu: bool


@dataclass(frozen=True)
class _Failure:
    rank: int
    time: float  # time.monotonic(), which the processes of one machine share
    report: str
    message: str | None = None  # what a user should read instead of the traceback
    died: bool = False  # without a word: killed, or crashed in native code

    def error(self) -> RankError:
        return RankError(self.rank, self.report, message=self.message)


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
        start_method: "fork", or "spawn" for ranks that use GPUs; `target` is then a module-level function.

    Raises:
        RankError: when a rank raises, dies or the deadline passes. The other ranks are ended.
    """
    context = multiprocessing.get_context(start_method)
    gpu = count_gpus() >= world_size
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="ratoon-ranks-") as folder:
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                place = _Place(rank, world_size, os.path.join(folder, "store"), os.getpid(), gpu)
                process = context.Process(  # type: ignore[attr-defined]
                    target=_rank_main, args=(sender, place, target, args), daemon=False
                )
                process.start()
                sender.close()
                processes.append(process)
                pipes.append(receiver)
            return _collect(processes, pipes, deadline)
        finally:
            _end(processes)


def _rank_main(sender: Connection, place: _Place, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _live_and_die_with_parent(place.parent)
    gc.freeze()  # what the parent had imported stays: no collection has to walk, and so to copy, its pages
    answer: _Failure | bytes
    try:
        joined = _join(place)
        answer = pickle.dumps(target(*args))
    except BaseException as error:
        answer = _Failure(place.rank, time.monotonic(), traceback.format_exc(), user_message(error))
    sender.send(answer)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(answer, _Failure):
        os._exit(1)  # no collective may run after a failure: the peers are not there for it
    import torch.distributed as dist

    if dist.is_initialized():
        joined()
        dist.destroy_process_group()


def _live_and_die_with_parent(parent: int) -> None:
    faulthandler.enable(file=_STDERR)
    faulthandler.register(signal.SIGUSR1, file=_STDERR, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to all; the parent answers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)


def _join(place: _Place) -> Callable[[], None]:
    """Start the process group; return what waits until all ranks have.

    A rank that ends closes its connections, and one that is still connecting would fail at that.
    """
    announce_rank(place.rank, place.world_size, local_rank=place.rank)
    if not place.gpu:
        hide_gpus()
    import torch.distributed as dist

    store = dist.FileStore(place.store, place.world_size)  # type: ignore[attr-defined]
    start_process_group(
        place.rank,
        place.world_size,
        device=place.rank if place.gpu else None,
        threads=threads_per_rank(place.world_size),
        store=store,
    )
    store.set(f"joined-{place.rank}", "")
    return lambda: store.wait([f"joined-{rank}" for rank in range(place.world_size)])


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
            rank = waiting.pop(pipe)
            answer = _receive(pipe, rank, processes[rank])
            if isinstance(answer, _Failure):
                raise _first_failure(answer, waiting, processes).error()
            results[rank] = pickle.loads(answer)
    return [results[rank] for rank in range(len(processes))]


def _receive(pipe: Connection, rank: int, process: BaseProcess) -> _Failure | bytes:
    now = time.monotonic()
    try:
        answer: _Failure | bytes = pipe.recv()
    except (EOFError, OSError):
        process.join(5)
        report = f"the process died without a report ({_ending(process.exitcode)})"
        return _Failure(rank, now, report, died=True)
    return answer


def _first_failure(
    found: _Failure, waiting: dict[Connection, int], processes: Sequence[BaseProcess]
) -> _Failure:
    """The failure that caused the others, which are mostly ranks that lost a peer in a collective.

    A process that died without a report comes before any that could still complain; else the earliest.
    """
    failures = [found]
    ends = time.monotonic() + _GRACE
    while waiting and (ready := wait(list(waiting), timeout=max(0.0, ends - time.monotonic()))):
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            answer = _receive(pipe, rank, processes[rank])
            if isinstance(answer, _Failure):
                failures.append(answer)
    return min(failures, key=lambda failure: (not failure.died, failure.time))


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"{name}; the system may have run out of memory" if name == "SIGKILL" else name
    return f"exit code {exitcode}"


def _dump_stacks(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.1)  # one after the other: they share one stderr


def _end(processes: Sequence[BaseProcess]) -> None:
    """Join ranks that finish by themselves within a moment; kill the rest."""
    ends = time.monotonic() + (0.0 if sys.exc_info()[0] is not None else 10.0)
    for process in processes:
        process.join(max(0.0, ends - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()
