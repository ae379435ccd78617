"""How far two computations are apart, and where they part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from trainer.parity.probe import LOGITS

Activations = Mapping[str, Sequence[torch.Tensor]]
"""point -> float32 [s, columns] of every sequence, on the host"""
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
        """For programs; JSON knows no infinity, which is null."""
        found = asdict(self)
        for difference in found["differences"]:
            if math.isinf(difference["relative"]):
                difference["relative"] = None
        return {**found, "same": self.same, "first": self.first.point if self.first else None}


@dataclass(frozen=True)
class Bound:
    """What one activation is compared with.

    Attributes:
        shape: of one sequence's, [s, columns].
        rows: sequences.
        scale: the largest absolute value expected; 1 where all are zero.
        allowed: difference, as a fraction of `scale`.
    """

    point: str
    shape: tuple[int, int]
    rows: int
    scale: float
    allowed: float


def bounds(expected: Activations, order: Sequence[str], *, noise: Activations | None = None) -> list[Bound]:
    """The bound of every point of `order` that is expected.

    Args:
        expected: transformers in fp32.
        noise: transformers in bf16: how far that is from fp32 decides how far we may be; None asks for
            FP32_TOLERANCE.
    """
    found = []
    for point in order:
        if point not in expected:
            continue
        rows = expected[point]
        scale = max(float(row.abs().max()) for row in rows) or 1.0
        allowed = FP32_TOLERANCE
        if noise is not None:
            away = (farthest(one, other)[0] for one, other in zip(noise[point], rows, strict=True))
            allowed = max(allowed, BF16_FACTOR * max(away) / scale)
        length, columns = rows[0].shape
        found.append(Bound(point, (length, columns), len(rows), scale, allowed))
    assert found[-1].point == LOGITS
    return found


def farthest(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """The largest absolute difference of two float32 [s, columns], and its s. NaN is infinitely far."""
    apart = (actual - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf).amax(dim=-1)
    place = int(apart.argmax())
    return float(apart[place]), place
