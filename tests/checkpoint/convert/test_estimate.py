"""A dry run says how long it will take, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.convert.estimate import estimate_seconds, read_speed, write_speed
from checkpoint.convert.run import prepare
from checkpoint.writers.options import WriteOptions
from tests.checkpoint.models import Grid, make_tensors, save_all_ranks


def test_time_is_that_of_reading_and_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint.convert.estimate.read_speed", lambda file, start: 1000.0)
    monkeypatch.setattr("checkpoint.convert.estimate.write_speed", lambda folder: 500.0)
    source = save_all_ranks(tmp_path / "run", make_tensors(0), Grid(2, 1, 2))[0]
    conversion = prepare(source, "universal", WriteOptions())
    wanted = conversion.bytes_read / 1000 + conversion.bytes_written / 500
    assert conversion.bytes_read < conversion.bytes_written  # headers
    assert estimate_seconds(conversion, tmp_path / "out") == pytest.approx(wanted)


def test_an_index_takes_no_time(tmp_path: Path) -> None:
    source = save_all_ranks(tmp_path / "run", make_tensors(0), Grid())[0]
    assert estimate_seconds(prepare(source, "index", WriteOptions()), tmp_path / "out") == 0


def test_speeds_are_measured_without_a_trace(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1000))
    assert 0 < read_speed(file, 10) < 1e12
    assert 0 < write_speed(tmp_path / "not" / "there") < 1e12
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
