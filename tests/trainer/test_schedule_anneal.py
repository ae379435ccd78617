"""Annealing: stages that branch off one trunk, each from the trunk's learning rate to the floor."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from trainer.schedule import Anchor, Schedule, ScheduleConfig

PEAK, TRUNK, FLOOR, BRANCH = 1e-3, 4e-4, 1e-4, 100
STYLES = ["linear", "cosine", "1-sqrt", "exponential"]


def annealing(style: str = "linear", *, steps: int = 51, floor: float = FLOOR, **fields: Any) -> Schedule:
    """A stage of `steps` steps after BRANCH."""
    return Schedule(ScheduleConfig(kind="anneal", decay_style=style, **fields), PEAK, floor, BRANCH + steps)


TIP = Anchor(BRANCH, TRUNK)
"""Where the trunk was left."""


def rates(one: Schedule) -> list[float]:
    return [one.lr(step, TIP) for step in range(BRANCH, one.train_steps)]


@pytest.mark.parametrize(
    ("style", "middle"),
    [
        ("linear", (TRUNK + FLOOR) / 2),
        ("cosine", (TRUNK + FLOOR) / 2),
        ("1-sqrt", FLOOR + (TRUNK - FLOOR) * (1 - math.sqrt(0.5))),
        ("exponential", math.sqrt(TRUNK * FLOOR)),
    ],
)
def test_it_runs_from_the_trunks_learning_rate_to_the_floor(style: str, middle: float) -> None:
    one = annealing(style)
    curve = rates(one)
    assert (curve[0], curve[25], curve[50]) == pytest.approx((TRUNK, middle, FLOOR), rel=1e-12)
    assert all(a > b for a, b in pairwise(curve))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("steps", [11, 51, 201])
def test_several_budgets_branch_off_one_trunk(style: str, steps: int) -> None:
    one = annealing(style, steps=steps)
    curve = rates(one)
    assert len(curve) == steps
    assert (curve[0], curve[-1]) == pytest.approx((TRUNK, FLOOR), rel=1e-12)


def test_the_floor_is_kept_after_the_last_step() -> None:
    one = annealing(steps=51)
    assert one.lr(BRANCH + 500, TIP) == FLOOR


def test_an_own_length_counts_from_the_branch() -> None:
    one = annealing()
    shorter = Schedule(one.config.model_copy(update={"steps": 11}), PEAK, FLOOR, one.train_steps)
    assert shorter.lr(BRANCH + 10, TIP) == pytest.approx(FLOOR, rel=1e-12)
    assert shorter.lr(BRANCH + 9, TIP) > FLOOR


def test_all_of_it_is_annealed() -> None:
    one = annealing()
    assert {one.phase(step, TIP) for step in range(BRANCH, BRANCH + 60)} == {"annealed"}


def test_weights_without_a_learning_rate_may_name_one() -> None:
    """A folder of weights alone has none to go on from."""
    one = Schedule(ScheduleConfig(kind="anneal", warmup_init_lr=TRUNK), PEAK, FLOOR, 51)
    assert not one.problems()
    assert one.lr(0, one.begin()) == TRUNK


@pytest.mark.parametrize(
    ("one", "lr", "named"),
    [
        (annealing(), 0.0, "no learning rate to begin at"),
        (annealing(), FLOOR, "start from a checkpoint of a stable phase"),
        (annealing(warmup_steps=5), TRUNK, "remove the warm-up"),
        (annealing("exponential", floor=0.0), TRUNK, "set optimizer.min_lr above 0"),
        (annealing(decay_steps=5), TRUNK, "only 'wsd' takes it"),
    ],
)
def test_contradictions_are_named(one: Schedule, lr: float, named: str) -> None:
    (problem,) = one.problems(Anchor(BRANCH, lr))
    assert named in problem
