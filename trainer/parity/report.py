"""How far two computations are apart, and where they part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from trainer.parity.probe import LOGITS

FP32_TOLERANCE = 1e-4
"""Largest difference over the largest absolute value: a hundred roundings of fp32 sums in another order."""
BF16_FACTOR = 2.0
"""In bf16 we may be so many times as far from transformers in fp32 as transformers in bf16 is."""


@dataclass(frozen=True)
class PointDifference:
    """One activation, compared.

    Attributes:
        relative: largest absolute difference over the largest absolute value expected.
        allowed: up to which both count as the same.
        worst: (sequence, position) of the largest difference.
    """

    point: str
    relative: float
    allowed: float
    worst: tuple[int, int]

    @property
    def same(self) -> bool:
        return self.relative <= self.allowed


@dataclass(frozen=True)
class ParityReport:
    """The verdict.

    Attributes:
        differences: in the order of computation; the logits are the last.
        suspects: likely causes of a difference, sentences.
        tokens: positions that were compared.
    """

    differences: tuple[PointDifference, ...]
    tokens: int
    layout: str
    precision: str
    suspects: tuple[str, ...] = field(default=())

    @property
    def logits(self) -> PointDifference:
        return self.differences[-1]

    @property
    def same(self) -> bool:
        """Only the logits decide: what the layers hand on may differ in the last bits."""
        return self.logits.same

    @property
    def first(self) -> PointDifference | None:
        """The first point in the order of computation that is not the same."""
        return next((difference for difference in self.differences if not difference.same), None)

    def sentence(self) -> str:
        """The verdict in one sentence."""
        logits = self.logits
        text = (
            f"logits at {self.tokens:,} positions ({self.layout}, {self.precision}) differ from "
            f"transformers by {logits.relative:.1e} of the largest, allowed {logits.allowed:.1e}"
        )
        return text if self.same or self.first is None else f"{text}; the first to differ: {self.first.point}"

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "same": self.same, "first": self.first.point if self.first else None}


def compare(
    ours: Mapping[str, torch.Tensor],
    theirs: Mapping[str, torch.Tensor],
    order: Sequence[str],
    *,
    noise: Mapping[str, torch.Tensor] | None = None,
) -> tuple[PointDifference, ...]:
    """Compare activations [sequences, s, columns] at every point of `order` that both have.

    Args:
        theirs: transformers in fp32.
        noise: transformers in bf16: how far that is from fp32 decides how far we may be; None asks for
            FP32_TOLERANCE.
    """
    differences = []
    for point in order:
        if point not in ours or point not in theirs:
            continue
        relative, worst = _distance(ours[point], theirs[point])
        allowed = FP32_TOLERANCE
        if noise is not None:
            allowed = max(allowed, BF16_FACTOR * _distance(noise[point], theirs[point])[0])
        differences.append(PointDifference(point, relative, allowed, worst))
    assert differences, "nothing to compare"
    assert differences[-1].point == LOGITS
    return tuple(differences)


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, tuple[int, int]]:
    if actual.shape != expected.shape:
        return float("inf"), (0, 0)
    apart = (actual.double() - expected.double()).abs().amax(dim=-1)
    row, position = divmod(int(apart.argmax()), apart.shape[1])
    scale = float(expected.double().abs().max())
    return float(apart.max()) / scale if scale else float(apart.max()), (row, position)
