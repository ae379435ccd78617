"""Which checkpoints stay: the last, every m-th, those of other runs, those that are being read."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from checkpoint.folder import COMPLETE, find_latest, list_complete
from checkpoint.load import load
from checkpoint.save import Saver
from tests.checkpoint.models import Grid, assert_equal, empty_slices, make_tensors, slices_of

ONE = Grid()


def save(saver: Saver, step: int, seed: int = 0) -> None:
    saver.save(step, slices_of(make_tensors(seed), ONE, 0), {"seed": seed})
    saver.wait()


def steps(folder: Path) -> list[int]:
    return sorted(entry.step for entry in list_complete(folder))


def test_the_last_are_kept_and_every_mth(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=2, keep_every=300)
    for step in range(100, 1000, 100):
        save(saver, step)
    assert steps(tmp_path) == [300, 600, 800, 900]


def test_the_newest_is_the_last_saved_even_after_going_back(tmp_path: Path) -> None:
    """Steps 300 and 400 belong to an attempt that was given up: the run goes on from 200."""
    saver = Saver(tmp_path, keep_last=3)
    for step in (200, 300, 400):
        save(saver, step)
    save(saver, 250)
    assert steps(tmp_path) == [250, 300, 400]
    latest = find_latest(tmp_path)
    assert latest is not None
    assert latest.name == "step-00000250"


def test_a_new_run_in_the_same_folder_removes_nothing_of_the_first(tmp_path: Path) -> None:
    first = Saver(tmp_path, keep_last=2)
    for step in (100, 200):
        save(first, step)
    second = Saver(tmp_path, keep_last=1)
    for step in (100, 250, 350):
        save(second, step, seed=1)
    names = sorted(os.listdir(tmp_path))
    assert [name[:18] for name in names] == [
        "step-00000100.kept",
        "step-00000200",
        "step-00000350",
    ]
    kept = empty_slices(make_tensors(0), ONE, 0)
    load(tmp_path / names[0], kept, verify="full")
    assert_equal(kept, slices_of(make_tensors(0), ONE, 0))


def test_what_a_new_run_finds_half_replaced_stays(tmp_path: Path) -> None:
    """The first run was killed between renaming its step 100 and completing the new one."""
    save(Saver(tmp_path), 100)
    half = tmp_path / "step-00000100.replaced-x-1"
    (tmp_path / "step-00000100").rename(half)
    second = Saver(tmp_path, keep_last=1)
    for step in (100, 200):
        save(second, step)
    assert sorted(os.listdir(tmp_path)) == [half.name, "step-00000200"]


def test_a_run_that_goes_on_removes_what_it_saved_before(tmp_path: Path) -> None:
    save(Saver(tmp_path, keep_last=1), 100)
    loaded = load(tmp_path, empty_slices(make_tensors(0), ONE, 0))
    save(Saver(tmp_path, keep_last=1, run_id=loaded.run_id), 200)
    again = load(tmp_path, empty_slices(make_tensors(0), ONE, 0))
    assert (again.run_id, steps(tmp_path)) == (loaded.run_id, [200])


def test_retention_leaves_a_copy_with_a_name_of_its_own(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=1)
    save(saver, 100)
    shutil.copytree(tmp_path / "step-00000100", tmp_path / "step-00000100.best")
    for step in (200, 300):
        save(saver, step)
    assert sorted(os.listdir(tmp_path)) == ["step-00000100.best", "step-00000300"]


def test_a_checkpoint_that_is_being_read_stays(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=1)
    save(saver, 100)
    with open(tmp_path / "step-00000100" / COMPLETE, "rb") as marker:
        fcntl.flock(marker, fcntl.LOCK_SH)
        save(saver, 200)
        assert steps(tmp_path) == [100, 200]
    save(saver, 300)
    assert steps(tmp_path) == [300]


def flock_of_nfs(file: IO[bytes], operation: int) -> None:
    """Byte-range locks underneath: exclusive ones need a descriptor that may write."""
    mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
    if operation & fcntl.LOCK_EX and mode == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    fcntl.lockf(file, operation)


def flock_of_lustre(file: IO[bytes], operation: int) -> None:
    """Mounted without the option "flock"."""
    raise OSError(errno.ENOSYS, "Function not implemented")


@pytest.mark.parametrize("flock", [flock_of_nfs, flock_of_lustre])
def test_old_ones_are_removed_on_file_systems_with_other_locks(
    flock: Callable[[IO[bytes], int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", flock)
    saver = Saver(tmp_path, keep_last=1)
    for step in (100, 200, 300):
        save(saver, step)
    load(tmp_path, empty_slices(make_tensors(0), ONE, 0))
    assert os.listdir(tmp_path) == ["step-00000300"]


def test_incomplete_folders_do_not_count(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=1)
    save(saver, 100)
    (tmp_path / "step-00000900.partial-dead-1").mkdir()
    (tmp_path / "step-00000800").mkdir()
    assert steps(tmp_path) == [100]
    save(saver, 200)
    assert steps(tmp_path) == [200]


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_every": 0}])
def test_retention_that_would_keep_nothing_is_refused(options: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="both must be at least 1"):
        Saver(tmp_path, **options)
