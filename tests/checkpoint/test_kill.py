"""kill -9 at every point of a save: what is left is a whole checkpoint, or is not taken for one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from checkpoint.folder import find_latest, list_unfinished, writing
from checkpoint.load import load
from checkpoint.save import Saver
from launch.errors import RankError
from tests.checkpoint.models import Grid, assert_equal, empty_slices, make_tensors, slices_of
from tests.ranks import run_ranks

SHAPES = {"embed": (12, 6), "norm": (6,)}


def tensors(seed: int) -> dict[tuple[str, str], Any]:
    return make_tensors(seed, shapes=SHAPES)


def die_at(operation: int) -> None:
    """Kill this process right before its n-th change to the file system."""
    left = operation

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    for name in ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"):
        setattr(os, name, wrap(getattr(os, name)))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that exists: hundreds of saves, each with its fsyncs."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def save_then_die(folder: Path, second_step: int, operation: int) -> None:
    saver = Saver(folder, keep_last=1, run_id="run")
    saver.save(100, slices_of(tensors(0), Grid(), 0), {})
    saver.wait()
    die_at(operation)
    saver.save(second_step, slices_of(tensors(1), Grid(), 0), {})
    saver.wait()
    os._exit(0)


def save_while_one_dies(folder: str, victim: int, operation: int) -> str:
    """Both ranks save step 100; then `victim` dies in the middle of saving step 200."""
    rank = dist.get_rank()
    saver = Saver(folder, rank=rank, world_size=2)
    saver.save(100, slices_of(tensors(0), Grid(2), rank), {})
    saver.wait()
    if rank == victim:
        die_at(operation)
    saver.save(200, slices_of(tensors(1), Grid(2), rank), {})
    saver.wait()
    return "saved"


def restore(folder: str) -> int:
    """Load the newest, continue with a save of step 300, and report the step that was loaded."""
    rank = dist.get_rank()
    slices = empty_slices(tensors(0), Grid(1, 1, 2), rank)
    state = load(folder, slices, verify="full")
    assert_equal(slices, slices_of(tensors(0 if state.step == 100 else 1), Grid(1, 1, 2), rank))
    saver = Saver(folder, rank=rank, world_size=2, keep_last=1, run_id=state.run_id)
    saver.save(300, slices, {})
    saver.close()
    return state.step


def child(target: Callable[..., Any], *args: Any) -> int:
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize("second_step", [200, 100], ids=["another step", "the same step"])
def test_one_rank_killed_at_every_operation(second_step: int, folder: Path) -> None:
    outcomes = []
    for operation in range(200):
        run = folder / str(operation)
        exit_code = child(save_then_die, run, second_step, operation)
        latest = find_latest(run)
        assert latest is not None, f"after operation {operation}"
        slices = empty_slices(tensors(0), Grid(), 0)
        state = load(latest, slices, verify="full")
        pairs = zip(slices, slices_of(tensors(1), Grid(), 0), strict=True)
        new = any(bool((s.data == e.data).all()) for s, e in pairs)
        assert_equal(slices, slices_of(tensors(int(new)), Grid(), 0))
        assert state.step == (second_step if new else 100)
        outcomes.append(new)
        for path in list_unfinished(run):
            os.utime(path, (0, 0))  # a folder without a lock is given some seconds to get it
        next_one = Saver(run, keep_last=1, background=False, run_id="run")
        next_one.save(300, slices_of(tensors(2), Grid(), 0), {})
        assert list_unfinished(run) == []
        assert sorted(os.listdir(run)) == ["step-00000300"], f"after operation {operation}"
        if exit_code == 0:
            break
    assert exit_code == 0
    assert outcomes == sorted(outcomes), "once the new checkpoint counts, it stays"
    assert outcomes.count(False) > 10
    assert outcomes.count(True) > 1


@pytest.mark.parametrize(("victim", "operation"), [(0, 0), (0, 7), (0, 17), (0, 24), (1, 0), (1, 3), (1, 9)])
def test_one_of_two_ranks_killed(victim: int, operation: int, folder: Path) -> None:
    with pytest.raises(RankError, match=f"rank {victim} failed"):
        run_ranks(save_while_one_dies, 2, str(folder), victim, operation)
    latest = find_latest(folder)
    assert latest is not None
    for path in list_unfinished(folder):
        os.utime(path, (0, 0))
    assert set(run_ranks(restore, 2, str(folder))) == {200 if latest.name == "step-00000200" else 100}
    assert os.listdir(folder) == ["step-00000300"]


def test_a_live_save_of_another_run_is_left_alone(folder: Path) -> None:
    """Its rank 0 holds the lock: cleaning up passes it by."""
    alive = folder / "step-00000100.partial-other-1"
    alive.mkdir(parents=True)
    os.utime(alive, (0, 0))
    with writing(alive):
        Saver(folder, background=False).save(200, slices_of(tensors(0), Grid(), 0), {})
        assert [path.name for path in list_unfinished(folder)] == [alive.name]
    Saver(folder, background=False).save(300, slices_of(tensors(0), Grid(), 0), {})
    assert list_unfinished(folder) == []
