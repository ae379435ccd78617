"""The order of the sources."""

import numpy as np
import pytest

from trainer.data.mixture import Mixture

WEIGHTS = [
    [1.0],
    [0.5, 0.5],
    [0.7, 0.2, 0.1],
    [1 / 3, 1 / 3, 1 / 3],
    [0.501, 0.499],
    [1000.0, 1.0, 1.0, 1.0],
    (np.random.default_rng(0).pareto(1.0, 200) + 1e-3).tolist(),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
def test_every_prefix_keeps_to_the_weights_within_one_sequence(weights: list[float]) -> None:
    count = 5000
    sources, _ = Mixture(weights).deal(0, count)
    taken = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    wanted = np.arange(1, count + 1)[:, None] * (np.array(weights) / sum(weights))
    assert np.abs(taken - wanted).max() < 1


@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
def test_each_source_counts_its_own_sequences(weights: list[float]) -> None:
    sources, numbers = Mixture(weights).deal(0, 1000)
    for source in range(len(weights)):
        own = numbers[sources == source]
        assert own.tolist() == list(range(len(own)))


def test_the_order_does_not_depend_on_what_was_asked_before() -> None:
    weights = [0.7, 0.2, 0.1]
    whole = Mixture(weights).deal(0, 2000)
    mixture = Mixture(weights)
    for first, count in [(1500, 10), (3, 7), (0, 1), (1999, 1), (1500, 500), *((n, 1) for n in range(40))]:
        for got, expected in zip(mixture.deal(first, count), whole, strict=True):
            assert got.tolist() == expected[first : first + count].tolist()


def test_counts_are_the_whole_state() -> None:
    weights = [3.0, 2.0, 0.5]
    expected = Mixture(weights).deal(10_000, 300)
    resumed = Mixture(weights)
    resumed.resume(10_000, Mixture(weights).counts(10_000))
    for got, wanted in zip(resumed.deal(10_000, 300), expected, strict=True):
        assert got.tolist() == wanted.tolist()
