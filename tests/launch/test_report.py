"""`ratoon report forgetting` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launch.cli import app
from tests.trainer.forgetting.runs import write_run, write_stage


def ratoon(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})


def text_of(result: Result) -> str:
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "bare")
    write_run(folder / "replay", peak=2.15)
    return folder


def test_one_run_is_reported_from_its_metrics(folder: Path) -> None:
    result = ratoon("report", "forgetting", folder / "bare")
    assert result.exit_code == 0, result.output
    assert "stage code: prose rose by 0.41 at step 104, back by step 180" in result.output
    assert json.loads((folder / "bare" / "forgetting.json").read_text())["run"] == "bare"
    assert (folder / "bare" / "forgetting.png").is_file()


def test_two_runs_are_put_side_by_side(folder: Path) -> None:
    out = folder / "both" / "curves.png"
    result = ratoon("report", "forgetting", folder / "bare", folder / "replay", "--out", out)
    assert result.exit_code == 0, result.output
    assert "prose forgotten 0.250 0.250" in text_of(result)
    assert "prose rose by 0.20 at step 102" in result.output
    assert out.read_bytes().startswith(b"\x89PNG")


def test_runs_of_the_same_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "bare")
    result = ratoon("report", "forgetting", folder / "bare", tmp_path / "bare")
    assert result.exit_code == 0, result.output
    assert (folder / "bare" / "forgetting-comparison.png").is_file()
    lines = [line.strip() for line in result.output.splitlines()]
    assert str(folder / "bare") in lines
    assert str(tmp_path / "bare") in lines


def test_what_is_no_run_is_one_clear_error(tmp_path: Path) -> None:
    result = ratoon("report", "forgetting", tmp_path)
    assert result.exit_code == 2
    assert "expected the folder of a run" in text_of(result)


def test_a_run_without_evaluations_is_one_clear_error(tmp_path: Path) -> None:
    write_stage(tmp_path, {}, {}, first_step=0, last_step=3)
    result = ratoon("report", "forgetting", tmp_path)
    assert result.exit_code == 2
    assert "no evaluation after its first step" in text_of(result)


def test_a_comparison_of_one_run_is_refused(folder: Path) -> None:
    result = ratoon("report", "forgetting", folder / "bare", "--out", "x.png")
    assert result.exit_code == 2
    assert "compares runs" in text_of(result)
