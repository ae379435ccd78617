"""Local ranks: which failure is reported, and that none outlives its parent."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch.ranks import RankError, run_ranks

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0


def rank_and_sum(addend: int) -> tuple[int, float]:
    total = torch.ones(1)
    dist.all_reduce(total)
    return dist.get_rank(), total.item() + addend


def fail_on_two() -> None:
    if dist.get_rank() == 2:
        raise KeyError("the cause")
    dist.barrier()  # the others fail as well, in here, because their peer is gone


def kill_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleep(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)


def test_results_come_in_the_order_of_ranks() -> None:
    assert run_ranks(rank_and_sum, 3, 10, deadline=DEADLINE) == [(0, 13.0), (1, 13.0), (2, 13.0)]


def test_ranks_that_end_at_once_fail_nobody_who_is_still_connecting() -> None:
    for _ in range(6):  # it is a race
        assert run_ranks(os.getppid, 6, deadline=DEADLINE) == [os.getpid()] * 6


def test_the_failure_that_caused_the_others_is_reported() -> None:
    for _ in range(5):  # the order in which the ranks notice varies
        with pytest.raises(RankError, match=r"rank 2 failed(.|\n)*KeyError: 'the cause'"):
            run_ranks(fail_on_two, 4, deadline=DEADLINE)


def test_a_killed_rank_is_named_with_its_signal() -> None:
    with pytest.raises(RankError, match=r"rank 1 failed(.|\n)*SIGKILL"):
        run_ranks(kill_one, 3, deadline=DEADLINE)


def test_the_deadline_ends_ranks_that_hang(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="no answer from ranks"):
        run_ranks(sleep, 2, str(tmp_path), deadline=2.0)
    assert_gone(pids_in(tmp_path, 2))


def test_what_was_imported_before_the_fork_is_left_to_no_collection() -> None:
    assert run_ranks(gc.get_freeze_count, 2) == [pytest.approx(len(gc.get_objects()), rel=0.2)] * 2


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_no_rank_outlives_its_parent(tmp_path: Path, end: signal.Signals) -> None:
    program = (
        "from tests.launch.test_ranks import sleep; from launch.ranks import run_ranks\n"
        f"run_ranks(sleep, 2, {str(tmp_path)!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    pids = pids_in(tmp_path, 2)
    parent.send_signal(end)
    parent.wait(20)
    assert_gone(pids)


def pids_in(folder: Path, count: int) -> list[int]:
    """The processes that have reported, once there are `count`."""
    ends = time.monotonic() + DEADLINE
    while len(found := [int(path.name) for path in folder.iterdir()]) < count:
        assert time.monotonic() < ends, f"{len(found)} of {count} ranks came up"
        time.sleep(0.05)
    return found


def assert_gone(pids: list[int]) -> None:
    ends = time.monotonic() + 10
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < ends, f"{alive} still run"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """A zombie that nobody has reaped yet does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
