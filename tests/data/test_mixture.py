"""The order of the sources."""

import numpy as np
import pytest

from trainer.data.mixture import deal, rank_among_equals
from trainer.data.weights import WHOLE, quantise

WEIGHTS = [
    [1.0],
    [0.5, 0.5],
    [0.7, 0.2, 0.1],
    [1 / 3, 1 / 3, 1 / 3],
    [0.501, 0.499],
    [1000.0, 1.0, 1.0, 1.0],
    [1.0, 0.0, 2.0],
    (np.random.default_rng(0).pareto(1.0, 200) + 1e-3).tolist(),
]


def units(weights: list[float]) -> list[int]:
    return list(quantise({str(n): one for n, one in enumerate(weights)}).values())


def lags(weights: list[int], dealt: list[int], before: list[int]) -> list[int]:
    count = sum(dealt)
    return [b + count * w - d * WHOLE for b, w, d in zip(before, weights, dealt, strict=True)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
def test_every_prefix_keeps_to_the_weights_within_one_sequence(weights: list[float]) -> None:
    count, whole = 5000, units(weights)
    sources = deal(whole, [0] * len(whole), count)
    taken = np.cumsum(sources[:, None] == np.arange(len(whole)), axis=0)
    wanted = np.arange(1, count + 1)[:, None] * np.array(whole)
    assert np.abs(taken * WHOLE - wanted).max() < WHOLE


@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
def test_the_lags_are_the_whole_state(weights: list[float]) -> None:
    whole = units(weights)
    once = deal(whole, [0] * len(whole), 1000).tolist()
    pieces, owed = [], [0] * len(whole)
    for count in (1, 7, 300, 692):
        piece = deal(whole, owed, count)
        owed = lags(whole, np.bincount(piece, minlength=len(whole)).tolist(), owed)
        pieces += piece.tolist()
    assert pieces == once


def test_ranks() -> None:
    assert rank_among_equals(np.array([3, 1, 3, 3, 1], np.int32)).tolist() == [0, 0, 1, 2, 1]


def test_changing_weights_bound_the_debts() -> None:
    """Never a sequence too many, and no source waits for more than the others' advances."""
    random, sources = np.random.default_rng(3), 12
    owed, least, most = [0] * sources, 0, 0
    for _ in range(2000):
        whole = units((random.pareto(0.5, sources) + 1e-4).tolist())
        for _ in range(int(random.integers(1, 20))):
            chosen = deal(whole, owed, 1)
            owed = lags(whole, np.bincount(chosen, minlength=sources).tolist(), owed)
            least, most = min(least, *owed), max(most, *owed)
    assert -WHOLE < least
    assert WHOLE < most < (sources - 1) * WHOLE


def test_a_rare_source_does_not_starve_when_weights_change_often() -> None:
    random, owed, dealt = np.random.default_rng(0), [0] * 3, 0
    for _ in range(1000):
        share = float(random.uniform(0.3, 0.7))
        whole = units([share, 0.999 - share, 0.001])
        chosen = np.bincount(deal(whole, owed, 10), minlength=3).tolist()
        owed = lags(whole, chosen, owed)
        dealt += chosen[2]
    assert abs(dealt - 10) <= 1


def test_weight_zero_waits_with_what_it_is_owed() -> None:
    whole = units([0.5, 0.5, 0.0])
    owed = [-WHOLE // 4, -WHOLE // 4, WHOLE // 2]
    sources = deal(whole, owed, 100)
    assert np.bincount(sources, minlength=3).tolist() == [50, 50, 0]
