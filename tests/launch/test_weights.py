"""`ratoon weights` as a person meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import trainer.loop  # noqa: F401  # so that ranks are forked warm
from launch.cli import app
from launch.controller_command import show_graph
from tests.data.corpora import ragged, write_tokens
from tests.trainer.forgetting.runs import write_stage
from trainer.stages.load_stages import load_stages

BASE = """
[run]
name = "mixed"

[model]
preset = "tiny"

[data]
sequence_length = 32

[[data.sources]]
name = "prose"
path = "prose"

[[data.sources]]
name = "code"
path = "code"

[[data.validation]]
name = "held-out"
path = "held-out"

[optimizer]
lr = 3e-3

[eval]
every = 2
batches = 1

[train]
global_batch = 4
precision = "fp32"
"""
RUN = f"""{BASE}
steps = 4

[controller]
kind = "skillit"
every = 2
graph = "runs/mixed/graph/graph.json"
"""
STAGES = """
[[stage]]
name = "first"
steps = 2

[[stage]]
name = "second"
steps = 2
start = { policy = "rewarm" }
"""


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("prose", "code", "held-out")):
        write_tokens(Path(name), [[t % 250 for t in one] for one in ragged(60, seed=seed, longest=50)])
    path = Path("run.toml")
    path.write_text(RUN)
    return path


def ratoon(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})


def text_of(result: Result) -> str:
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("arguments", [["weights"], ["weights", "graph"], ["weights", "targets"]])
def test_help_fits_eighty_columns(arguments: list[str]) -> None:
    result = ratoon(*arguments, "--help")
    assert result.exit_code == 0
    assert max(len(line) for line in result.output.splitlines()) <= 80


def test_a_graph_is_measured_where_the_run_file_looks_for_it(run_file: Path) -> None:
    result = ratoon("weights", "graph", run_file, "--steps", 3, "--ranks", 2)
    assert result.exit_code == 0, result.output
    folder = Path("runs/mixed/graph")
    graph = json.loads((folder / "graph.json").read_text())
    assert list(graph) == ["prose", "code"]
    assert all(0 < row["held-out"] < 1 for row in graph.values())
    assert sorted(path.name for path in folder.iterdir()) == ["graph.json", "logs"]
    assert ratoon("check", run_file).exit_code == 0, "its controller reads the graph"
    again = ratoon("weights", "graph", run_file, "--steps", 3)
    assert again.exit_code == 2
    assert "graph.json exists already; remove it, or choose another folder" in text_of(again)


def test_the_graph_of_a_stage_is_measured_from_what_the_stage_starts_from(
    run_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_file.write_text(BASE + STAGES)
    several = ratoon("weights", "graph", run_file, "--steps", 1)
    assert several.exit_code == 2
    assert "run.toml has several stages: choose one with --stage, of first, second" in text_of(several)
    unknown = ratoon("weights", "graph", run_file, "--steps", 1, "--stage", "third")
    assert "--stage third: run.toml has first, second" in text_of(unknown)
    early = ratoon("weights", "graph", run_file, "--steps", 1, "--stage", "second")
    assert early.exit_code == 2
    assert "a checkpoint of stage first that is still to be made" in text_of(early)
    assert not Path("runs").exists()
    assert ratoon("train", run_file).exit_code == 0
    shutil.rmtree(load_stages(run_file)[1].config.run.folder)
    show_graph(run_file, [], stage="second", steps=2, ranks=1, out=None)
    said = capfd.readouterr().out
    assert "on prose alone" in said
    assert "step 4/4" in said, "after the two of the first stage"
    assert "saved" not in said
    assert Path("runs/mixed/second/graph/graph.json").is_file()


def test_a_run_that_fails_leaves_nothing_behind(run_file: Path) -> None:
    write_tokens(Path("code"), [[1, 2, 300, 4] * 40])
    result = ratoon("weights", "graph", run_file, "--steps", 1)
    assert result.exit_code == 1
    assert "holds token id 300" in text_of(result)
    assert [path.name for path in Path("runs/mixed/graph").iterdir()] == ["logs"]


def test_what_cannot_be_measured_is_said_before_anything_starts(run_file: Path) -> None:
    run_file.write_text(RUN.replace('[[data.validation]]\nname = "held-out"\npath = "held-out"\n', ""))
    result = ratoon("weights", "graph", run_file, "--steps", 1, "--set", "eval.every=0")
    assert result.exit_code == 2
    assert "data.validation: no set, and the graph says how far held-out losses fall" in text_of(result)
    assert not Path("runs").exists()


def test_targets_are_fitted_to_the_evaluations_of_a_run(tmp_path: Path) -> None:
    losses = {step: 2.0 + 5.0 * step**-0.5 for step in (1, 2, 4, 8, 16)}
    write_stage(tmp_path / "short", {"prose": losses}, {}, first_step=0, last_step=16)
    result = ratoon("weights", "targets", tmp_path / "short", "--tokens", "1e9")
    assert result.exit_code == 0, result.output
    assert 2.0 <= json.loads((tmp_path / "short" / "targets.json").read_text())["prose"] < 2.2
    assert 'targets.json; in the run file: controller.targets = "' in text_of(result)


def test_targets_of_too_short_a_run_are_refused(tmp_path: Path) -> None:
    write_stage(tmp_path / "short", {"prose": {1: 3.0}}, {}, first_step=0, last_step=1)
    result = ratoon("weights", "targets", tmp_path / "short", "--tokens", "1e9")
    assert result.exit_code == 2
    assert "source 'prose': a curve needs losses at 4 or more" in text_of(result)
    assert not (tmp_path / "short" / "targets.json").exists()
