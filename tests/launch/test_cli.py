"""The command line as a person meets it: fast help, clean errors, exit codes, eighty columns."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launch.cli import app
from tests.data.corpora import write_tokens
from tests.trainer.test_config import GOOD

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_tokens(tmp_path / "prose", [[1, 2, 3]])
    path = Path("run.toml")
    path.write_text(GOOD.format(path="prose"))
    return path


def ratoon(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})


def text_of(result: Result) -> str:
    """Output with the panel's borders and line breaks gone."""
    return " ".join(result.output.replace("│", " ").split())


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['ratoon', '--help']\n"
        "from launch.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end\n"
        "heavy = {'torch', 'megatron', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    seconds = []
    for _ in range(3):
        start = os.times()
        subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        end = os.times()  # of the processor: a busy machine has clocks of its own
        seconds.append(end.children_user - start.children_user + end.children_system - start.children_system)
    assert min(seconds) < 0.7, seconds


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["check", "-h"], ["data", "--help"]])
def test_help_fits_eighty_columns(arguments: list[str]) -> None:
    result = ratoon(*arguments)
    assert result.exit_code == 0
    assert "Usage: ratoon" in result.output or "Usage: root" in result.output
    assert max(len(line) for line in result.output.splitlines()) <= 80


def test_help_names_every_command() -> None:
    lines = ratoon("--help").output.splitlines()
    names = ("train", "check", "data", "checkpoint")
    assert [name for name in names if any(line.startswith(f"│ {name} ") for line in lines)] == list(names)


def test_version() -> None:
    result = ratoon("--version")
    assert (result.exit_code, result.output.split()[0]) == (0, "ratoon")


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["trian", "run.toml"], "'train'"),
        (["train", "run.toml", "--rank", "2"], "--ranks"),
        (["data", "prepear"], "'prepare'"),
    ],
)
def test_wrong_usage_suggests_the_right_one(arguments: list[str], suggestion: str) -> None:
    result = ratoon(*arguments)
    assert result.exit_code == 2
    assert suggestion in text_of(result)


def test_check_shows_the_run_in_eighty_columns(run_file: Path) -> None:
    result = ratoon("check", "run.toml", "--ranks", "4", "--set", "parallel.tensor=2")
    assert result.exit_code == 0, result.output
    for part in ("num_layers = 4", "TP2 PP1 DP2", "164k", "20 steps, 20.5k tokens", "4 ranks"):
        assert part in result.output
    assert max(len(line) for line in result.output.splitlines()) <= 80
    assert not Path("runs").exists()


def test_check_plans_for_more_gpus_than_there_are_here(run_file: Path) -> None:
    big = ["model.preset=llama-3-8b", "parallel.tensor=8", "parallel.pipeline=4", "train.global_batch=256"]
    settings = [part for override in big for part in ("--set", override)]
    result = ratoon("check", "run.toml", "--ranks", "1024", *settings)
    assert result.exit_code == 0, result.output
    assert "8.03B" in result.output
    assert "1,024 ranks with a GPU each" in text_of(result)


@pytest.mark.parametrize("command", ["check", "train"])
def test_every_problem_of_a_run_file_in_one_panel(run_file: Path, command: str) -> None:
    result = ratoon(command, "run.toml", "--set", "train.stesp=3", "--set", "train.steps=x")
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert "run.toml: 2 problems" in text_of(result)
    assert "did you mean train.steps?" in text_of(result)
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_layout_that_does_not_fit_starts_nothing(run_file: Path, command: str) -> None:
    result = ratoon(command, "run.toml", "--ranks", "3", "--set", "parallel.tensor=2")
    assert result.exit_code == 2
    assert "does not divide 3 ranks" in text_of(result)
    assert not Path("runs").exists()


def test_a_value_error_from_a_library_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.setattr("launch.check_command.load_stages", lambda *_: json.loads("no json"))
    result = ratoon("check", "run.toml")
    assert isinstance(result.exception, json.JSONDecodeError)


def test_ranks_cannot_be_chosen_under_torchrun(run_file: Path) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    result = CliRunner().invoke(app, ["train", "run.toml", "--ranks", "4"], env=environment)
    assert result.exit_code == 2
    assert "leave --ranks out" in text_of(result)


def test_only_the_first_rank_of_a_launcher_reports_a_wrong_run_file(run_file: Path) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    result = CliRunner().invoke(app, ["train", "run.toml", "--set", "train.stesp=1"], env=environment)
    assert (result.exit_code, result.output) == (2, "")


def test_python_dash_m_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "--version"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout.startswith("ratoon ")
    assert os.linesep not in done.stdout.strip()
