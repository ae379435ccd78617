"""The infinite schedule: hand-computed values at its borders, no jump, and no need to know its length."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from trainer.schedule import Anchor, Phase, Schedule, ScheduleConfig

PEAK, CONSTANT, FLOOR = 1e-3, 4e-4, 1e-4
WARMUP, COOLDOWN, ANNEAL = 10, 40, 20
START = Anchor()


def infinite(train_steps: int = 201, *, anneal_steps: int | None = None, **fields: Any) -> Schedule:
    given = {"warmup_steps": WARMUP, "cooldown_steps": COOLDOWN, "constant_lr": CONSTANT} | fields
    config = ScheduleConfig(kind="infinite", anneal_steps=anneal_steps, **given)
    return Schedule(config, PEAK, FLOOR, train_steps)


def rates(one: Schedule, anchor: Anchor = START) -> list[float]:
    return [one.lr(step, anchor) for step in range(anchor.step, one.train_steps)]


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0.0),
        (5, PEAK / 2),
        (9, 0.9 * PEAK),
        (10, PEAK),
        (20, CONSTANT + (PEAK - CONSTANT) * (1 + math.sqrt(0.5)) / 2),
        (30, (PEAK + CONSTANT) / 2),
        (50, CONSTANT),
        (180, CONSTANT),
        (181, CONSTANT * (FLOOR / CONSTANT) ** (1 / ANNEAL)),
        (190, math.sqrt(CONSTANT * FLOOR)),
        (200, FLOOR),
    ],
)
def test_values_at_the_borders(step: int, lr: float) -> None:
    assert infinite(anneal_steps=ANNEAL).lr(step, START) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (10, PEAK),
        # h(x) = 1 / sqrt(1 + 8 x) - 1: h(1) = -2/3, h(3/8) = -1/2, so three quarters of the way are done.
        (25, PEAK - 0.75 * (PEAK - CONSTANT)),
        (50, CONSTANT),
    ],
)
def test_values_of_the_inverse_square_root_cooldown(step: int, lr: float) -> None:
    one = infinite(cooldown_style="inverse_sqrt", cooldown_steepness=8)
    assert one.lr(step, START) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize("style", ["cosine", "inverse_sqrt"])
def test_no_jump_anywhere(style: str) -> None:
    """The steepest is the warm-up, a tenth of the peak a step."""
    curve = rates(infinite(anneal_steps=ANNEAL, cooldown_style=style))
    assert max(abs(a - b) for a, b in pairwise(curve)) <= PEAK / WARMUP * 1.0001


@pytest.mark.parametrize("style", ["cosine", "inverse_sqrt"])
def test_it_never_rises_after_the_peak(style: str) -> None:
    curve = rates(infinite(anneal_steps=ANNEAL, cooldown_style=style))[WARMUP:]
    assert all(a >= b for a, b in pairwise(curve))


def test_a_longer_run_changes_no_earlier_learning_rate() -> None:
    assert rates(infinite(60)) == rates(infinite(100_000))[:60]


def test_a_longer_run_moves_the_anneal_and_nothing_before_it() -> None:
    short, long = rates(infinite(201, anneal_steps=ANNEAL)), rates(infinite(301, anneal_steps=ANNEAL))
    assert short[:181] == long[:181]
    assert short[180:] == long[280:]


def test_a_new_stage_of_the_plateau_is_the_same_plateau() -> None:
    """Data may change: the anchor is kept, and so is the curve."""
    one, longer = infinite(100), infinite(150)
    assert [longer.lr(step, START) for step in range(100, 150)] == [one.lr(99, START)] * 50


@pytest.mark.parametrize(
    ("step", "phase"),
    [
        (0, "warmup"),
        (9, "warmup"),
        (10, "cooldown"),
        (49, "cooldown"),
        (50, "stable"),
        (180, "stable"),
        (181, "annealed"),
        (200, "annealed"),
        (500, "annealed"),
    ],
)
def test_phases(step: int, phase: Phase) -> None:
    assert infinite(anneal_steps=ANNEAL).phase(step, START) == phase


def test_the_stable_phase_is_where_the_constant_learning_rate_is() -> None:
    one = infinite(anneal_steps=ANNEAL)
    stable = [one.lr(step, START) for step in range(201) if one.phase(step, START) == "stable"]
    assert stable == [CONSTANT] * 131


def test_without_a_cooldown_the_peak_is_kept() -> None:
    one = infinite(cooldown_steps=0, constant_lr=None)
    assert not one.problems()
    assert set(rates(one)[WARMUP:]) == {PEAK}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"constant_lr": None}, "schedule.constant_lr is missing"),
        ({"constant_lr": 2e-3}, "the peak is 0.001: lower it, or raise optimizer.lr"),
        ({"cooldown_steps": 0}, "nothing lies between them: set schedule.cooldown_steps"),
        ({"constant_lr": 5e-5, "anneal_steps": 20}, "the anneal would rise: lower optimizer.min_lr"),
        ({"anneal_steps": 151}, "only 150 steps follow warm-up and cooldown"),
        ({"warmup_steps": 201}, "shorten the warm-up"),
        ({"period": 7}, "only 'cyclic' takes it; remove it"),
    ],
)
def test_contradictions_are_named(fields: dict[str, Any], named: str) -> None:
    (problem,) = infinite(**fields).problems()
    assert named in problem


def test_an_anneal_to_zero_is_refused() -> None:
    config = ScheduleConfig(kind="infinite", anneal_steps=5)
    (problem,) = Schedule(config, PEAK, 0.0, 100).problems()
    assert "set optimizer.min_lr above 0" in problem


def test_a_plateau_needs_no_floor() -> None:
    config = ScheduleConfig(kind="infinite", constant_lr=CONSTANT, cooldown_steps=5)
    assert not Schedule(config, PEAK, 0.0, 100).problems()
