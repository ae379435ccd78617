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
from rich.console import Console
from typer.testing import CliRunner, Result

import trainer.loop  # noqa: F401  # so that what is forked from here is warm
from launch import cli
from launch.demo import command, outcome
from launch.demo.corpus import CODE_BYTES, choose_code, prose_documents, unigram_loss
from launch.demo.outcome import Course, Outcome, checks
from launch.demo.panels import Panel, panel_lines, sparklines
from launch.demo.plan import (
    FAST,
    FULL,
    INFINITE,
    RANKS,
    REWARM,
    WAYS,
    Plan,
    Size,
    Way,
    choose_folder,
    choose_layouts,
    choose_ranks,
)
from launch.demo.run_files import write_run_files
from launch.demo.story import Story, comparison
from launch.train_command import train
from tests.data.corpora import write_tokens
from tests.launch.test_ranks import assert_gone
from tests.launch.test_train import PATIENCE, descendants, in_a_terminal_of_its_own, ratoon
from trainer.data.indexed import IndexedReader
from trainer.stages.check import check_stages
from trainer.stages.load_stages import load_stages


def run_demo(folder: Path, *options: str) -> Result:
    arguments = ["demo", "--fast", "--dir", str(folder), *options]
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})


def make_plan(folder: Path, ranks: int = 4) -> Plan:
    layouts = choose_layouts(ranks)
    return Plan(folder, ranks=ranks, layouts=layouts, gpu=False, size=FAST, record_every=1, seed=7)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of one quick demo on two ranks, and what it said itself."""
    folder = tmp_path_factory.mktemp("demo") / "here"
    result = run_demo(folder, "--ranks", "2", "--seed", "7")
    assert result.exit_code == 0, result.output
    return folder, result.output


def records(stage: Path, kind: str) -> list[dict[str, object]]:
    lines = map(json.loads, (stage / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_the_story_has_all_chapters_and_passes(shown: tuple[Path, str]) -> None:
    _, text = shown
    for part in ("1. Text", "2. Prose, then", "3. Prose, then", "4. What", "5. Done", "TP2 x PP1 x DP1"):
        assert part in text
    assert (text.count("PASS"), text.count("FAIL")) == (3, 0)


def test_prose_tables_and_curves_fit_eighty_columns(shown: tuple[Path, str]) -> None:
    folder, text = shown
    assert max(len(line) for line in text.splitlines() if str(folder) not in line) <= 80


@pytest.mark.parametrize("way", WAYS)
def test_the_second_layout_starts_from_the_loss_the_first_ended_with(
    shown: tuple[Path, str], way: Way
) -> None:
    run = shown[0] / way.name
    ended, began = records(run / "prose", "evaluation")[-1], records(run / "code", "evaluation")[0]
    assert (ended["step"], began["step"]) == (6, 6)
    # Sums over other ranks in another order: some units in the last place of fp32, 1.2e-7.
    assert began["losses"] == pytest.approx(ended["losses"], rel=1e-6)
    layouts = [str(records(run / stage, "start")[0]["layout"]) for stage in ("prose", "code")]
    assert "TP2 PP1 DP1" in layouts[0]
    assert "TP1 PP2 DP1" in layouts[1]


def learning_rates(run: Path) -> list[float]:
    return [rate for stage in ("prose", "code") for rate in outcome.learning_rates(run / stage)]


def test_one_way_warms_up_again_and_the_other_goes_on_where_it_was(shown: tuple[Path, str]) -> None:
    rewarm, infinite = (learning_rates(shown[0] / way.name) for way in WAYS)
    assert rewarm[5:8] == pytest.approx([3e-4, 3e-4, 3e-3])
    assert infinite[5:8] == pytest.approx([1.5e-3] * 3)
    assert (rewarm[-1], infinite[-1]) == pytest.approx((3e-4, 3e-4))


def test_only_one_way_reads_prose_again(shown: tuple[Path, str]) -> None:
    tokens = {"prose": 0.0, "code": 0.0}
    for line in records(shown[0] / "infinite" / "code", "step"):
        for name, count in line["source_tokens"].items():  # type: ignore[attr-defined]
            tokens[name] += count
    assert tokens["prose"] / sum(tokens.values()) == pytest.approx(0.1, abs=1 / 32)  # within a sequence
    for line in records(shown[0] / "rewarm" / "code", "step"):
        assert set(line["source_tokens"]) == {"code"}  # type: ignore[call-overload]


def test_no_document_is_both_trained_on_and_held_out(shown: tuple[Path, str]) -> None:
    data = shown[0] / "data"
    for name in ("prose", "code"):
        train_set, held_out = (IndexedReader(str(data / part)) for part in (name, f"{name}-validation"))
        seen = {train_set[document].tobytes() for document in range(len(train_set))}
        assert len(held_out) > 0
        assert not seen & {held_out[document].tobytes() for document in range(len(held_out))}


def test_the_picture_is_there(shown: tuple[Path, str]) -> None:
    assert (shown[0] / "forgetting.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_that_tells_replay_from_schedule_is_valid(shown: tuple[Path, str]) -> None:
    (command_line,) = (line for line in shown[1].splitlines() if line.startswith("only replay"))
    words = command_line.split()
    overrides = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    stages = load_stages(Path(words[words.index("train") + 1]), overrides)
    check_stages(stages, [2, 2], name="by hand")
    weights = stages[1].config.data.mixture.weights
    assert weights["prose"] / sum(weights.values()) == pytest.approx(0.1, abs=0.001)
    assert stages[1].config.start.policy == "rewarm"


def test_a_second_start_of_its_run_files_finds_them_done(shown: tuple[Path, str]) -> None:
    before = (shown[0] / "rewarm" / "history.jsonl").read_text()
    train(shown[0] / "rewarm.toml", [], ranks=2)
    assert (shown[0] / "rewarm" / "history.jsonl").read_text() == before


def test_the_seed_is_that_of_the_run_files(shown: tuple[Path, str]) -> None:
    for way in WAYS:
        assert "\nseed = 7\n" in (shown[0] / f"{way.name}.toml").read_text()


@pytest.mark.parametrize("size", [FAST, FULL])
@pytest.mark.parametrize("ranks", RANKS)
def test_the_run_files_of_every_number_of_ranks_are_valid(
    shown: tuple[Path, str], tmp_path: Path, ranks: int, size: Size
) -> None:
    (tmp_path / "data").symlink_to(shown[0] / "data")
    plan = replace(make_plan(tmp_path, ranks), size=size)
    write_run_files(plan)
    for way in WAYS:
        stages = load_stages(plan.run_file(way))
        check_stages(stages, [ranks] * 2, name=way.name)
        assert [stage.last_step for stage in stages] == [
            size.first_steps,
            size.first_steps + size.second_steps,
        ]


@pytest.mark.parametrize(("allowed", "passed"), [(1e-5, True), (-1.0, False)])
def test_a_promise_that_does_not_come_true_is_told(
    shown: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, allowed: float, passed: bool
) -> None:
    monkeypatch.setattr(outcome, "SAME_LOSS", {"fp32": allowed})
    plan = make_plan(shown[0], 2)
    assert command.conclude(plan, Story(plan), {"prose": 5.9, "code": 6.0}, full=False) is passed


@pytest.mark.long
def test_a_demo_that_fails_its_checks_has_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "SAME_LOSS", {"fp32": -1.0})
    (tmp_path / "mine").touch()
    result = run_demo(tmp_path, "--ranks", "1")
    assert result.exit_code == 1
    assert (result.output.count("PASS"), result.output.count("FAIL")) == (2, 1)
    assert "is not empty" in " ".join(result.output.split())
    assert (tmp_path / "2" / "rewarm.toml").exists()


def course(start: float, peak: float, end: float, before: float | None = None) -> Course:
    curve = [(0, start), (10, peak), (100, end)]
    return Course(start if before is None else before, curve, bits=0.5)


REWARMED = {"prose": course(4.0, 4.9, 4.7), "code": course(6.2, 6.1, 4.4)}
REPLAYED = {"prose": course(4.1, 4.4, 4.2), "code": course(6.3, 6.1, 4.5)}
GOOD = Outcome(
    unigram={"prose": 5.9, "code": 6.0},
    courses={REWARM: REWARMED, INFINITE: REPLAYED},
    rates={way: [[0.0, 1.0], [1.0, 0.1]] for way in WAYS},
)
FORGOTTEN, WORST = 3, 4


def changed(way: Way, name: str, found: Course) -> Outcome:
    return replace(GOOD, courses={**GOOD.courses, way: {**GOOD.courses[way], name: found}})


@pytest.mark.parametrize(
    ("found", "failed"),
    [
        (GOOD, set()),
        (changed(REWARM, "code", course(6.2, 6.1, 4.4, before=6.2001)), {0}),
        (changed(INFINITE, "prose", course(4.1, 4.4, 4.2, before=math.nan)), {0, 1}),
        (changed(INFINITE, "prose", course(4.8, 4.85, 4.81)), {1, FORGOTTEN}),
        (changed(REWARM, "code", course(6.2, 6.1, 6.3)), {2}),
        (changed(INFINITE, "prose", course(4.1, 4.8, 4.8)), {FORGOTTEN}),  # ends higher
        (changed(INFINITE, "prose", course(3.5, 4.3, 4.3)), {FORGOTTEN}),  # has risen more
        (changed(INFINITE, "prose", course(4.1, 5.1, 4.2)), {WORST}),
        (changed(INFINITE, "prose", course(4.1, math.nan, 4.2)), {WORST}),
        (changed(INFINITE, "prose", course(4.1, 4.4, math.nan)), {FORGOTTEN, WORST}),
    ],
)
def test_each_check_can_fail(found: Outcome, failed: set[int]) -> None:
    results = checks(make_plan(Path("/demo")), found, full=True)
    assert {number for number, check in enumerate(results) if not check.passed} == failed


def test_a_few_steps_are_not_asked_to_forget() -> None:
    assert len(checks(make_plan(Path("/demo")), GOOD, full=False)) == 3


def test_what_each_way_did_better_is_said_whichever_it_is() -> None:
    assert comparison(GOOD) == [
        "Prose ends 0.500 nats lower with infinite, 10% replay: infinite +0.100 since stage 2 began, "
        "+0.300 at its worst, after step 10; re-warm +0.700 since stage 2 began, +0.900 at its "
        "worst, after step 10.",
        "Code ends 0.100 nats lower with re-warm, 0% replay: 4.400 against 4.500.",
    ]
    swapped = replace(GOOD, courses={REWARM: REPLAYED, INFINITE: REWARMED})
    assert "lower with re-warm, 0% replay: re-warm +0.100" in comparison(swapped)[0]


@pytest.mark.parametrize(("encoding", "drawn"), [("utf-8", "⠉"), ("ascii", "*")])
def test_the_outcome_is_drawn_with_the_characters_that_there_are(
    tmp_path: Path, encoding: str, drawn: str
) -> None:
    with (tmp_path / "out").open("w", encoding=encoding) as file:
        Story(make_plan(tmp_path), Console(file=file, width=80, highlight=False)).outcome(GOOD, [])
    text = (tmp_path / "out").read_text(encoding=encoding)
    assert drawn in text
    assert max(map(len, text.splitlines())) <= 80


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
        ([[7.0, 7.0]], "██"),
        ([[0.0] * 100 + [7.0] * 100], "▁" * 30 + "█" * 30),
    ],
)
def test_sparklines(series: list[list[float]], drawn: str) -> None:
    assert sparklines(series, top=7.0, width=60) == drawn


def test_panels_share_one_scale_and_leave_out_what_is_not_finite() -> None:
    panels = [Panel("rises", [(0, 1.0), (4, 7.0)]), Panel("stays", [(0, 1.0), (2, math.inf), (4, 1.0)])]
    lines = panel_lines(panels, 30, ascii_only=True)
    assert lines == [
        "        rises           stays",
        "  7.00 |     *    7.00 |",
        "       |    **         |",
        "       |   **          |",
        "       |  **           |",
        "       | **            |",
        "       |**             |",
        "  1.00 |* * *     1.00 |******",
        "       +------         +------",
        "  step  0    4    step  0    4",
    ]


@pytest.mark.long
def test_the_whole_demo_passes_within_four_minutes(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with in_a_terminal_of_its_own(ratoon, output, "demo", "--dir", str(tmp_path / "demo")) as process:
        process.join(240)  # the promise, for 2 cores of a quiet machine
        assert process.exitcode == 0, output.read_text()
    assert output.read_text().count("PASS") == 5
