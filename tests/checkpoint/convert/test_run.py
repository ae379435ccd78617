"""A conversion appears whole or not at all, goes on after a kill, and leaves its source alone."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoint.convert.execute import execute, peak_bytes
from checkpoint.convert.journal import JOURNAL
from checkpoint.convert.run import Conversion, convert, prepare
from checkpoint.folder import remove_leftovers
from checkpoint.verification.diff import diff_checkpoints
from checkpoint.verification.report import verify_checkpoint
from checkpoint.writers.options import WriteOptions
from tests.checkpoint.models import Grid, make_tensors, save_all_ranks

SHARDS = WriteOptions(shard_bytes=4096)
"""So small that there are many output files."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_all_ranks(tmp_path / "run", make_tensors(0), Grid(2, 1, 2))[0]


def stop_after(monkeypatch: pytest.MonkeyPatch, panels: int) -> None:
    """Let the writing of the n-th panel fail, as if the disk were full."""
    real, calls = os.pwrite, iter(range(panels))

    def pwrite(descriptor: int, content: memoryview, at: int) -> int:
        if next(calls, None) is None:
            raise OSError("no space left")
        return real(descriptor, content, at)

    monkeypatch.setattr("checkpoint.convert.execute.os.pwrite", pwrite)


def interrupted(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, panels: int = 20) -> Conversion:
    """A conversion that has stopped in the middle."""
    conversion = prepare(source, "universal", SHARDS)
    with monkeypatch.context() as patch:
        stop_after(patch, panels)
        with pytest.raises(OSError, match="no space left"):
            convert(conversion, target)
    return conversion


def partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial-convert")


def is_same(one: Path, other: Path) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    found = diff_checkpoints(one, other)
    return bool(found) and all(tensor.is_equal for tensor in found)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_every_tensor_arrives_bit_for_bit_and_the_source_stays_as_it_is(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    convert(prepare(source, "universal", SHARDS), tmp_path / "out")
    assert is_same(source, tmp_path / "out")
    assert not verify_checkpoint(tmp_path / "out").errors
    assert contents(source) == before


def test_what_is_whole_has_no_traces_of_its_making(source: Path, tmp_path: Path) -> None:
    convert(prepare(source, "universal", SHARDS), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"COMPLETE", "manifest.json", "model.safetensors.index.json"}
    assert not names & {JOURNAL, "WRITING"}


def test_an_interrupted_conversion_is_not_there_and_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    conversion = interrupted(source, target, monkeypatch)
    assert not target.exists()
    done = convert(conversion, target)
    assert 0 < done.resumed < len(conversion.plan.files)
    kept = conversion.bytes_written - done.bytes_written
    assert kept > 0
    assert is_same(source, target)
    assert not verify_checkpoint(target).errors


def test_a_finished_file_that_was_damaged_since_is_written_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    conversion = interrupted(source, target, monkeypatch)
    finished = (partial(target) / JOURNAL).read_text().count("\n") - 1
    shard = sorted(partial(target).glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert convert(conversion, target).resumed == finished - 1
    assert is_same(source, target)


def test_a_journal_of_another_source_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    interrupted(source, target, monkeypatch)
    other = save_all_ranks(tmp_path / "other", make_tensors(1), Grid(2, 1, 2))[0]
    with pytest.raises(ValueError, match="begun by another conversion"):
        convert(prepare(other, "universal", SHARDS), target)


def test_a_journal_of_other_options_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    interrupted(source, target, monkeypatch)
    with pytest.raises(ValueError, match="begun by another conversion"):
        convert(prepare(source, "universal", WriteOptions(shard_bytes=8192)), target)


def test_a_line_that_a_kill_cut_short_is_not_believed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    conversion = interrupted(source, target, monkeypatch)
    journal = partial(target) / JOURNAL
    finished = journal.read_text().count("\n") - 1
    journal.write_bytes(journal.read_bytes()[:-10])
    assert convert(conversion, target).resumed == finished - 1
    assert is_same(source, target)


def test_two_conversions_do_not_write_into_one_folder(source: Path, tmp_path: Path) -> None:
    folder = partial(tmp_path / "out")
    folder.mkdir()
    with open(folder / JOURNAL, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="being written by another conversion"):
            convert(prepare(source, "universal", SHARDS), tmp_path / "out")


def test_a_live_runs_tidying_lets_a_conversion_into_its_folder_be(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def tidied(*args: object, **options: object) -> object:
        remove_leftovers(source.parent)
        return execute(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("checkpoint.convert.run.execute", tidied)
    target = source.parent / "step-00000100.whole"
    convert(prepare(source, "universal", SHARDS), target)
    assert is_same(source, target)


def test_a_source_that_changes_meanwhile_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def overwritten(*args: object, **options: object) -> object:
        written = execute(*args, **options)  # type: ignore[arg-type]
        os.utime(source / "rank-00001.safetensors")
        return written

    monkeypatch.setattr("checkpoint.convert.run.execute", overwritten)
    with pytest.raises(ValueError, match=r"rank-00001\.safetensors: has been written to since"):
        convert(prepare(source, "universal", SHARDS), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_source_is_not_converted(source: Path, tmp_path: Path, damage: str, verify: bool) -> None:
    file = source / "rank-00002.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"rank-00002\.safetensors"):
        convert(prepare(source, "universal", SHARDS), tmp_path / "out", verify=verify)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_flipped_bit_is_not_converted(source: Path, tmp_path: Path) -> None:
    file = source / "rank-00002.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"rank-00002\.safetensors"):
        convert(prepare(source, "universal", SHARDS), tmp_path / "out")


def test_the_target_must_be_new_and_outside_of_the_source(source: Path, tmp_path: Path) -> None:
    conversion = prepare(source, "universal", SHARDS)
    with pytest.raises(ValueError, match="lies in the source"):
        convert(conversion, source / "universal")
    with pytest.raises(ValueError, match="is there already"):
        convert(conversion, source.parent)


def test_a_full_disk_is_noticed_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("checkpoint.convert.run.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="1000 are free"):
        convert(prepare(source, "universal", SHARDS), tmp_path / "out")


def test_what_the_disk_gives_back_otherwise_is_refused_and_written_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion = prepare(source, "universal", SHARDS)

    def flipped(*args: object, **options: object) -> object:
        written = execute(*args, **options)  # type: ignore[arg-type]
        shard = sorted(partial(tmp_path / "out").glob("*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        return written

    with monkeypatch.context() as patch:
        patch.setattr("checkpoint.convert.run.execute", flipped)
        with pytest.raises(ValueError, match="1 regions do not read as they were written"):
            convert(conversion, tmp_path / "out")
    assert convert(conversion, tmp_path / "out").resumed == len(conversion.plan.files) - 1
    assert is_same(source, tmp_path / "out")


def test_memory_does_not_grow_with_the_threads() -> None:
    assert peak_bytes(4) <= 128e6
    assert peak_bytes(64) <= peak_bytes(4)


SLOW = """
import sys, time
from pathlib import Path
from checkpoint.convert import gather
from checkpoint.convert.run import convert, prepare
from checkpoint.writers.options import WriteOptions
real = gather.Gatherer.fill
def fill(self, panel, into):
    time.sleep(0.02)
    return real(self, panel, into)
gather.Gatherer.fill = fill
convert(prepare(Path(sys.argv[1]), "universal", WriteOptions(shard_bytes=4096)), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_any_moment_it_goes_on(source: Path, tmp_path: Path, how: signal.Signals) -> None:
    target = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW, source, target], stderr=subprocess.DEVNULL)
    journal = partial(target) / JOURNAL
    deadline = time.monotonic() + 30
    while not journal.exists() or journal.read_text().count("\n") < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    assert process.wait(timeout=10) != 0
    assert not target.exists()
    done = convert(prepare(source, "universal", SHARDS), target)
    assert done.resumed >= 3
    assert is_same(source, target)
