"""`ratoon checkpoint convert | reshard | diff | parity`, as users type them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from launch.checkpoint_cli import EXAMPLES, app
from launch.conversion import ending_in_a_message
from launch.errors import INTERRUPTED
from tests.foreign.huggingface import save
from tests.foreign.oracle import Oracle

ORACLE = Oracle(hidden=64, vocab=263)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), ORACLE)


def run(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "80"})
    assert result.exit_code == exit_code, result.output
    return " ".join(result.output.replace("│", " ").split())


def test_convert_says_what_it_wrote(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "universal"
    assert "Ratoon universal" in run("convert", str(source), str(target), "--to", "universal")
    assert (target / "model.safetensors").is_file()
    assert "equal" in run("diff", str(source), str(target))


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "universal"
    text = run("convert", str(source), str(target), "--to", "universal", "--dry-run", "--json")
    facts = json.loads(text)
    assert facts["bytes_written"] == pytest.approx(4 * 335_000, rel=0.05)
    assert {"files", "bytes_read", "peak_memory", "seconds", "lost"} <= facts.keys()
    assert not target.exists()


def test_what_would_be_lost_is_refused_until_it_is_dropped(source: Path, tmp_path: Path) -> None:
    from tests.foreign.megatron_model import Run
    from tests.foreign.native import save as save_native

    own = save_native(tmp_path / "own", Oracle(hidden=64, vocab=263, precision="bf16"), Run())
    arguments = ("convert", str(own), str(tmp_path / "hf"), "--to", "huggingface")
    words = run(*arguments, exit_code=2)
    assert "exp_avg of 39 parameters" in words
    assert "--drop" in words
    assert "dropped: master of 39 parameters" in run(*arguments, "--drop")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--to", "gguf"], "'gguf' is none of universal, index"),
        (["--to", "ranks"], "'ranks' is none of universal, index"),
        (["--to", "universal", "--states", "momentum"], "no such state"),
        (["--to", "universal", "--spec", "nowhere.toml"], "nowhere.toml"),
        (["--to", "universal", "--fact", "vocab"], "NAME=N"),
    ],
)
def test_wrong_usage_is_one_message(source: Path, more: list[str], words: str, tmp_path: Path) -> None:
    assert words in run("convert", str(source), str(tmp_path / "out"), *more, exit_code=2)


def test_a_target_that_is_there_is_not_touched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    words = run("convert", str(source), str(tmp_path), "--to", "index", exit_code=2)
    assert "is there already" in words
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_reshard_writes_a_file_for_each_rank(source: Path, tmp_path: Path) -> None:
    run("reshard", str(source), str(tmp_path / "cut"), "--layout", "tensor=2,pipeline=2")
    assert len(list((tmp_path / "cut").glob("rank-*.safetensors"))) == 4
    words = run("reshard", str(source), str(tmp_path / "cut2"), "--layout", "tensr=2", exit_code=2)
    assert "tensr" in words
    assert "tensor=2,pipeline=2" in words


def test_diff_tells_two_models_apart(source: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", Oracle(hidden=64, vocab=263, tied=True))
    words = run("diff", str(source), str(other), exit_code=1)
    assert "lm_head.weight" in words
    assert "only in A" in words
    found = json.loads(run("diff", str(source), str(other), "--json", exit_code=1))
    assert {one["name"] for one in found if one["verdict"] == "only in A"} == {"lm_head.weight"}


def test_parity_on_a_layout(source: Path) -> None:
    program = [sys.executable, "-m", "launch.cli", "checkpoint", "parity", str(source), str(source), "--json"]
    done = subprocess.run([*program, "--layout", "tensor=2"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["same"] is True
    assert report["first"] is None
    assert "UserWarning" not in done.stderr  # of libraries that megatron-core misses


def test_parity_refuses_a_layout_that_the_model_has_not(source: Path) -> None:
    words = run("parity", str(source), str(source), "--layout", "tensor=3", exit_code=2)
    assert "--layout does not fit this model" in words
    assert "num_attention_heads" in words


@pytest.mark.parametrize("command", EXAMPLES, ids=lambda command: command.__name__)
def test_examples_in_the_help_are_ones_that_the_command_takes(command: Callable[..., None]) -> None:
    group = typer.main.get_command(app)
    for example in EXAMPLES[command]:
        assert f"ratoon checkpoint {example}" in run(command.__name__, "--help")
        name, *arguments = shlex.split(example)
        group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["reshard", "parity"])
def test_help_keeps_what_stands_in_brackets(command: str) -> None:
    assert "Degrees of [parallel]" in run(command, "--help")


def test_help_breaks_lines_by_the_width_of_the_terminal() -> None:
    lines = CliRunner().invoke(app, ["verify", "--help"], env={"COLUMNS": "80"}).output.splitlines()
    assert any("weights, finite numbers" in line for line in lines)
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["written", "dry"])
def test_a_target_that_cannot_be_made_is_one_message(source: Path, more: list[str]) -> None:
    words = run("convert", str(source), "/proc/nowhere/x", "--to", "universal", *more, exit_code=1)
    assert "Not converted" in words
    assert "Traceback" not in words


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new.partial-convert").mkdir()
    with pytest.raises(typer.Exit) as stopped, ending_in_a_message(tmp_path / "new"):
        raise KeyboardInterrupt
    assert stopped.value.exit_code == INTERRUPTED
    assert "The same command goes on" in capsys.readouterr().err


def test_only_what_was_checked_is_said_to_be(source: Path, tmp_path: Path) -> None:
    arguments = ("convert", str(source), str(tmp_path / "index"), "--to", "index")
    assert "source checked before" not in run(*arguments, "--no-verify")


def test_diff_gives_a_name_a_line_of_its_own(source: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", Oracle(hidden=64, vocab=263, tied=True))
    arguments = ["diff", str(source), str(other), "--all"]
    lines = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"}).output.splitlines()
    at = lines.index("model.layers.0.post_attention_layernorm.weight")
    assert lines[at + 1].split() == ["weight", "equal"]


def test_one_rank_is_one(source: Path) -> None:
    assert "1 rank, layout not recorded" in run("inspect", str(source))
