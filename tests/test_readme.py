"""The README's own files and commands run as they stand, with fewer steps."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app

README = Path(__file__).parents[1] / "README.md"


def blocks(kind: str) -> list[str]:
    """The fenced blocks of that kind, in order."""
    return re.findall(rf"```{kind}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def ratoon(command: str, folder: Path) -> str:
    """Run `ratoon ...` in `folder`; its output."""
    words = shlex.split(command)
    assert words[0] == "ratoon", command
    program = [sys.executable, "-m", "launch.cli", *words[1:]]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a reader stands: some text, and the README's run file."""
    text = tmp_path / "my-text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"The ratoon number {number} grows from the stubble. " * 40)
    (tmp_path / "run.toml").write_text(blocks("toml")[0])
    return tmp_path


def test_own_text_section_runs(folder: Path) -> None:
    (commands,) = (block for block in blocks("sh") if "data prepare" in block)
    for command in commands.strip().splitlines():
        fewer = " --set train.steps=8 --set train.global_batch=4" if "train" in command.split() else ""
        out = ratoon(command + fewer, folder)
    assert "step" in out  # the last command inspects the checkpoint

    rewarm = folder / "again.toml"
    first = (folder / "run.toml").read_text()
    second = re.sub(
        r"\[schedule\].*?(?=\n\[)", "", re.sub(r"\[checkpoint\].*", "", first, flags=re.S), flags=re.S
    )
    rewarm.write_text(second.replace('"first"', '"again"') + blocks("toml")[1])
    options = "--set train.steps=12 --set schedule.warmup_steps=2 --set parallel.tensor=1 --ranks 2"
    assert "the schedule starts anew" in ratoon(f"ratoon train again.toml {options}", folder)


def in_process(command: str) -> str:
    """As `ratoon`, without another Python."""
    done = CliRunner().invoke(app, shlex.split(command, comments=True)[1:])
    assert done.exit_code == 0, f"{command}\n{done.output}"
    return done.output


def test_going_on_section_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("corpus", "more"):
        in_process(f"ratoon data prepare my-text/ --output {name} --validation-share 0.05")
    (stages,) = (block for block in blocks("toml") if "[[stage]]" in block)
    Path("story.toml").write_text(blocks("toml")[0].replace('"first"', '"story"') + stages)
    (commands,) = (block for block in blocks("sh") if "plan-resume" in block)
    plan, train, report, ledger = commands.strip().splitlines()
    assert "nothing is ambiguous" in in_process(plan)
    settings = ["stage.0.steps=4", "stage.1.steps=4", "schedule.warmup_steps=1"]
    settings += ["parallel.tensor=1", "parallel.pipeline=1"]
    fewer = " ".join(f"--set {one}" for one in settings)
    ratoon(f"{train.split('#')[0]} {fewer} --ranks 1", folder)
    assert "forgetting" in in_process(report)
    assert "62.500%" in in_process(ledger), "all of one stage and a quarter of the other"


def test_every_command_named_exists() -> None:
    named = set(re.findall(r"ratoon ((?:data |checkpoint )?[a-z]+(?:-[a-z]+)*)", README.read_text()))
    commands = {name for name in named if name.split()[0] in ("demo", "data", "train", "check", "checkpoint")}
    assert {"demo", "data prepare", "train", "check", "checkpoint inspect"} <= commands
    for name in commands - {"data", "checkpoint"}:
        ratoon(f"ratoon {name} --help", Path.cwd())
