"""Saving in the background: what a failure does, what is kept, what is asked of the caller."""

from __future__ import annotations

import errno
import functools
import gc
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from checkpoint.attempt import Attempt, SaveError
from checkpoint.folder import COMPLETE, find_latest, list_complete, read_manifest
from checkpoint.load import load
from checkpoint.save import Saver
from tests.checkpoint.models import Grid, assert_equal, empty_slices, make_tensors, slices_of
from tests.ranks import run_ranks

ONE = Grid()


def save(saver: Saver, step: int, seed: int = 0) -> None:
    saver.save(step, slices_of(make_tensors(seed), ONE, 0), {"seed": seed})
    saver.wait()


def steps(folder: Path) -> list[int]:
    return sorted(entry.step for entry in list_complete(folder))


def save_with_a_full_disk(folder: str, full_rank: int) -> tuple[str, str, int]:
    """One rank may not write more than 4 kB into a file from the second save on."""
    rank, grid = dist.get_rank(), Grid(1, 1, 3)
    saver = Saver(folder, rank=rank, world_size=3)
    saver.save(100, slices_of(make_tensors(0), grid, rank), {})
    saver.wait()
    if rank == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    saver.save(200, slices_of(make_tensors(1), grid, rank), {})
    message = ""
    ends = time.monotonic() + 30
    while not message and time.monotonic() < ends:
        try:
            saver.poll()
        except SaveError as error:
            message = str(error)
        time.sleep(0.01)
    assert saver.poll() is None, "the error is raised once"
    latest = str(find_latest(folder))
    if rank == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    saver.save(300, slices_of(make_tensors(2), grid, rank), {})
    saver.close()
    return message, latest, len(os.listdir(folder))


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_write_error_on_one_rank_is_raised_on_all_and_names_it(full_rank: int, tmp_path: Path) -> None:
    for message, latest, entries in run_ranks(save_with_a_full_disk, 3, str(tmp_path), full_rank):
        assert f"saving step 200 failed on rank {full_rank}: OSError" in message
        assert "File too large" in message
        assert latest.endswith("step-00000100"), "the one before is untouched"
        assert entries == 2, "the next save works, and removes what the failed one left"


def save_slices_that_overlap(folder: str) -> str:
    """Both ranks believe that they alone hold the whole model."""
    saver = Saver(folder, rank=dist.get_rank(), world_size=2)
    slices = slices_of(make_tensors(0), ONE, 0)
    for piece in slices:
        object.__setattr__(piece, "replicas", (dist.get_rank(),))
    saver.save(100, slices, {})
    with pytest.raises(SaveError) as caught:
        saver.close()
    return str(caught.value)


def test_slices_that_do_not_cover_exactly_once_are_not_saved(tmp_path: Path) -> None:
    for message in run_ranks(save_slices_that_overlap, 2, str(tmp_path)):
        assert "model.norm.weight (weight): overlap: 2 pieces hold element [0]" in message
        assert "rank-00000.safetensors [0:24], rank-00001.safetensors [0:24]" in message
    assert find_latest(tmp_path) is None


def save_with_a_rank_that_cannot(folder: str) -> str:
    """Rank 1 fails before it has copied anything."""
    rank, grid = dist.get_rank(), Grid(1, 1, 2)
    saver = Saver(folder, rank=rank, world_size=2)
    slices = slices_of(make_tensors(0), grid, rank)
    if rank == 1:
        object.__setattr__(slices[0], "replicas", (0,))
    try:
        saver.save(100, slices, {})
        saver.close()
    except (SaveError, AssertionError) as error:
        return str(error)
    return "saved"


def test_a_rank_that_fails_before_writing_tells_the_others(tmp_path: Path) -> None:
    first, second = run_ranks(save_with_a_rank_that_cannot, 2, str(tmp_path))
    assert "rank 1 is not among its holders" in second
    assert first.startswith("saving step 100 failed on rank 1: AssertionError")


def save_through_faults(folder: str, victim: int, num_operations: int) -> list[str]:
    """In the n-th folder, the victim's n-th change to the file system fails: once, as if out of space."""
    rank, grid, messages = dist.get_rank(), Grid(1, 1, 2), []
    originals = {name: getattr(os, name) for name in ("mkdir", "write", "fsync", "rename")}
    for operation in range(num_operations):
        saver = Saver(Path(folder) / str(operation), rank=rank, world_size=2)
        tensors = make_tensors(0, shapes={"embed": (12, 6), "norm": (6,)})
        saver.save(100, slices_of(tensors, grid, rank), {})
        saver.wait()
        saver.save(100, slices_of(tensors, grid, rank), {})
        saver.wait()
        left = operation

        def fail(name: str, *args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return originals[name](*args, **kwargs)

        for name in originals:
            setattr(os, name, functools.partial(fail, name) if rank == victim else originals[name])
        saver.save(100, slices_of(tensors, grid, rank), {})
        try:
            saver.close()
            messages.append("")
        except SaveError as error:
            messages.append(str(error))
        for name in originals:
            setattr(os, name, originals[name])
        slices = empty_slices(tensors, grid, rank)
        load(saver.folder, slices, verify="full")
        assert_equal(slices, slices_of(tensors, grid, rank))
    return messages


@pytest.mark.parametrize(("victim", "num_operations"), [(0, 26), (1, 18)])
def test_a_fault_at_any_operation_is_heard_by_all_and_costs_no_checkpoint(
    victim: int, num_operations: int, tmp_path: Path
) -> None:
    heard = run_ranks(save_through_faults, 2, str(tmp_path), victim, num_operations)
    failures = [message for message in heard[victim] if message]
    differ = [(a, b) for a, b in zip(*heard, strict=True) if a != b]
    assert len(differ) <= 1, "only syncing the marker fails when the others have seen it already"
    assert all(a and not b for a, b in differ)
    assert len(failures) > 10
    assert all(f"failed on rank {victim}: OSError: [Errno 28]" in message for message in failures)


def save_again_after_a_marker_that_failed(folder: str) -> str:
    """Step 100 has its name but no marker; the next save of it reaches rank 1 before rank 0 has tidied up."""
    rank, grid = dist.get_rank(), Grid(1, 1, 2)
    saver = Saver(folder, rank=rank, world_size=2)
    rename = os.rename

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == COMPLETE:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    os.rename = fail
    saver.save(100, slices_of(make_tensors(0), grid, rank), {})
    with pytest.raises(SaveError, match="Input/output error"):
        saver.wait()
    os.rename = rename
    dist.barrier()
    if rank == 0:
        time.sleep(0.3)
    saver.save(100, slices_of(make_tensors(1), grid, rank), {})
    saver.close()
    return str(find_latest(folder))


def test_an_earlier_attempts_failure_is_not_this_ones(tmp_path: Path) -> None:
    latest = str(tmp_path / "step-00000100")
    assert run_ranks(save_again_after_a_marker_that_failed, 2, str(tmp_path)) == [latest, latest]
    assert not list(tmp_path.glob("*/FAILED*"))


@pytest.mark.parametrize("rank", [1, 500, 999])
def test_of_a_thousand_ranks_each_looks_rarely(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 minutes of waiting for rank 0, on a clock that only sleeping moves."""
    now = 0.0
    looks = 0
    exists = Path.exists

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def counting(path: Path) -> bool:
        nonlocal looks
        looks += 1
        return exists(path)

    monkeypatch.setattr("checkpoint.attempt.time.monotonic", lambda: now)
    monkeypatch.setattr("checkpoint.attempt.time.sleep", sleep)
    monkeypatch.setattr(Path, "exists", counting)
    attempt = Attempt(tmp_path, 100, "key", "run", rank, 1000, 600.0)
    with pytest.raises(SaveError, match="waited 600 s"), attempt.entered():
        pass
    operations = 2 * looks  # a look at WRITING comes with one at FAILED
    assert 1000 * operations / now < 500, "a second, of all ranks"


def save_without_the_others(folder: str) -> str:
    saver = Saver(folder, rank=dist.get_rank(), world_size=3)
    saver.deadline_seconds = 2.0
    if dist.get_rank() == 2:
        return "absent"
    saver.save(100, slices_of(make_tensors(0), Grid(1, 1, 3), dist.get_rank()), {})
    with pytest.raises(SaveError) as caught:
        saver.close()
    return str(caught.value)


def test_a_silent_rank_is_named_after_the_deadline(tmp_path: Path) -> None:
    first, second, _ = run_ranks(save_without_the_others, 3, str(tmp_path))
    assert "for rank 2 (do all ranks share the folder" in first
    assert "saving step 100 failed" in second


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    save(saver, 100, seed=0)
    save(saver, 100, seed=1)
    slices = empty_slices(make_tensors(0), ONE, 0)
    assert load(tmp_path, slices).state["seed"] == 1
    assert_equal(slices, slices_of(make_tensors(1), ONE, 0))
    assert os.listdir(tmp_path) == ["step-00000100"]


def test_training_may_go_on_while_it_is_saved(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    slices = slices_of(make_tensors(0), ONE, 0)
    state = {"data": {"position": [3]}}
    saver.save(100, slices, state)
    for piece in slices:
        piece.data.fill_(0)
    state["data"]["position"][0] = 4
    saved = saver.close()
    assert saved is not None
    assert (saved.step, saved.path) == (100, tmp_path / "step-00000100")
    found = empty_slices(make_tensors(0), ONE, 0)
    assert load(saved.path, found).state["data"] == {"position": [3]}
    assert_equal(found, slices_of(make_tensors(0), ONE, 0))


def test_saving_beside_training_leaves_the_collector_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turned off, it would be off for the training thread too."""
    calls: list[str] = []
    monkeypatch.setattr(gc, "disable", lambda: calls.append(threading.current_thread().name))
    save(Saver(tmp_path), 100)
    assert calls == []
    read_manifest(tmp_path)
    assert calls == ["MainThread"]


def test_the_next_save_waits_for_the_one_before(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=9)
    slices = slices_of(make_tensors(0), ONE, 0)
    for step in range(1, 6):
        saver.save(step, slices, {})
    saver.close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_foreground_saves_are_complete_on_return(tmp_path: Path) -> None:
    saver = Saver(tmp_path, background=False)
    saver.save(100, slices_of(make_tensors(0), ONE, 0), {})
    assert steps(tmp_path) == [100]
    saved = saver.poll()
    assert saved is not None
    assert saved.stall_seconds >= saved.write_seconds
    assert saver.poll() is None


def test_state_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        Saver(tmp_path).save(1, [], {"config": object()})


def test_versions_are_recorded(tmp_path: Path) -> None:
    save(Saver(tmp_path), 100)
    _, manifest = read_manifest(tmp_path)
    assert {"torch", "megatron-core", "numpy"} <= set(manifest.state["versions"])
