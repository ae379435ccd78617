"""Learning rates at hand-computed points, at the borders of phases, and across a resume."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from trainer.schedule import CURVES, Anchor, Schedule, ScheduleConfig

PEAK, FLOOR = 1e-3, 1e-4
NEEDED: dict[str, dict[str, Any]] = {"cyclic": {"period": 91}}
"""What a kind does not go without."""
WARMED = [kind for kind in CURVES if kind != "anneal"]  # which begins at the checkpoint's learning rate


def schedule(kind: str, *, train_steps: int = 101, **fields: Any) -> Schedule:
    return Schedule(ScheduleConfig(kind=kind, **(NEEDED.get(kind, {}) | fields)), PEAK, FLOOR, train_steps)


def rates(one: Schedule, anchor: Anchor | None = None) -> list[float]:
    anchor = anchor or one.begin()
    return [one.lr(step, anchor) for step in range(anchor.step, anchor.step + one.length(anchor))]


@pytest.mark.parametrize(
    ("kind", "fields", "step", "lr"),
    [
        ("constant", {}, 77, PEAK),
        ("linear", {}, 0, PEAK),
        ("linear", {}, 50, FLOOR + 0.5 * (PEAK - FLOOR)),
        ("linear", {}, 100, FLOOR),
        ("cosine", {}, 25, FLOOR + (PEAK - FLOOR) * (1 + math.sqrt(0.5)) / 2),
        ("cosine", {}, 50, FLOOR + (PEAK - FLOOR) * 0.5),
        ("cosine", {}, 100, FLOOR),
        ("cosine", {"steps": 51}, 50, FLOOR),
        ("cosine", {"steps": 51}, 90, FLOOR),
        ("inverse_sqrt", {"warmup_steps": 4}, 16, PEAK / 2),
        ("inverse_sqrt", {"warmup_steps": 4}, 64, PEAK / 4),
        ("inverse_sqrt", {}, 100, PEAK / 10),
        ("wsd", {"decay_steps": 20}, 80, PEAK),
        ("wsd", {"decay_steps": 20, "decay_style": "linear"}, 90, (PEAK + FLOOR) / 2),
        ("wsd", {"decay_steps": 20, "decay_style": "cosine"}, 90, (PEAK + FLOOR) / 2),
        ("wsd", {"decay_steps": 20, "decay_style": "1-sqrt"}, 85, (PEAK + FLOOR) / 2),
        ("wsd", {"decay_steps": 20, "decay_style": "exponential"}, 90, math.sqrt(PEAK * FLOOR)),
        ("wsd", {}, 90, PEAK),  # a tenth of the schedule by default
        ("wsd", {}, 100, FLOOR),
    ],
)
def test_hand_computed_points(kind: str, fields: dict[str, Any], step: int, lr: float) -> None:
    one = schedule(kind, **fields)
    assert one.lr(step, one.begin()) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize("kind", WARMED)
def test_warmup_is_straight_and_reaches_the_peak_at_its_last_step(kind: str) -> None:
    one = schedule(kind, warmup_steps=10, warmup_init_lr=2e-4)
    assert rates(one)[:11] == pytest.approx([2e-4 + 8e-5 * step for step in range(11)])


@pytest.mark.parametrize("kind", WARMED)
def test_no_jump_anywhere(kind: str) -> None:
    """Neighbouring steps differ by at most the steepest slope: 1-sqrt loses sqrt(1/20) in its first step."""
    one = schedule(kind, warmup_steps=10, **({"decay_steps": 20} if kind == "wsd" else {}))
    curve = rates(one)
    steepest = PEAK * (math.sqrt(1 / 20) if kind == "wsd" else 1 / 10) * 1.0001
    assert max(abs(a - b) for a, b in pairwise(curve)) <= steepest


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("style", ["linear", "cosine", "exponential", "1-sqrt"])
def test_the_floor_is_reached_at_the_last_step_and_not_before(kind: str, style: Any) -> None:
    curve = rates(schedule(kind, warmup_steps=10, decay_style=style))
    assert curve[-1] == pytest.approx(FLOOR, rel=1e-12)
    assert min(curve[10:-1]) > FLOOR


def test_inverse_sqrt_stops_at_the_floor() -> None:
    assert min(rates(schedule("inverse_sqrt", train_steps=1000))) == FLOOR


def test_a_longer_wsd_run_changes_nothing_before_the_decay() -> None:
    short, long = (schedule("wsd", train_steps=n, warmup_steps=5, decay_steps=20) for n in (100, 200))
    assert rates(short)[:80] == rates(long)[:80]


def test_rewarming_starts_at_the_checkpoint_and_decays_again() -> None:
    one = schedule("cosine", train_steps=201, warmup_steps=10)
    curve = rates(one, Anchor(100, FLOOR))
    assert curve[0] == FLOOR
    assert curve[10] == PEAK
    assert curve[55] == pytest.approx((PEAK + FLOOR) / 2)
    assert curve[-1] == pytest.approx(FLOOR)
    assert len(curve) == 101


def test_anchor_survives_json() -> None:
    anchor = Anchor(17, 0.1 + 0.2)
    assert Anchor.from_json(anchor.to_json()) == anchor


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("cosine", {"warmup_steps": 101}, "schedule.warmup_steps is 101"),
        ("cosine", {"decay_steps": 5}, "schedule.kind is 'cosine'"),
        ("wsd", {"warmup_steps": 50, "decay_steps": 51}, "only 50 steps follow"),
    ],
)
def test_contradictions_are_named(kind: str, fields: dict[str, Any], named: str) -> None:
    problems = schedule(kind, **fields).problems()
    assert len(problems) == 1
    assert named in problems[0]


def test_exponential_decay_needs_a_floor_above_zero() -> None:
    one = Schedule(ScheduleConfig(kind="wsd", decay_style="exponential"), PEAK, 0.0, 100)
    assert any("optimizer.min_lr is 0" in problem for problem in one.problems())


def test_a_resumed_schedule_too_short_for_its_warmup_is_named() -> None:
    one = schedule("cosine", warmup_steps=10)
    assert not one.problems()
    assert "6 steps from step 95" in one.problems(Anchor(95, FLOOR))[0]
