"""Cosine with restarts: where its cycles begin and end, how they grow, how their peaks fall."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trainer.schedule import Schedule, ScheduleConfig

PEAK, FLOOR = 1e-3, 1e-4


def cyclic(period: int | None = 10, **fields: Any) -> Schedule:
    return Schedule(ScheduleConfig(kind="cyclic", period=period, **fields), PEAK, FLOOR, 200)


def rates(one: Schedule, count: int = 200) -> list[float]:
    return [one.lr(step, one.begin()) for step in range(count)]


def restarts(one: Schedule) -> list[int]:
    curve = rates(one)
    return [
        step for step in range(1, 200) if curve[step] > curve[step - 1] and step > one.config.warmup_steps
    ]


def test_each_cycle_has_the_peak_first_and_the_floor_last() -> None:
    curve = rates(cyclic())
    assert {curve[step] for step in range(0, 200, 10)} == {PEAK}
    assert [curve[step] for step in range(9, 200, 10)] == pytest.approx([FLOOR] * 20, rel=1e-12)


def test_a_cycle_is_half_a_cosine() -> None:
    expected = [FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * step / 9)) / 2 for step in range(10)]
    assert rates(cyclic(), 10) == pytest.approx(expected, rel=1e-12)


def test_cycles_follow_the_warmup() -> None:
    one = cyclic(warmup_steps=5)
    assert rates(one)[:6] == pytest.approx([0, 2e-4, 4e-4, 6e-4, 8e-4, PEAK])
    assert restarts(one)[:3] == [15, 25, 35]


@pytest.mark.parametrize(
    ("growth", "starts"),
    [(1.0, [10, 20, 30, 40]), (2.0, [10, 30, 70, 150]), (1.5, [10, 25, 47, 81])],
)
def test_cycles_grow(growth: float, starts: list[int]) -> None:
    assert restarts(cyclic(period_growth=growth))[:4] == starts


def test_peaks_fall_above_the_floor() -> None:
    curve = rates(cyclic(peak_decay=0.5))
    expected = [FLOOR + (PEAK - FLOOR) * 0.5**cycle for cycle in range(5)]
    assert curve[0:50:10] == pytest.approx(expected, rel=1e-12)
    assert min(curve) == pytest.approx(FLOOR)


def test_a_longer_run_changes_no_earlier_learning_rate() -> None:
    one = cyclic(period_growth=1.3)
    longer = Schedule(one.config, PEAK, FLOOR, 10_000)
    assert rates(one) == rates(longer)


def test_a_cycle_needs_a_length() -> None:
    (problem,) = cyclic(period=None).problems()
    assert "schedule.period is missing" in problem


def test_its_keys_belong_to_no_other_kind() -> None:
    one = Schedule(ScheduleConfig(kind="cosine", period=5, period_growth=2, peak_decay=0.5), PEAK, FLOOR, 100)
    assert [problem.split()[0] for problem in one.problems()] == [
        "schedule.period",
        "schedule.period_growth",
        "schedule.peak_decay",
    ]
