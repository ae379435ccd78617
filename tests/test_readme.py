"""The README's own files and commands run as they stand, with fewer steps."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_every_command_named_exists() -> None:
    named = set(re.findall(r"ratoon ((?:data |checkpoint )?[a-z]+(?:-[a-z]+)*)", README.read_text()))
    commands = {name for name in named if name.split()[0] in ("demo", "data", "train", "check", "checkpoint")}
    assert {"demo", "data prepare", "train", "check", "checkpoint inspect"} <= commands
    for name in commands - {"data", "checkpoint"}:
        ratoon(f"ratoon {name} --help", Path.cwd())
