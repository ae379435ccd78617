"""Every layout trains the model that one rank trains: losses by source, gradient norms, weights, moments."""

from __future__ import annotations

import functools

import pytest

from tests.proof.gather import Wholes, whole_tensors
from tests.proof.worlds import Trained, World, train
from tests.ranks import run_ranks
from tools.layouts import CASES, Case

STEPS = 20

# fp32 rounds at 6e-8, and a loss averages over hundreds of tokens.
LOSS = 1e-5

# Of the way that a weight has come, and of the size of a moment. Layouts add gradients up in another order,
# and Adam divides by their size, so that where they are small their rounding shows: up to 1e-3 was seen. A
# gradient that is counted twice or left out is off by 0.3 or more.
STATE = 5e-3

# These stand for the others, which take minutes.
QUICK = {
    "TP2 SP x PP2 x DP2",
    "PP2 x VPP2",
    "DP2, plain optimizer",
    "DP3, uneven shards",
    "CP2 ring",
    "EP2",
}


@functools.cache
def one_rank(preset: str, steps: int = STEPS) -> tuple[Trained, Wholes]:
    trained = run_ranks(train, 1, World(preset=preset), steps)[0]
    return trained, whole_tensors([trained.slices])


@functools.cache
def initial_weights(preset: str) -> Wholes:
    return one_rank(preset, 0)[1]


def cases() -> list[object]:
    marks = {case.name: () if case.name in QUICK else pytest.mark.long for case in CASES}
    assert QUICK <= marks.keys()
    return [pytest.param(case, id=case.name, marks=marks[case.name]) for case in CASES]


@pytest.mark.parametrize("case", cases())
def test_a_layout_trains_what_one_rank_trains(case: Case) -> None:
    world = World.of(case)
    alone, expected = one_rank(world.preset)
    ranks = run_ranks(train, world.ranks, world, STEPS, deadline=280)

    assert {tuple(report.loss for report in rank.reports) for rank in ranks} == {
        tuple(report.loss for report in ranks[0].reports)
    }, "every rank reports the same losses"
    for report, one in zip(ranks[0].reports, alone.reports, strict=True):
        assert report.loss == pytest.approx(one.loss, rel=LOSS)
        assert report.grad_norm == pytest.approx(one.grad_norm, rel=STATE)
        for (loss, tokens), (one_loss, one_tokens) in zip(report.by_source, one.by_source, strict=True):
            assert loss == pytest.approx(one_loss, rel=LOSS)
            assert tokens == one_tokens

    assert alone.reports[-1].loss < 0.9 * alone.reports[0].loss, "there is something to compare"
    found = whole_tensors([rank.slices for rank in ranks])
    assert found.keys() == expected.keys()
    begun = initial_weights(world.preset)
    far = {
        key: error
        for key, one in expected.items()
        if not (error := float((found[key] - one).norm() / (one - begun[key]).norm())) < STATE
    }
    assert not far


def test_the_comparison_sees_a_wrong_gradient() -> None:
    """Moments start at zero, so their way is their size: one that is scaled by 1.01 is found."""
    expected, begun = one_rank("tiny")[1], initial_weights("tiny")
    key = ("model.norm.weight", "exp_avg")
    assert float(begun[key].abs().max()) == 0
    wrong = expected[key] * 1.01
    assert float((wrong - expected[key]).norm() / (expected[key] - begun[key]).norm()) > STATE
