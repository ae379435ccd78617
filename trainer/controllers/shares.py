"""Weights that sum to 1, and what is done with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

ROUNDING = 1e-12
"""Weights whose sum is as near to 1 as this are taken to sum to 1."""


def checked(weights: object, sources: Sequence[str]) -> dict[str, float]:
    """`weights` of these sources, in their order, summing to 1.

    Raises:
        ValueError: they are no finite numbers of at least 0 for exactly these sources, or all are 0.
    """
    if not isinstance(weights, Mapping):
        raise ValueError(f"expected a weight for each source, found {_short(weights)}")
    wrong = [f"no source is called {name!r}" for name in weights if name not in sources]
    for name in sources:
        one = weights.get(name)
        if not isinstance(one, float | int) or isinstance(one, bool) or not 0 <= one < math.inf:
            said = _short(one) if name in weights else "nothing"
            wrong.append(f"the weight of {name!r} is {said}, expected a finite number of at least 0")
    if wrong:
        raise ValueError("; ".join(wrong))
    floats = {name: float(weights[name]) for name in sources}
    largest = max(floats.values(), default=0.0)
    if largest == 0.0:
        raise ValueError("all weights are 0")
    if abs(math.fsum(one / largest for one in floats.values()) * largest - 1.0) <= ROUNDING:
        return floats  # dividing once more would move bits, and a log could not be replayed
    scaled = {name: one / largest for name, one in floats.items()}  # their sum is finite
    total = math.fsum(scaled.values())
    return {name: one / total for name, one in scaled.items()}


def with_frozen(
    weights: Mapping[str, float], held: Mapping[str, float], frozen: Sequence[str]
) -> dict[str, float]:
    """`weights` with the frozen sources at what they hold, and the others sharing the rest.

    Args:
        weights: sum to 1.
        held: the weights in force; sum to 1.
    """
    if not frozen:
        return dict(weights)
    free = [name for name in weights if name not in frozen]
    rest = 1.0 - math.fsum(held[name] for name in frozen)
    total = math.fsum(weights[name] for name in free)
    if total <= 0.0:
        return dict(held)
    return {name: weights[name] / total * rest if name in free else held[name] for name in weights}


def exponentiated(weights: Mapping[str, float], exponents: Mapping[str, float]) -> dict[str, float]:
    """w_i exp(e_i) / sum of w_j exp(e_j); what has no exponent takes the weighted mean of the others'."""
    known = math.fsum(weights[name] for name in exponents)
    mean = math.fsum(weights[n] * e for n, e in exponents.items()) / known if known else 0.0
    powers = {name: exponents.get(name, mean) for name in weights}
    highest = max((powers[name] for name in weights if weights[name] > 0), default=0.0)
    raw = {n: one * math.exp(min(0.0, powers[n] - highest)) for n, one in weights.items()}
    total = math.fsum(raw.values())
    return {name: one / total for name, one in raw.items()}


def smoothed(weights: Mapping[str, float], amount: float, names: Sequence[str]) -> dict[str, float]:
    """(1 - c) w + c / k over the k sources `names`, as DoReMi does (Xie et al. 2023, arXiv 2305.10429).

    The share that these have together stays the same.
    """
    if not amount or not names:
        return dict(weights)
    even = math.fsum(weights[name] for name in names) / len(names)
    return {n: (1 - amount) * w + amount * even if n in names else w for n, w in weights.items()}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
