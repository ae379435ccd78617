"""A claim is one number of every seed, and the sign that a paper says it has."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from tools.continual_table.arm import NEW, OLD
from tools.continual_table.outcome import Curve, Outcome, Seed
from trainer.forgetting.gap import Gap, measure_gap

Sign = Literal["below 0", "above 0", "0", "within noise"]
Kind = Literal["forgetting", "new", "exact"]
"""Which noise a number is compared with: that of the loss on the old set, on the new ones, or none."""


@dataclass(frozen=True)
class Claim:
    """What is expected of a method.

    Attributes:
        says: the expectation in words, and whose it is.
        number: what is measured, in words.
        value: it, from the outcomes of one seed; in nats unless `number` says otherwise.
        sign: that it is expected to have.
        noise: what its size is compared with.
    """

    method: str
    says: str
    number: str
    value: Callable[[Seed], float]
    sign: Sign
    noise: Kind = "exact"


@dataclass(frozen=True)
class Found:
    """What came of a claim.

    Attributes:
        values: by seed, in their order.
        verdict: "yes" where every seed has the sign; "yes, within noise" where the median is no larger than
            the noise; "2 of 3" where some have it; "no" where none has.
    """

    claim: Claim
    values: tuple[float, ...]
    verdict: str

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def judge(claim: Claim, values: Sequence[float], noise: Mapping[str, float]) -> Found:
    """Compare the numbers of all seeds with the claim.

    Args:
        noise: by `Kind`, the size of a difference that chance alone makes.
    """
    limit = noise.get(claim.noise, 0.0)
    held = [_has_sign(value, claim.sign, limit) for value in values]
    if not any(held):
        verdict = "no"
    elif not all(held):
        verdict = f"{sum(held)} of {len(held)}"
    elif claim.sign in ("below 0", "above 0") and abs(statistics.median(values)) <= limit:
        verdict = "yes, within noise"
    else:
        verdict = "yes"
    return Found(claim, tuple(values), verdict)


def _has_sign(value: float, sign: Sign, noise: float) -> bool:
    match sign:
        case "below 0":
            return value < 0
        case "above 0":
            return value > 0
        case "0":
            return value == 0
        case "within noise":
            return abs(value) <= noise


def measure_noise(seeds: Sequence[Seed]) -> dict[str, float]:
    """The largest difference, over the seeds, between two runs of one arm that read other documents."""
    pairs = [(seed["replay-25"], seed["replay-25-again"]) for seed in seeds]
    return {
        "forgetting": max(abs(one.end[OLD] - other.end[OLD]) for one, other in pairs),
        "new": max(abs(one.end[NEW] - other.end[NEW]) for one, other in pairs),
    }


def forgotten(seed: Seed, arm: str, *, of: str = "") -> float:
    """R[T, prose] - R[l, prose]: prose is learned when the base is done. `of` is "" or " (average)"."""
    return seed[arm].end[OLD + of] - seed["base"].end[OLD]


def new_loss(seed: Seed, arm: str, *, of: str = "") -> float:
    """The loss on code at the end."""
    return seed[arm].end[NEW + of]


def mean_loss(outcome: Outcome, sets: Sequence[str]) -> float:
    """Over several sets at the end."""
    return statistics.fmean(outcome.end[name] for name in sets)


def least_step(values: Sequence[float]) -> float:
    """The smallest rise from one value to the next: above 0 where they rise strictly."""
    return min(later - earlier for earlier, later in pairwise(values))


def peak(curve: Curve) -> float:
    """The highest loss after the first point, which is where the stage began."""
    return max(loss for _, loss in curve[1:])


def gap_of(outcome: Outcome, name: str, stage: str) -> Gap:
    """The stability gap of one set in one stage."""
    gap = measure_gap(outcome.curves[stage][name])
    assert gap is not None, "dense arms are evaluated at their start"
    return gap


def beside_front(points: Sequence[tuple[float, float]], point: tuple[float, float]) -> float:
    """How far `point` lies above the line through `points`, straight between them and beyond.

    With (forgetting, loss on the new set), below 0 is a lower new loss at the same forgetting.
    """
    x, y = point
    line = sorted(points)
    (x0, y0), (x1, y1) = next((pair for pair in pairwise(line) if x <= pair[1][0]), (line[-2], line[-1]))
    return y - (y0 + (y1 - y0) * (x - x0) / (x1 - x0))
