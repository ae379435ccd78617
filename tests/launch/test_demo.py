"""`ratoon demo`: one quick run of all of it, with real ranks; its text, its files, and what it refuses."""

import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import trainer.loop  # noqa: F401  # so that what is forked from here is warm
from launch import cli
from launch.demo import command, outcome
from launch.demo.corpus import CODE_BYTES, choose_code, prose_documents, unigram_loss
from launch.demo.outcome import Outcome, checks, evaluations
from launch.demo.plan import FAST, RANKS, Plan, choose_folder, choose_layouts, choose_ranks
from launch.demo.run_files import write_run_files
from launch.demo.story import sparklines
from launch.train_command import train
from tests.data.corpora import write_tokens
from tests.launch.test_ranks import assert_gone
from tests.launch.test_train import PATIENCE, descendants, in_a_terminal_of_its_own, ratoon
from trainer.config import check_config, load_config
from trainer.data.indexed import IndexedReader


def run_demo(folder: Path, *options: str) -> Result:
    arguments = ["demo", "--fast", "--dir", str(folder), *options]
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})


def make_plan(folder: Path, ranks: int = 4) -> Plan:
    layouts = choose_layouts(ranks)
    return Plan(folder, ranks=ranks, layouts=layouts, gpu=False, size=FAST, record_every=1)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of one quick demo on four ranks, and what it said itself."""
    folder = tmp_path_factory.mktemp("demo") / "here"
    result = run_demo(folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def records(run: Path, kind: str) -> list[dict[str, object]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_the_story_has_all_chapters_and_passes(shown: tuple[Path, str]) -> None:
    _, text = shown
    for part in ("1. Text", "2. Stage 1", "3. Stage 2", "4. What", "5. Done", "TP2 x PP2 x DP1", "re-warmed"):
        assert part in text
    assert (text.count("PASS"), text.count("FAIL")) == (3, 0)


def test_prose_and_tables_fit_eighty_columns(shown: tuple[Path, str]) -> None:
    folder, text = shown
    assert max(len(line) for line in text.splitlines() if str(folder) not in line) <= 80


def test_the_second_layout_starts_from_the_loss_the_first_ended_with(shown: tuple[Path, str]) -> None:
    folder, _ = shown
    first, second = evaluations(folder / "prose"), evaluations(folder / "code")
    assert (list(first), list(second)) == ([0, 6], [6, 10])
    # Sums over other ranks in another order: some units in the last place of fp32, 1.2e-7.
    assert second[6] == pytest.approx(first[6], rel=1e-6)
    starts = [records(folder / name, "start")[0] for name in ("prose", "code")]
    assert ["TP2 PP2 DP1" in str(starts[0]["layout"]), "TP1 PP2 DP2" in str(starts[1]["layout"])] == [
        True
    ] * 2


def test_the_learning_rate_rises_again_from_where_it_had_ended(shown: tuple[Path, str]) -> None:
    folder, _ = shown
    rates = [[line["lr"] for line in records(folder / name, "step")] for name in ("prose", "code")]
    assert rates[0] == pytest.approx([0.0, 1e-2, *rates[0][2:5], 1e-3])
    assert rates[1] == pytest.approx([1e-3, 5e-3, rates[1][2], 5e-4])


def test_only_the_second_stage_reads_code(shown: tuple[Path, str]) -> None:
    folder, _ = shown
    sources = [
        {name for line in records(folder / run, "step") for name in line["source_losses"]}  # type: ignore[attr-defined]
        for run in ("prose", "code")
    ]
    assert sources == [{"prose"}, {"prose", "code"}]


def test_no_document_is_both_trained_on_and_held_out(shown: tuple[Path, str]) -> None:
    data = shown[0] / "data"
    for name in ("prose", "code"):
        train_set, held_out = (IndexedReader(str(data / part)) for part in (name, f"{name}-validation"))
        seen = {train_set[document].tobytes() for document in range(len(train_set))}
        assert len(held_out) > 0
        assert not seen & {held_out[document].tobytes() for document in range(len(held_out))}


def test_its_run_files_can_be_started_by_hand(shown: tuple[Path, str], tmp_path: Path) -> None:
    folder, more = shown[0], tmp_path / "more"
    for steps in (12, 13):  # begins, and then goes on from itself
        overrides = [f"run.dir={more}", f"checkpoint.load={folder / 'code'}", f"train.steps={steps}"]
        train(folder / "2-code.toml", overrides, ranks=2)
    assert [line["step"] for line in records(more, "step")] == [11, 12, 13]
    whole = [line["step"] for line in records(more, "evaluation") if not line.get("dense")]
    assert whole == [10, 12, 13]  # none twice


@pytest.mark.parametrize("ranks", RANKS)
def test_the_run_files_of_every_number_of_ranks_are_valid(
    shown: tuple[Path, str], tmp_path: Path, ranks: int
) -> None:
    for name in ("data", "prose"):
        (tmp_path / name).symlink_to(shown[0] / name)
    plan = make_plan(tmp_path, ranks)
    write_run_files(plan)
    for run_file in plan.run_files:
        check_config(load_config(run_file), ranks, name=run_file.name)


def test_a_promise_that_does_not_come_true_is_exit_code_1(
    shown: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = shown
    monkeypatch.setattr(outcome, "SAME_LOSS", {"fp32": -1.0})
    result = run_demo(folder, "--ranks", "1")
    assert result.exit_code == 1
    assert (result.output.count("PASS"), result.output.count("FAIL")) == (2, 1)
    assert (folder / "2" / "code" / "metrics.jsonl").exists()  # the first demo's folder was left alone
    assert "is not empty" in " ".join(result.output.split())


def losses(prose: float, code: float) -> dict[str, float]:
    return {"prose": prose, "code": code}


GOOD = Outcome(
    unigram=losses(5.9, 6.0),
    untrained=losses(7.0, 7.0),
    learned=losses(4.0, 6.1),
    resumed=losses(4.0, 6.1),
    finished=losses(4.1, 4.8),
)


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, [True, True, True]),
        ({"resumed": losses(4.0001, 6.1)}, [False, True, True]),
        ({"resumed": losses(math.nan, 6.1)}, [False, True, True]),
        ({"learned": losses(4.0, math.nan)}, [False, True, True]),
        ({"learned": losses(4.8, 6.1), "resumed": losses(4.8, 6.1)}, [True, False, True]),
        ({"finished": losses(3.9, 6.2)}, [True, True, False]),
    ],
)
def test_each_check_can_fail(change: dict[str, dict[str, float]], passed: list[bool]) -> None:
    found = checks(make_plan(Path("/demo")), replace(GOOD, **change), full=True)
    assert [check.passed for check in found] == passed


def test_ctrl_c_leaves_no_rank(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with in_a_terminal_of_its_own(ratoon, output, "demo", "--dir", str(tmp_path / "demo")) as process:
        ends = time.monotonic() + PATIENCE
        while b"step 10/" not in output.read_bytes():
            assert process.is_alive(), output.read_text()
            assert time.monotonic() < ends, output.read_text()
            time.sleep(0.05)
        assert process.pid is not None
        ranks = descendants(process.pid)
        assert len(ranks) == 4
        os.killpg(process.pid, signal.SIGINT)
        process.join(PATIENCE)
        assert process.exitcode == 130
        assert_gone(ranks)
    assert output.read_text().rstrip().endswith("Interrupted; every process has ended.")


def test_prose_takes_every_paragraph_once() -> None:
    topics = {"b": "shared\n\nown b", "a": "own a\n\n\n\nshared\n\n" + "long " * 1000 + "\n\nlast"}
    documents = list(prose_documents(topics))
    assert [document["topic"] for document in documents] == ["a", "a", "b"]
    paragraphs = "\n\n".join(document["text"] for document in documents).split("\n\n")
    assert sorted(paragraphs) == sorted({"own a", "shared", "long " * 1000, "last", "own b"})


def test_code_is_a_bounded_choice_that_does_not_change() -> None:
    chosen = choose_code()
    assert chosen == choose_code()
    assert 0.5 * CODE_BYTES < sum(Path(path).stat().st_size for path in chosen) <= CODE_BYTES


def test_a_python_without_its_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.py file in .*: the demo reads the standard library's source"):
        choose_code(tmp_path)


def test_unigram_loss_is_the_cross_entropy_of_smoothed_frequencies(tmp_path: Path) -> None:
    train_set = write_tokens(tmp_path / "train", [[0, 0, 1]])
    held_out = write_tokens(tmp_path / "held-out", [[0, 1], [2, 2]])
    expected = -np.mean(np.log([3 / 6, 2 / 6, 1 / 6, 1 / 6]))
    assert unigram_loss(Path(train_set), Path(held_out), 3) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("asked", "gpus", "chosen"),
    [(None, 0, 4), (None, 1, 1), (None, 3, 2), (None, 8, 4), (8, 0, 8), (4, 1, 4)],
)
def test_ranks_follow_the_gpus_unless_asked_for(asked: int | None, gpus: int, chosen: int) -> None:
    assert choose_ranks(asked, gpus) == chosen


def test_a_number_of_ranks_without_layouts_is_refused(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "demo", "--ranks", "3")
    assert result.exit_code == 2
    assert "layouts for 1, 2, 4, 8 ranks" in " ".join(result.output.split())
    assert not (tmp_path / "demo").exists()


def test_under_a_launcher_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(ValueError, match="found those of torchrun: run it without"):
        command.demo(tmp_path / "demo", fast=True)


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    assert choose_folder(tmp_path / "new") == tmp_path / "new"
    assert choose_folder(tmp_path) == tmp_path
    (tmp_path / "file").touch()
    assert choose_folder(tmp_path) == tmp_path / "2"
    (tmp_path / "2").mkdir()
    assert choose_folder(tmp_path) == tmp_path / "3"
    with pytest.raises(ValueError, match="is a file"):
        choose_folder(tmp_path / "file")


@pytest.mark.parametrize(
    ("series", "drawn"),
    [
        ([[0.0, 7.0], [7.0, 0.0]], "▁█ █▁"),
        ([[1.0, 1.0]], "▁▁"),
        ([[0.0] * 100 + [7.0] * 100], "▁" * 30 + "█" * 30),
    ],
)
def test_sparklines(series: list[list[float]], drawn: str) -> None:
    assert sparklines(series) == drawn


@pytest.mark.long
def test_the_whole_demo_passes_within_four_minutes(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with in_a_terminal_of_its_own(ratoon, output, "demo", "--dir", str(tmp_path / "demo")) as process:
        process.join(240)  # the promise, for 2 cores of a quiet machine
        assert process.exitcode == 0, output.read_text()
    assert output.read_text().count("PASS") == 3
