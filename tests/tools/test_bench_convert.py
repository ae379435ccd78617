"""The benchmark of conversions measures what it says, and can miss its targets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench_convert.__main__ import Target, main
from tools.bench_convert.contest import Program, compete, timed


def test_targets_are_met_or_missed() -> None:
    assert Target("ratio", 3.1, 3.0, at_least=True).is_met
    assert not Target("ratio", 2.9, 3.0, at_least=True).is_met
    assert Target("memory", 255.0, 256.0).is_met
    assert not Target("memory", 257.0, 256.0).is_met


def test_time_and_memory_are_those_of_the_program() -> None:
    busy = "import time; held = b'x' * 100_000_000; time.sleep(0.3)"
    seconds, anonymous = timed((sys.executable, "-c", busy))
    assert 0.3 <= seconds < 10
    assert 100e6 <= anonymous < 200e6


def test_a_program_that_fails_has_no_time() -> None:
    with pytest.raises(RuntimeError, match="ended with 3"):
        timed((sys.executable, "-c", "raise SystemExit(3)"))


def test_all_take_as_many_turns_on_a_target_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(b"content")
    target = tmp_path / "target"
    programs = [Program(name, ("cp", "-rT", str(tmp_path / "source"), str(target)), target) for name in "abc"]
    found = compete(programs, tmp_path / "source", 2, cold=False)
    assert {name: len(turns.seconds) for name, turns in found.items()} == {"a": 2, "b": 2, "c": 2}
    assert not target.exists()


@pytest.mark.long
def test_it_runs_from_beginning_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--gb", "0.01", "--rounds", "1", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert "ds_to_universal / ours" in said
    assert "time / same layout" in said


def test_it_explains_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench_convert", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--gb" in done.stdout
