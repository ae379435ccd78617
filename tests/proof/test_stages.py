"""A run of stages as users start it: each from the one before, on its own layout, stopped and resumed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoint.folder import read_manifest, step_name
from parallel.mesh import destroy_mesh
from tests.data.corpora import ragged, write_tokens
from tests.proof.runs import Records
from tests.ranks import run_ranks
from tests.trainer.stages.test_stages import BASE, FIRST, SECOND
from trainer.config import resolve
from trainer.loop import train
from trainer.stages.load_stages import load_stages

SAVED = """
[checkpoint]
every = 5

[[data.validation]]
name = "prose"
path = "{folder}/held-out"
"""
THIRD = """
[[stage]]
name = "third"
steps = 3
start = { from = "first@5", policy = "rewarm", moments = "reset" }
sequence_length = 16
checkpoint = { every = 1 }
schedule = { kind = "linear", steps = 200 }
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After the run."""
    folder = tmp_path_factory.mktemp("stages")
    for seed, name in enumerate(("prose", "held-out")):
        documents = [[t % 250 for t in one] for one in ragged(60, seed=seed, longest=50)]
        write_tokens(folder / name, documents)
    path = folder / "run.toml"
    path.write_text((BASE + SAVED).format(folder=folder) + FIRST + SECOND + THIRD)
    ratoon("train", path)
    return path


def ratoon(*words: object) -> str:
    command = [sys.executable, "-m", "launch.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(run_file: Path, stage: str) -> list[dict[str, Any]]:
    lines = (run_file.parent / "story" / stage / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def losses(run_file: Path, stage: str) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run_file, stage)}


def state(run_file: Path, stage: str, step: int) -> dict[str, Any]:
    return read_manifest(run_file.parent / "story" / stage / "checkpoints" / step_name(step))[1].state


def history(run_file: Path) -> list[dict[str, Any]]:
    lines = (run_file.parent / "story" / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_steps_run_through_and_a_branch_goes_back(run_file: Path) -> None:
    assert list(losses(run_file, "first")) == list(range(1, 11))
    assert list(losses(run_file, "second")) == list(range(11, 19))
    assert list(losses(run_file, "third")) == [6, 7, 8]


def test_a_stage_begins_with_what_it_said_it_would_keep(run_file: Path) -> None:
    second, third = state(run_file, "second", 18), state(run_file, "third", 8)
    assert second["scalars"]["updates"] == 18
    assert third["scalars"]["updates"] == 3, "its moments were reset"
    assert second["schedule"]["anchor"]["step"] == second["first_step"] == 10
    assert records(run_file, "second")[0]["lr"] == pytest.approx(records(run_file, "first")[-1]["lr"])


def test_each_stage_ran_on_its_own_layout(run_file: Path) -> None:
    assert state(run_file, "first", 10)["layout"]["tensor"] == 1
    assert state(run_file, "second", 18)["layout"]["tensor"] == 2


def test_the_history_has_every_start(run_file: Path) -> None:
    starts = {one["stage"]: one for one in history(run_file)}
    assert list(starts) == ["first", "second", "third"]
    assert starts["third"]["fields"]["moments"] == {"verdict": "reset", "reason": "start.moments = reset"}


def test_forgetting_is_reported_after_every_stage(run_file: Path) -> None:
    story = run_file.parent / "story"
    assert (story / "forgetting.png").stat().st_size > 0
    stages = json.loads((story / "forgetting.json").read_text())["stages"]
    assert [stage["name"] for stage in stages] == ["first", "second", "third"]


def test_the_report_has_the_losses_from_before_the_first_stage(run_file: Path) -> None:
    report = json.loads((run_file.parent / "story" / "forgetting.json").read_text())
    (before,), (after,), *_ = report["matrix"]["nats_per_token"]
    assert before > after


def test_what_is_done_is_left_and_what_is_not_goes_on(run_file: Path) -> None:
    """Without its last checkpoint the third stage makes one step; the first two are not touched."""
    whole, before = losses(run_file, "third")[8], len(history(run_file))
    shutil.rmtree(run_file.parent / "story" / "third" / "checkpoints" / step_name(8))
    ratoon("train", run_file)
    assert [(one["stage"], one["first_step"]) for one in history(run_file)[before:]] == [("third", 7)]
    assert records(run_file, "third")[-1]["step"] == 8
    assert records(run_file, "third")[-1]["loss"] == whole


def test_the_plan_of_a_run_that_is_done_starts_nothing(run_file: Path) -> None:
    before = history(run_file)
    assert "nothing is ambiguous" in ratoon("plan-resume", run_file)
    assert history(run_file) == before


def test_one_process_goes_through_stages_on_other_layouts(run_file: Path, tmp_path: Path) -> None:
    """As ranks under a launcher do, which stay the same from stage to stage."""
    path = tmp_path / "run.toml"
    path.write_text(run_file.read_text().replace(str(run_file.parent / "story"), str(tmp_path / "story")))
    found = run_ranks(_train_two_stages, 2, path)[0]
    for stage in ("first", "second"):
        assert found[stage] == pytest.approx(losses(run_file, stage), rel=1e-5)


def _train_two_stages(path: Path) -> dict[str, dict[int, float]]:
    found = {}
    for stage in load_stages(path)[:2]:
        sink = Records()
        train(resolve(stage.config), sink=sink)
        destroy_mesh()
        found[stage.name] = sink.losses
    return found
