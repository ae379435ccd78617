"""Ways down: each maps progress p from 0 to 1 to the part of the height that is left, from 1 to 0."""

from __future__ import annotations

import math
from collections.abc import Callable


def decay_linear(progress: float) -> float:
    """1 - p."""
    return 1 - progress


def decay_cosine(progress: float) -> float:
    """(1 + cos(pi p)) / 2 (Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5)."""
    return (1 + math.cos(math.pi * progress)) / 2


def decay_one_minus_sqrt(progress: float) -> float:
    """1 - sqrt(p) (Hägele et al. 2024, arXiv 2405.18392, section 3.2)."""
    return 1 - math.sqrt(progress)


def decay_inverse_sqrt(progress: float, steepness: float) -> float:
    """1 - h(p) / h(1), where h(x) = 1 / sqrt(1 + steepness x) - 1.

    The cooldown of the infinite schedule (Ibrahim et al. 2024, arXiv 2403.08763).
    """
    return 1 - _inverse_sqrt(progress, steepness) / _inverse_sqrt(1.0, steepness)


def _inverse_sqrt(progress: float, steepness: float) -> float:
    return 1 / math.sqrt(1 + steepness * progress) - 1


DECAYS: dict[str, Callable[[float], float]] = {
    "linear": decay_linear,
    "cosine": decay_cosine,
    "1-sqrt": decay_one_minus_sqrt,
}


def interpolate(high: float, low: float, *, style: str, progress: float) -> float:
    """From `high` at progress 0 down to `low` at progress 1 in one of the decay styles.

    "exponential" is high x (low / high)^p, so that it ends at `low` exactly; both must be above 0.
    """
    if style == "exponential":
        return high * (low / high) ** progress
    return low + (high - low) * DECAYS[style](progress)
