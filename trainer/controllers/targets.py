"""Targets for Velocitune: where the losses of a short run on a subset would end after more tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.metrics.json_lines import read_evaluations, read_lines, read_steps

FEWEST_POINTS = 4
EXPONENTS = np.geomspace(0.02, 2.0, 60)
REFINEMENTS = 4
HUBER = 0.01
"""Nats beyond which a point pulls by its distance rather than by its square."""
ROUNDS = 20

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LossCurve:
    """l(n) = a + b n^-c, the law of Hoffmann et al. 2022 (Chinchilla, arXiv 2203.15556) at one model size.

    Attributes:
        a, b: in nats, not negative.
        n: tokens.
    """

    a: float
    b: float
    c: float

    def at(self, tokens: float) -> float:
        """The loss after so many tokens."""
        return float(self.a + self.b * tokens**-self.c)


def fit_curve(tokens: Sequence[float], losses: Sequence[float]) -> LossCurve:
    """The curve with the least sum of Huber's losses, so that single bad points hardly move it.

    For each c of a grid, a and b follow from least squares, weighted again and again; the grid is then made
    finer around the best c.

    Raises:
        ValueError: fewer than 4 points, or tokens that are not above 0.
    """
    n, loss = np.asarray(tokens, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(n) < FEWEST_POINTS or n.min() <= 0 or len(set(n.tolist())) < FEWEST_POINTS:
        raise ValueError(
            f"a curve needs losses at {FEWEST_POINTS} or more different numbers of tokens above 0, found "
            f"{n.tolist()}: evaluate more often"
        )
    if not np.isfinite(loss).all():
        raise ValueError(f"a curve needs finite losses, found {loss.tolist()}")
    unit = float(n.min())
    grid = EXPONENTS
    for _ in range(REFINEMENTS):
        _, a, b, place = min((*_fit_at((n / unit) ** -c, loss), at) for at, c in enumerate(grid))
        c = float(grid[place])
        grid = np.linspace(grid[max(0, place - 1)], grid[min(place + 1, len(grid) - 1)], 21)
    return LossCurve(a, b * unit**c, c)


def _fit_at(x: Floats, loss: Floats) -> tuple[float, float, float]:
    """(sum of Huber's losses, a, b) of loss = a + b x with a, b >= 0."""
    weight = np.ones_like(x)
    a = b = 0.0
    for _ in range(ROUNDS):
        a, b = _line(x, loss, weight)
        distance = np.abs(loss - a - b * x)
        weight = HUBER / np.maximum(distance, HUBER)
    distance = np.abs(loss - a - b * x)
    return float(np.where(distance <= HUBER, distance**2 / 2, HUBER * (distance - HUBER / 2)).sum()), a, b


def _line(x: Floats, y: Floats, weight: Floats) -> tuple[float, float]:
    """Weighted least squares of y = a + b x under a, b >= 0."""
    total = weight.sum()
    mean_x, mean_y = float((weight * x).sum() / total), float((weight * y).sum() / total)
    spread = float((weight * (x - mean_x) ** 2).sum())
    b = float((weight * (x - mean_x) * (y - mean_y)).sum()) / spread if spread else 0.0
    if b < 0:
        return mean_y, 0.0
    if mean_y - b * mean_x < 0:
        return 0.0, float((weight * x * y).sum() / (weight * x * x).sum())
    return mean_y - b * mean_x, b


def fit_targets(folder: Path, tokens: float, output: Path | None = None) -> dict[str, float]:
    """By source, the held-out loss that a run would reach after `tokens` tokens, from its evaluations so far.

    Args:
        folder: of a short run with the mixture to be weighed, or of a stage: it has a metrics.jsonl.
        tokens: of the run that the targets are for, of all sources together.
        output: where they are written, as `[controller] targets` reads them.

    Raises:
        ValueError: there are too few evaluations to fit a curve to.
    """
    path = folder / "metrics.jsonl"
    began, _, _ = read_steps(path)
    start = next(line for line in read_lines(path) if line["kind"] == "start")
    points: dict[str, dict[float, float]] = {}
    for record in read_evaluations(path):
        n = (record.step - began) * start["tokens_per_step"]
        for name, loss in record.losses.items():
            if n > 0 and name in record.sources and math.isfinite(loss):
                points.setdefault(record.sources[name], {}).setdefault(n, loss)
    if not points:
        raise ValueError(f"{path} has no evaluation after its first step; set eval.every and run it again")
    targets = {}
    for source, curve in points.items():
        try:
            targets[source] = round(fit_curve(list(curve), list(curve.values())).at(tokens), 4)
        except ValueError as error:
            raise ValueError(f"{path}, source {source!r}: {error}") from None
    if output is not None:
        output.write_text(json.dumps(targets, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return targets
