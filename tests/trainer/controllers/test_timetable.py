"""Weights that are known beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.controllers.config import PointConfig
from trainer.controllers.protocol import History, KeepWeightsError
from trainer.controllers.timetable import Timetable, read_log, table_of

SOURCES = ["new", "replay"]


def at(step: int) -> History:
    return History(step, 100, 300, {"new": 0.5, "replay": 0.5})


def points(*entries: dict[str, object]) -> list[PointConfig]:
    return [PointConfig.model_validate(entry) for entry in entries]


def test_replay_in_the_first_tenth_only() -> None:
    chosen = points({"step": 0, "weights": {"new": 4, "replay": 1}}, {"share": 0.1, "weights": {"new": 1}})
    table = table_of(chosen, SOURCES, first_step=100, last_step=300)
    assert table == {100: {"new": 0.8, "replay": 0.2}, 120: {"new": 1.0, "replay": 0.0}}
    one = Timetable(table)
    assert [one.weights(at(step))["replay"] for step in (100, 119, 120, 299)] == [0.2, 0.2, 0.0, 0.0]
    assert [step for step in range(100, 300) if one.begins_at(step)] == [100, 120]


def test_a_straight_line_between_points() -> None:
    table = {100: {"new": 0.0, "replay": 1.0}, 200: {"new": 1.0, "replay": 0.0}}
    one = Timetable(table, interpolate=True)
    assert one.weights(at(125)) == {"new": 0.25, "replay": 0.75}
    assert one.weights(at(250)) == {"new": 1.0, "replay": 0.0}


def test_before_the_first_point_nothing_changes() -> None:
    with pytest.raises(KeepWeightsError, match="the first entry is for step 150"):
        Timetable({150: {"new": 1.0, "replay": 0.0}}).weights(at(120))


def test_two_points_at_one_step_are_refused() -> None:
    chosen = points({"step": 20, "weights": {"new": 1}}, {"share": 0.1, "weights": {"replay": 1}})
    with pytest.raises(ValueError, match="two of them begin at step 120"):
        table_of(chosen, SOURCES, first_step=100, last_step=300)


def test_a_point_names_known_sources() -> None:
    with pytest.raises(ValueError, match="step 100: no source is called 'rplay'"):
        table_of(points({"step": 0, "weights": {"rplay": 1}}), SOURCES, first_step=100, last_step=300)


def test_a_log_is_read_bit_by_bit(tmp_path: Path) -> None:
    weights = {"new": 0.1 + 0.2, "replay": 1 - (0.1 + 0.2)}
    path = tmp_path / "controller.jsonl"
    path.write_text(json.dumps({"kind": "plugin", "step": 7, "weights": weights}) + "\n" + '{"kind": "pl')
    assert read_log(path, SOURCES) == {7: weights}


def test_a_log_of_other_sources_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "controller.jsonl"
    path.write_text(json.dumps({"kind": "plugin", "step": 7, "weights": {"new": 1.0}}) + "\n")
    with pytest.raises(ValueError, match="step 7: the weight of 'replay' is nothing"):
        read_log(path, SOURCES)
