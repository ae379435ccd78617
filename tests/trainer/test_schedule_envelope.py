"""The peak of each stage under an envelope."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trainer.schedule import CURVES, EnvelopeConfig, Schedule, ScheduleConfig
from trainer.schedule.envelope import envelope

PEAK, FLOOR = 1e-3, 1e-5


def stage(number: int, **fields: Any) -> Schedule:
    config = ScheduleConfig(warmup_steps=10, envelope=EnvelopeConfig(stage=number, **fields))
    return Schedule(config, PEAK, FLOOR, 100)


@pytest.mark.parametrize(
    ("fields", "shares"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"kind": "linear", "stages": 5, "last": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
        ({"kind": "cosine", "stages": 5, "last": 0.2}, [1, 0.6 + 0.4 * math.sqrt(0.5), 0.6, None, 0.2]),
        ({"kind": "inverse_sqrt"}, [1, 1 / math.sqrt(2), 1 / math.sqrt(3), 0.5, 1 / math.sqrt(5)]),
        ({"kind": "exponential", "factor": 0.5}, [1, 0.5, 0.25, 0.125, 0.0625]),
    ],
)
def test_hand_computed_shares(fields: dict[str, Any], shares: list[float | None]) -> None:
    for number, share in enumerate(shares):
        if share is not None:
            assert envelope(EnvelopeConfig(stage=number, **fields)) == pytest.approx(share, rel=1e-12)


def test_the_warmup_reaches_the_stages_own_peak() -> None:
    one = stage(3, kind="inverse_sqrt")
    assert max(one.lr(step, one.begin()) for step in range(100)) == one.lr(10, one.begin()) == PEAK / 2


def test_the_floor_stays() -> None:
    one = stage(2, kind="exponential")
    assert one.lr(99, one.begin()) == pytest.approx(FLOOR, rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "inverse_sqrt", "exponential"])
def test_the_first_stage_is_as_without_an_envelope(kind: str) -> None:
    plain = stage(0)
    enveloped = stage(0, **{"kind": kind, "stages": 4} if kind in ("linear", "cosine") else {"kind": kind})
    assert [enveloped.lr(s, plain.begin()) for s in range(100)] == [
        plain.lr(s, plain.begin()) for s in range(100)
    ]


def test_every_curve_of_a_later_stage_stays_below_its_peak() -> None:
    for kind in CURVES:
        period = {"period": 20} if kind == "cyclic" else {}
        config = ScheduleConfig(kind=kind, envelope=EnvelopeConfig(kind="exponential", stage=2), **period)
        one = Schedule(config, PEAK, FLOOR, 100)
        assert max(one.lr(step, one.begin()) for step in range(100)) <= PEAK / 4


@pytest.mark.parametrize(
    ("number", "fields", "named"),
    [
        (0, {"kind": "cosine"}, "schedule.envelope.stages is missing"),
        (3, {"kind": "linear", "stages": 3}, "this is number 4 of them: raise schedule.envelope.stages"),
        (0, {"kind": "inverse_sqrt", "stages": 3}, "only 'linear' and 'cosine' takes it; remove it"),
        (0, {"kind": "linear", "stages": 3, "factor": 0.9}, "only 'exponential' takes it; remove it"),
        (8, {"kind": "exponential"}, "a peak of 3.90625e-06: lower optimizer.min_lr"),
    ],
)
def test_contradictions_are_named(number: int, fields: dict[str, Any], named: str) -> None:
    (problem,) = stage(number, **fields).problems()
    assert named in problem
