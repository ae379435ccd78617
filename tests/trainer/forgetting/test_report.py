"""From the metrics that stages left to the files of a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.forgetting.runs import write_run, write_stage
from trainer.forgetting.curves import Stage, find_stages, read_stages
from trainer.forgetting.report import Report
from trainer.forgetting.writing import write_reports
from trainer.metrics.json_lines import JsonLines
from trainer.metrics.sink import EvaluationRecord, RunInfo


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("runs") / "tale"
    report = write_reports(folder, write_run(folder))
    assert report is not None
    return folder, report


@pytest.fixture(scope="module")
def content(written: tuple[Path, Report]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((written[0] / "forgetting.json").read_text())
    return found


def test_the_matrix_is_that_of_the_curves(content: dict[str, Any]) -> None:
    assert [one["learned"] for one in content["sets"]] == [1, 2, 3]
    assert content["matrix"]["nats_per_token"] == [
        [5.0, 5.5, 5.2],
        [2.0, 4.0, 4.2],
        [1.95, 1.5, 3.2],
        [2.25, 1.4, 1.2],
    ]
    assert content["matrix"]["bits_per_byte"][3] == [1.125, 0.7, 0.6]


def test_the_summary_is_there_in_both_units(content: dict[str, Any]) -> None:
    nats, bits = content["summary"]["nats_per_token"], content["summary"]["bits_per_byte"]
    assert nats["forgetting"] == pytest.approx(((2.25 - 2.0) + (1.4 - 1.5)) / 2)
    assert nats["forward_transfer"] == pytest.approx(((5.5 - 4.0) + (5.2 - 3.2)) / 2)
    assert bits["forgetting"] == pytest.approx(nats["forgetting"] / 2)


def test_gaps_are_those_of_old_sources(content: dict[str, Any]) -> None:
    gaps = {(one["stage"], one["set"]): one for one in content["gaps"]}
    assert list(gaps) == [("code", "prose"), ("maths", "prose"), ("maths", "code")]
    first = gaps["code", "prose"]
    assert (first["depth"], first["depth_step"]) == (pytest.approx(0.41), 104)
    assert (first["recovery_step"], first["start_step"]) == (180, 100)


def test_extreme_cases_are_sentences(content: dict[str, Any]) -> None:
    assert content["sentences"][0] == "stage code: prose rose by 0.41 at step 104, back by step 180"


def test_the_terminal_gets_a_table_of_eighty_columns(written: tuple[Path, Report]) -> None:
    lines = written[1].lines()
    assert lines[1].split() == ["start", "prose", "code", "maths"]
    assert lines[2].split() == ["prose", "5.000", "2.000*", "1.950", "2.250"]
    assert any(line.startswith("average 1.617; forgetting +0.075") for line in lines)
    assert max(map(len, lines)) <= 100


def test_tensorboard_has_what_was_known_after_each_stage(written: tuple[Path, Report]) -> None:
    events = EventAccumulator(str(written[0] / "tensorboard-forgetting"))
    events.Reload()

    def scalars(tag: str) -> dict[int, float]:
        return {one.step: pytest.approx(one.value, abs=1e-6) for one in events.Scalars(f"forgetting/{tag}")}

    assert scalars("loss/prose") == {100: 2.0, 200: 1.95, 300: 2.25}
    assert scalars("forgetting") == {200: -0.05, 300: 0.075}
    assert scalars("gap_depth/prose") == {200: 0.41, 300: 0.3}


def test_the_picture_is_a_png(written: tuple[Path, Report]) -> None:
    assert (written[0] / "forgetting.png").read_bytes().startswith(b"\x89PNG")


def test_writing_again_gives_the_same(written: tuple[Path, Report], content: dict[str, Any]) -> None:
    folder, report = written
    write_reports(folder, [tuple(stage.stage) for stage in report.stages], tensorboard=False)
    assert json.loads((folder / "forgetting.json").read_text()) == content


def test_stages_are_found_in_the_order_they_ran(written: tuple[Path, Report]) -> None:
    found = find_stages(written[0])
    assert [tuple(one) for one in found] == [tuple(stage.stage) for stage in written[1].stages]


def test_after_the_first_stage_nothing_is_old(tmp_path: Path) -> None:
    report = write_reports(tmp_path, write_run(tmp_path)[:1], tensorboard=False)
    assert report is not None
    assert (report.gaps, report.sentences) == ((), [])
    assert report.matrix.learned == (1, None, None)


def test_a_run_from_a_checkpoint_is_one_stage_with_an_old_source(tmp_path: Path) -> None:
    curves = {"prose": {500: 2.0, 501: 2.3, 510: 1.9}, "code": {500: 4.0, 501: 3.5, 510: 2.0}}
    write_stage(tmp_path, curves, {"prose": "old", "code": "trained"}, first_step=500, last_step=510)
    report = write_reports(tmp_path, [tuple(one) for one in find_stages(tmp_path)], tensorboard=False)
    assert report is not None
    assert report.matrix.learned == (0, 1)
    assert report.sentences == [f"stage {tmp_path.name}: prose rose by 0.30 at step 501, back by step 510"]


def test_a_run_that_is_not_evaluated_has_no_report(tmp_path: Path) -> None:
    stages = [write_stage(tmp_path / "a", {}, {}, first_step=0, last_step=10)]
    assert write_reports(tmp_path, stages) is None
    assert not (tmp_path / "forgetting.json").exists()


def test_a_stage_that_still_runs_has_no_row_yet(tmp_path: Path) -> None:
    stages = write_run(tmp_path)[:2]
    begun = write_stage(
        tmp_path / "law", {"prose": {200: 1.95}}, {"prose": "old"}, first_step=200, last_step=400
    )
    report = write_reports(tmp_path, [*stages, begun], tensorboard=False)
    assert report is not None
    assert report.matrix.stages == ("prose", "code")


def test_a_lost_loss_stays_valid_json(tmp_path: Path) -> None:
    curves = {"prose": {0: 2.0, 5: float("nan"), 10: float("inf")}}
    stages = [write_stage(tmp_path / "a", curves, {"prose": "old"}, first_step=0, last_step=10)]
    write_reports(tmp_path, stages, tensorboard=False)
    found = json.loads((tmp_path / "forgetting.json").read_text(), parse_constant=pytest.fail)
    assert found["gaps"][0]["depth"] == "inf"
    assert found["matrix"]["nats_per_token"][1] == ["inf"]


def test_evaluations_of_a_sample_make_one_curve(tmp_path: Path) -> None:
    """Whole evaluations say what a dense one would have read, and only those losses compare."""
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink.start(RunInfo("run", 0, 8, 64))
    for step, whole, first in ((0, 2.0, 1.0), (1, None, 1.1), (2, None, 1.2), (8, 2.5, 0.9)):
        losses, dense_losses = {} if whole is None else {"prose": whole}, {"prose": first}
        record = EvaluationRecord(
            step,
            losses,
            dict.fromkeys(losses, 100),
            dense=whole is None,
            dense_losses=dense_losses,
            dense_tokens={"prose": 10},
            roles={"prose": "old"},
        )
        sink.evaluation(record)
    sink.close()
    (stage,) = read_stages([Stage("run", tmp_path, 0, 8)])
    assert stage.curve("prose") == [(0, 1.0), (1, 1.1), (2, 1.2), (8, 0.9)]
    report = write_reports(tmp_path, [("run", tmp_path, 0, 8)], tensorboard=False)
    assert report is not None
    assert report.matrix.rows == ((2.0,), (2.5,))


def test_a_stage_begins_where_the_last_has_ended(tmp_path: Path) -> None:
    """Without an evaluation of its own before the first step."""
    one = write_stage(tmp_path / "a", {"x": {0: 3.0, 9: 1.0}}, {"x": "trained"}, first_step=0, last_step=9)
    two = write_stage(tmp_path / "b", {"x": {12: 1.5}}, {"x": "old"}, first_step=9, last_step=12)
    report = write_reports(tmp_path, [one, two], tensorboard=False)
    assert report is not None
    assert [(gap.stage, gap.gap.start_loss, gap.gap.depth) for gap in report.gaps] == [("b", 1.0, 0.5)]
    assert report.matrix.learned == (1,)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected the folder of a run"):
        find_stages(tmp_path)
