"""Average, transfer and forgetting: by hand, and against a problem whose forgetting has a formula."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.forgetting.matrix import Matrix
from trainer.forgetting.metrics import forgetting_by_set, most_changed, summarise


def matrix(rows: list[list[float | None]], learned: list[int | None], sets: str = "abcdefgh") -> Matrix:
    stages = tuple(f"stage {number}" for number in range(1, len(rows)))
    return Matrix(tuple(sets[: len(learned)]), stages, tuple(map(tuple, rows)), tuple(learned))


THREE = matrix(
    [
        [5.0, 6.0, 7.0],  # before
        [1.0, 5.0, 7.5],
        [1.5, 2.0, 6.0],
        [3.0, 1.5, 0.5],
    ],
    [1, 2, 3],
)


def test_by_hand() -> None:
    found = summarise(THREE)
    assert found.average == pytest.approx((3.0 + 1.5 + 0.5) / 3)
    assert found.average_learned == pytest.approx((1.0, (1.5 + 2.0) / 2, 5.0 / 3))
    assert found.forgetting == pytest.approx(((3.0 - 1.0) + (1.5 - 2.0)) / 2)
    assert found.backward_transfer == pytest.approx(-0.75)
    assert found.forward_transfer == pytest.approx(((6.0 - 5.0) + (7.0 - 6.0)) / 2)
    assert found.forgetting_from_best == pytest.approx(((3.0 - 1.0) + (1.5 - 2.0)) / 2)


def test_what_was_best_in_between_is_forgotten_too() -> None:
    found = summarise(matrix([[5.0, 5.0, 5.0], [2.0, 5.0, 5.0], [1.0, 1.0, 5.0], [2.0, 1.0, 1.0]], [1, 2, 3]))
    assert (found.forgetting, found.forgetting_from_best) == (0.0, 0.5)


def test_a_loss_that_rises_is_forgetting_and_one_that_falls_is_transfer() -> None:
    worse = summarise(matrix([[5.0, 5.0], [1.0, 6.0], [2.0, 1.0]], [1, 2]))
    better = summarise(matrix([[5.0, 5.0], [1.0, 4.0], [0.5, 1.0]], [1, 2]))
    assert (worse.forgetting, worse.backward_transfer, worse.forward_transfer) == (1.0, -1.0, -1.0)
    assert (better.forgetting, better.backward_transfer, better.forward_transfer) == (-0.5, 0.5, 1.0)


def test_what_the_checkpoint_knew_is_forgotten_from_the_start_on() -> None:
    found = matrix([[1.0, 5.0], [1.75, 2.0]], [0, 1])
    assert forgetting_by_set(found) == [0.75, None]
    assert summarise(found).forgetting == 0.75
    assert summarise(found).average_learned == (pytest.approx(1.875),)


def test_a_set_that_nothing_taught_is_in_the_average_only() -> None:
    found = summarise(matrix([[5.0, 5.0], [1.0, 4.0], [1.0, 9.0]], [1, None]))
    assert (found.average, found.forgetting, found.forward_transfer) == (5.0, 0.0, None)
    assert found.average_learned == (1.0, 1.0)


def test_one_stage_has_nothing_to_forget() -> None:
    found = summarise(matrix([[5.0], [1.0]], [1]))
    assert (found.forgetting, found.backward_transfer, found.forward_transfer) == (None, None, None)
    assert found.average == 1.0


def test_without_a_value_before_the_first_stage_there_is_no_forward_transfer_from_it() -> None:
    found = summarise(matrix([[None, None], [1.0, 4.0], [2.0, 1.0]], [1, 2]))
    assert (found.forgetting, found.forward_transfer) == (1.0, None)


def test_a_loss_that_is_not_finite_is_not_averaged_away() -> None:
    found = summarise(matrix([[5.0, 5.0], [1.0, 4.0], [math.inf, 1.0]], [1, 2]))
    assert found.forgetting == math.inf
    assert math.isnan(summarise(matrix([[5.0], [1.0], [math.nan]], [1])).forgetting or 0.0)


def test_the_sets_that_changed_most_are_shown_in_their_order() -> None:
    found = matrix([[9.0] * 3, [1.0, 1.0, 1.0], [1.1, 3.0, 0.2]], [1, 1, 1])
    assert most_changed(found, 2) == [1, 2]


# Linear regression with more parameters than samples, one task after the other, each solved exactly by the
# nearest solution to the last weights (Lin, Ju, Liang, Shroff 2023, arXiv 2302.05836, sections 2 and 3).
# The loss of task i is the squared distance of the weights to its own truth w_i.
DIMENSION, SAMPLES, TASKS, NOISE, REPEATS = 60, 15, 4, 0.3, 1500
TRUTHS = np.random.default_rng(5).normal(size=(TASKS, DIMENSION)) / math.sqrt(DIMENSION)


def expected_loss(task: int, after: int) -> float:
    """Of `task` after so many tasks, counted from 1.

    One solution keeps the part of the weights that its samples do not see: with r = 1 - n/p, the expected
    squared distance to w_i becomes r x the last + (1 - r) |w_t - w_i|^2 + sigma^2 n/(p - n - 1); the last
    term comes from E[(X X^T)^-1] = I/(p - n - 1).
    """
    kept = 1 - SAMPLES / DIMENSION
    loss = float(np.sum(TRUTHS[task] ** 2))
    for other in TRUTHS[:after]:
        noise = NOISE**2 * SAMPLES / (DIMENSION - SAMPLES - 1)
        loss = kept * loss + (1 - kept) * float(np.sum((other - TRUTHS[task]) ** 2)) + noise
    return loss


def simulated(generator: np.random.Generator) -> np.ndarray:
    """R of one run: [tasks + 1, tasks]."""
    weights, rows = np.zeros(DIMENSION), []
    for task in range(TASKS + 1):
        rows.append(((weights - TRUTHS) ** 2).sum(axis=1))
        if task < TASKS:
            features = generator.normal(size=(SAMPLES, DIMENSION))
            targets = features @ TRUTHS[task] + NOISE * generator.normal(size=SAMPLES)
            weights = weights + np.linalg.lstsq(features, targets - features @ weights, rcond=None)[0]
    return np.array(rows)


@pytest.mark.parametrize("name", ["average", "forgetting", "backward_transfer", "forward_transfer"])
def test_linear_regression_forgets_as_its_formula_says(name: str) -> None:
    generator = np.random.default_rng(11)
    learned = list(range(1, TASKS + 1))
    runs = [summarise(matrix(simulated(generator).tolist(), learned)) for _ in range(REPEATS)]
    values = np.array([getattr(one, name) for one in runs])
    last = {task: expected_loss(task, TASKS) for task in range(TASKS)}
    theory = {
        "average": sum(last.values()) / TASKS,
        "forgetting": sum(last[i] - expected_loss(i, i + 1) for i in range(TASKS - 1)) / (TASKS - 1),
        "forward_transfer": sum(expected_loss(i, 0) - expected_loss(i, i) for i in range(1, TASKS))
        / (TASKS - 1),
    }
    theory["backward_transfer"] = -theory["forgetting"]
    error = values.std() / math.sqrt(REPEATS)
    assert values.mean() == pytest.approx(theory[name], abs=4 * error)  # beyond: once in 16,000 seeds
    assert abs(theory[name]) > 20 * error  # so that a wrong sign or factor shows
