"""The stability gap of curves drawn by hand."""

from __future__ import annotations

import math

import pytest

from trainer.forgetting.gap import Gap, measure_gap
from trainer.forgetting.sentences import gap_sentences

THERE_AND_BACK = [(100, 2.0), (101, 2.1), (104, 2.4), (120, 2.2), (140, 1.8), (200, 1.9)]


def gap(curve: list[tuple[int, float]]) -> Gap:
    found = measure_gap(curve)
    assert found is not None
    return found


def test_a_rise_that_comes_back() -> None:
    found = gap(THERE_AND_BACK)
    assert (found.start_step, found.start_loss, found.end_step) == (100, 2.0, 200)
    assert (found.depth, found.depth_step) == (pytest.approx(0.4), 104)
    assert found.recovery_step == 140
    assert found.width == pytest.approx(
        30
    )  # from 100 to 130, where the line from 120 to 140 crosses the start
    assert (found.drop, found.drop_step) == (pytest.approx(0.2), 140)
    assert found.change == pytest.approx(-0.1)


def test_a_rise_that_stays() -> None:
    found = gap([(0, 1.0), (10, 1.5), (20, 1.25)])
    assert (found.depth_step, found.recovery_step, found.width, found.drop_step) == (10, None, 20.0, None)
    assert found.change == 0.25


def test_back_counts_from_the_peak_on() -> None:
    found = gap([(0, 1.0), (1, 1.1), (2, 0.9), (3, 1.4), (4, 1.0), (5, 1.2)])
    assert (found.depth_step, found.recovery_step) == (3, 4)


def test_what_only_falls_has_no_gap() -> None:
    found = gap([(0, 1.0), (1, 0.9), (2, 0.7)])
    assert (found.depth, found.depth_step, found.width, found.recovery_step) == (0.0, None, 0.0, None)
    assert (found.drop, found.drop_step) == (pytest.approx(0.3), 2)


def test_a_flat_curve_has_nothing() -> None:
    found = gap([(0, 1.0), (1, 1.0)])
    assert (found.depth, found.width, found.drop, found.change) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("curve", [[], [(0, 1.0)], [(0, math.nan), (1, 1.0)]])
def test_without_a_start_and_something_after_it_there_is_no_gap(curve: list[tuple[int, float]]) -> None:
    assert measure_gap(curve) is None


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_loss_that_is_lost_is_the_deepest_gap(lost: float) -> None:
    found = gap([(0, 1.0), (10, 1.5), (20, lost)])
    assert (found.depth, found.depth_step, found.recovery_step) == (math.inf, 20, None)
    assert gap_sentences([("code", "prose", found)]) == [
        "stage code: prose has had no finite loss since step 20"
    ]


def test_the_worst_is_said_first() -> None:
    stays = gap([(0, 1.0), (8, 1.25), (20, 1.2)])
    falls = gap([(0, 1.0), (20, 0.5)])
    still = gap([(0, 1.0), (20, 1.001)])
    said = gap_sentences(
        [
            ("a", "maths", falls),
            ("a", "law", still),
            ("b", "news", stays),
            ("a", "prose", gap(THERE_AND_BACK)),
        ]
    )
    assert said == [
        "stage a: prose rose by 0.40 at step 104, back by step 140",
        "stage b: news rose by 0.25 at step 8, not back at the end (+0.200 at step 20)",
        "stage a: maths fell by 0.50 by step 20",
    ]


def test_nothing_to_say_is_said() -> None:
    still = gap([(0, 1.0), (20, 1.001)])
    assert gap_sentences([("a", "law", still)]) == ["no old source moved by 0.01 nats per token in any stage"]
    assert gap_sentences([]) == []


def test_many_sentences_are_counted() -> None:
    said = gap_sentences([("a", f"set {number}", gap(THERE_AND_BACK)) for number in range(20)])
    assert len(said) == 13
    assert said[-1] == "and 8 more in forgetting.json"
