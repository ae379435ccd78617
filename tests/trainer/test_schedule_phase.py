"""Phases, thresholds and purity of every kind of schedule."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from trainer.schedule import CURVES, Anchor, Phase, Schedule, ScheduleConfig

PEAK, FLOOR = 1e-3, 1e-4
ANCHOR = Anchor(7, 2e-4)
FIELDS: dict[str, dict[str, Any]] = {
    "wsd": {"decay_steps": 20},
    "infinite": {"cooldown_steps": 20, "constant_lr": 4e-4, "anneal_steps": 20},
    "anneal": {"warmup_steps": 0},
    "cyclic": {"period": 30, "period_growth": 1.5, "peak_decay": 0.8},
}


def schedule(kind: str, **fields: Any) -> Schedule:
    """100 steps from ANCHOR, ten of them warm-up."""
    given = {"warmup_steps": 10} | FIELDS.get(kind, {}) | fields
    return Schedule(ScheduleConfig(kind=kind, **given), PEAK, FLOOR, 107)


def test_every_kind_here_has_no_contradiction() -> None:
    assert not any(schedule(kind).problems(ANCHOR) for kind in CURVES)


@pytest.mark.parametrize("kind", CURVES)
def test_learning_rate_and_phase_depend_on_the_step_alone(kind: str) -> None:
    """In any order, asked any number of times, of another instance."""
    one, other = schedule(kind), schedule(kind)
    forth = {step: (one.lr(step, ANCHOR), one.phase(step, ANCHOR)) for step in range(7, 130)}
    back = {step: (other.lr(step, ANCHOR), other.phase(step, ANCHOR)) for step in reversed(range(7, 130))}
    assert forth == back


@pytest.mark.parametrize("kind", CURVES)
def test_a_resume_goes_on_bit_for_bit(kind: str) -> None:
    """The anchor is all that a checkpoint keeps of a schedule."""
    saved = Anchor.from_json(json.loads(json.dumps(Anchor(7, 0.1 + 0.2).to_json())))
    before, after = schedule(kind), schedule(kind)
    assert [after.lr(step, saved) for step in range(50, 107)] == [
        before.lr(step, Anchor(7, 0.1 + 0.2)) for step in range(50, 107)
    ]


@pytest.mark.parametrize("kind", CURVES)
def test_a_schedule_moves_with_its_anchor(kind: str) -> None:
    later = Anchor(1007, ANCHOR.lr)
    one = schedule(kind)
    moved = Schedule(one.config, PEAK, FLOOR, 1107)
    assert [one.lr(s, ANCHOR) for s in range(7, 130)] == [moved.lr(s + 1000, later) for s in range(7, 130)]


@pytest.mark.parametrize(
    ("kind", "phases"),
    [
        ("constant", ["warmup", "stable"]),
        ("linear", ["warmup", "decay"]),
        ("cosine", ["warmup", "decay"]),
        ("inverse_sqrt", ["warmup", "decay"]),
        ("wsd", ["warmup", "stable", "annealed"]),
        ("infinite", ["warmup", "cooldown", "stable", "annealed"]),
        ("anneal", ["annealed"]),
        ("cyclic", ["warmup", "decay"]),
    ],
)
def test_phases_come_in_order(kind: str, phases: list[Phase]) -> None:
    one = schedule(kind)
    found = [one.phase(step, ANCHOR) for step in range(7, 107)]
    assert list(dict.fromkeys(found)) == phases
    assert found == sorted(found, key=phases.index)


def test_the_plateau_of_wsd_ends_where_its_learning_rate_falls() -> None:
    one = schedule("wsd")
    falls = [one.lr(step, ANCHOR) < PEAK for step in range(17, 107)]
    assert falls == [one.phase(step, ANCHOR) == "annealed" for step in range(17, 107)]
    assert sum(falls) == 20


@pytest.mark.parametrize("kind", CURVES)
@pytest.mark.parametrize("lr", [0.0, 5e-5, FLOOR, 1.7e-4, 2e-4, 4e-4, 6.6e-4, PEAK, 2e-3])
def test_the_first_step_below_is_the_one_that_a_search_finds(kind: str, lr: float) -> None:
    one = schedule(kind)
    steps = range(7 + one.config.warmup_steps, 2_000)
    searched = next((step for step in steps if one.lr(step, ANCHOR) <= lr), None)
    assert one.first_step_below(lr, ANCHOR) == searched


def test_a_threshold_on_a_cosine_is_crossed_where_its_formula_says() -> None:
    """A fifth of the peak, as in Reuse, Don't Retrain: cos(pi p) = 2 x 0.2 - 1 when the floor is 0."""
    one = Schedule(ScheduleConfig(kind="cosine"), PEAK, 0.0, 1001)
    assert one.first_step_below(PEAK / 5, Anchor()) == math.ceil(1000 * math.acos(2 * 0.2 - 1) / math.pi)


def test_an_inverse_square_root_may_cross_far_after_its_run() -> None:
    one = Schedule(ScheduleConfig(kind="inverse_sqrt", warmup_steps=100), PEAK, 0.0, 1000)
    assert one.first_step_below(PEAK / 50, Anchor()) == pytest.approx(100 * 50**2, abs=1)
    assert one.first_step_below(0.0, Anchor()) is None
