"""`ratoon data`, as a person types it."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from checkpoint.save import Saver
from launch.data_cli import app
from launch.data_ledger import Documents, _table
from tests.data.corpora import ragged, write_lines, write_tokens
from trainer.data.config import DataConfig
from trainer.data.ledger import Ledger, SourceEntry
from trainer.data.stream import TokenStream

TEXTS = [f"document {n} " + "word " * n for n in range(60)]


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return os.path.relpath(write_lines(tmp_path / "in.jsonl", TEXTS), tmp_path)


def invoke(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_from_text_to_a_look_inside(lines: str) -> None:
    assert "vocabulary 300" in invoke("train-tokenizer", lines, "--vocab-size", "300", "-o", "tok.json")
    prepared = invoke("prepare", lines, "-o", "out", "--tokenizer", "tok.json", "--validation-share", "0.2")
    assert "documents 60" in prepared
    assert 'path = "out-validation"' in prepared
    shown = invoke("inspect", "out.bin", "--documents", "1")
    assert "tok.json, 300 ids" in shown
    assert "document 0" in shown
    assert "document 0 ..." not in shown


def test_the_report_names_bad_records(lines: str) -> None:
    with open(lines, "a") as file:
        file.write("oops\n" * 7)
    shown = invoke("prepare", lines, "-o", "out", "--workers", "2")
    assert "bad records 7: invalid JSON 7" in shown
    assert "in.jsonl:61: invalid JSON" in shown
    assert "and 2 more" in shown


def test_strict_fails_with_file_and_line(lines: str) -> None:
    with open(lines, "a") as file:
        file.write("oops\n")
    assert "in.jsonl:61: invalid JSON" in invoke("prepare", lines, "-o", "out", "--strict", code=1)
    assert os.listdir() == ["in.jsonl"]


def test_a_user_error_is_one_panel(lines: str) -> None:
    shown = invoke("prepare", "nothing.txt", "-o", "out", code=2)
    assert "nothing.txt does not exist" in shown
    assert "Traceback" not in shown
    Path("tok.json").touch()
    assert "--overwrite" in invoke("train-tokenizer", lines, "--vocab-size", "300", "-o", "tok.json", code=2)


def test_inspect_without_a_sidecar_shows_ids(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "c", [[5, 6, 7]])
    shown = invoke("inspect", prefix)
    assert "shown as ids" in shown
    assert "5 6 7" in shown
    assert "hi" in invoke("inspect", write_tokens(tmp_path / "d", [[104, 105, 256]]), "--tokenizer", "bytes")


def test_nothing_is_wider_than_the_terminal(lines: str) -> None:
    for arguments in (["--help"], ["prepare", "--help"], ["prepare", lines, "-o", "out"], ["inspect", "out"]):
        output = CliRunner().invoke(app, arguments).output
        assert max(map(len, output.splitlines())) <= 80


def test_a_terminal_sees_a_bar_with_tokens_per_second(lines: str) -> None:
    import io

    from rich.console import Console

    from launch import data_report
    from trainer.data.prepare import PrepareOptions, prepare

    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with data_report.DataProgress(console) as progress:
        progress._shown = 0.0
        prepare(PrepareOptions((lines,), "out"), progress.update)
    assert "tokens/s" in console.file.getvalue()  # type: ignore[attr-defined]


def test_sigterm_leaves_nothing(lines: str) -> None:
    code = (
        "import os, signal\n"
        "from launch import data_report\n"
        "from launch.data_cli import app\n"
        "data_report.DataProgress.update = lambda self, report: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"app(['prepare', {lines!r}, '-o', 'out', '--workers', '2'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert ended.returncode == 128 + signal.SIGTERM
    assert os.listdir() == ["in.jsonl"]


def run_with_two_stages(folder: Path) -> None:
    """Checkpoints without tensors: the ledger looks at nothing but the data position."""
    sources = [
        {"name": name, "path": write_tokens(folder / name, ragged(40, seed=n))}
        for n, name in enumerate(("a-source-with-quite-a-long-name", "code"))
    ]
    state = None
    for stage, first in (("general", 0), ("code", 30)):
        config = DataConfig.model_validate({"sequence_length": 8, "sources": sources})
        stream = TokenStream(config, seed=1, global_batch=4, state=state, stage=stage)
        state = stream.state(first + 30)
        saver = Saver(folder / "run" / stage / "checkpoints", rank=0, world_size=1)
        saver.save(first + 30, [], {"data": state}, {})
        saver.close()


def test_the_ledger_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run_with_two_stages(tmp_path)
    (tmp_path / "run.toml").write_text(f'run.dir = "{tmp_path}/run"\n')
    newest = tmp_path / "run" / "code"
    tables = [
        CliRunner().invoke(app, ["ledger", str(path)]).output
        for path in (
            tmp_path / "run",
            tmp_path / "run.toml",
            newest,
            newest / "checkpoints" / "step-00000060",
        )
    ]
    assert len(set(tables)) == 1
    heading, *table = tables[0].splitlines()
    assert heading.endswith("step-00000060: 60 steps")
    assert max(map(len, table)) <= 80
    found = json.loads(CliRunner().invoke(app, ["ledger", str(tmp_path / "run"), "--json"]).output)
    assert [one["tokens"] for one in found["sources"]] == [960, 960]
    assert [one["share_realised"] for one in found["sources"]] == [0.5, 0.5]
    assert [one["documents"] for one in found["sources"]] == [40, 40]
    assert [one["stage"] for one in found["segments"]] == ["general", "code"]
    assert "steps 30 to 60, stage code: 120 sequences of 8" in invoke(
        "ledger", str(tmp_path / "run"), "--segments"
    )


def test_a_large_ledger_fits_a_terminal() -> None:
    entry = SourceEntry("a-source-with-quite-a-long-name", "", 987_654_321_012, 3_456_789_012_345, 1.0, 1.0)
    ledger = Ledger(1, 1, (entry,), (), ())
    console = Console(width=80, file=io.StringIO())
    console.print(_table(ledger, {entry.name: Documents(987_654_321, 987_654_321)}))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 80
    for number in ("987,654,321", "3,456,789,012,345", "100.000%"):
        assert number in shown


def test_the_ledger_says_what_it_cannot_count(tmp_path: Path) -> None:
    run_with_two_stages(tmp_path)
    Path(tmp_path / "code.idx").unlink()
    assert "documents of code: " in invoke("ledger", str(tmp_path / "run"))


def test_no_ledger_without_a_run(tmp_path: Path) -> None:
    assert "none found" in invoke("ledger", str(tmp_path), code=2).replace("│ ", "")
    assert "no such folder" in invoke("ledger", str(tmp_path / "gone"), code=2).replace("│ ", "")
