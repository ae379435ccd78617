"""The stability gap: how a source that is not new fares inside one stage, against where the stage began.

A new stage often unlearns at first what it keeps in the end (De Lange et al. 2023, arXiv 2205.13452; in
continual pre-training: Guo et al. 2024, arXiv 2406.14833). It is measured on the loss curve L of a validation
set, which begins at L[0] before the first step of the stage; between evaluations it is taken to be straight.

    depth          max over steps of L - L[0], where that is positive, else 0
    width          steps on which L is above L[0]
    recovery step  the first evaluated step after that maximum with L <= L[0]; none: not back
    drop           max over steps of L[0] - L, where that is positive, else 0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Gap:
    """Losses in nats per token; steps as the run numbers them.

    Attributes:
        depth, depth_step: largest rise over the start, infinite where the loss is not finite; None for the
            step where it never rose.
        width: steps above the start.
        recovery_step: where it was back; None where it was not, or never rose.
        drop, drop_step: largest fall below the start, and None where it never fell.
        change: of the last evaluation against the start.
    """

    start_step: int
    start_loss: float
    end_step: int
    depth: float
    depth_step: int | None
    width: float
    recovery_step: int | None
    drop: float
    drop_step: int | None
    change: float


def measure_gap(curve: Sequence[tuple[int, float]]) -> Gap | None:
    """The gap of (step, loss) pairs, the first of which is the start.

    None with fewer than two of them, or with a start that is not finite.
    """
    if len(curve) < 2 or not math.isfinite(curve[0][1]):
        return None
    start_step, start = curve[0]
    rises = [(step, loss - start if math.isfinite(loss) else math.inf) for step, loss in curve]
    depth_step, depth = max(rises, key=lambda one: one[1])
    drop_step, lowest = min(rises, key=lambda one: one[1])
    back = [step for step, rise in rises if step > depth_step and rise <= 0]
    return Gap(
        start_step=start_step,
        start_loss=start,
        end_step=curve[-1][0],
        depth=max(depth, 0.0),
        depth_step=depth_step if depth > 0 else None,
        width=sum(map(_steps_above, rises, rises[1:])),
        recovery_step=back[0] if depth > 0 and back else None,
        drop=max(-lowest, 0.0),
        drop_step=drop_step if lowest < 0 else None,
        change=rises[-1][1],
    )


def _steps_above(begin: tuple[int, float], end: tuple[int, float]) -> float:
    """Steps between two evaluations on which the straight line between their rises is above 0."""
    steps, low, high = end[0] - begin[0], min(begin[1], end[1]), max(begin[1], end[1])
    if high <= 0:
        return 0.0
    if low >= 0 or math.isinf(high):
        return float(steps)
    return steps * high / (high - low)
