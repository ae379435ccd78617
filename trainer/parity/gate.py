"""Measure an engine against transformers, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from parallel.engine import Engine
from parallel.random_state import get_random_state, set_random_state
from trainer.parity.probe import LOGITS, Recording, points, random_batch, record, rows_needed
from trainer.parity.reference import run_reference, vocabulary
from trainer.parity.report import Activations, Bound, ParityReport, PointDifference, bounds, farthest

POSITIONS = 64
"""Length of the compared sequences; a multiple of what every context layout needs up to CP 32."""

T = TypeVar("T")


@dataclass(frozen=True)
class Distance:
    """How far a rank's share of an activation is from what is expected.

    Attributes:
        apart: the largest absolute difference.
        worst: (sequence, position) of it.
        elements: that were compared, without those that another rank speaks for.
    """

    apart: float = 0.0
    worst: tuple[int, int] = (0, 0)
    elements: int = 0


def measure(engine: Engine, folder: Path, *, length: int = POSITIONS, seed: int = 0) -> ParityReport:
    """Compare the engine's logits, and what leads to them, with transformers' on random tokens.

    A collective: all ranks call it and get the same report. transformers runs on rank 0, in fp32, and for a
    bf16 engine in bf16 as well, to know how far bf16 is from fp32 by itself. What it computes goes around,
    one sequence's activation at a time, and every rank compares its own share, so that no rank ever holds
    what all have. The engine and the random streams are left as they were.

    Args:
        folder: Hugging Face's, with config.json and weights.

    Raises:
        ValueError: on every rank: transformers is missing or cannot compute the folder.
    """
    with _undisturbed(engine):
        size = _from_first(lambda: min(engine.vocab_size, vocabulary(folder)))
        batch = random_batch(size, rows_needed(engine), length, seed=seed)
        recordings = record(engine, batch)
        expected: dict[str, list[torch.Tensor]] = {}  # on rank 0 only
        limits = _from_first(lambda: _expect(engine, folder, batch.tokens, expected))
        here = [_compare(engine, recordings, limit, expected) for limit in limits]
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, here)
    differences = [
        _difference(limit, found) for limit, found in zip(limits, zip(*shares, strict=True), strict=True)
    ]
    layout = engine.mesh.layout.describe(dist.get_world_size())
    return ParityReport(tuple(differences), batch.tokens.numel(), layout, _precision(engine))


@contextmanager
def _undisturbed(engine: Engine) -> Iterator[None]:
    """Put back the random streams and the training flags: a run with a comparison is the run without one."""
    random, training = get_random_state(), [chunk.training for chunk in engine.wrapped]
    try:
        yield
    finally:
        set_random_state(random)
        for chunk, flag in zip(engine.wrapped, training, strict=True):
            chunk.train(flag)


def _from_first(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank; its ValueError too."""
    answer: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            answer[0] = make()
        except ValueError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise ValueError(answer[1])
    made: T = answer[0]
    return made


def _precision(engine: Engine) -> str:
    return "bf16" if engine.config.bf16 else "fp32"


def _expect(
    engine: Engine, folder: Path, tokens: torch.Tensor, into: dict[str, list[torch.Tensor]]
) -> list[Bound]:
    into.update(run_reference(folder, tokens, precision="fp32"))
    noise = run_reference(folder, tokens, precision="bf16") if engine.config.bf16 else None
    return bounds(into, points(engine.config.num_layers), noise=noise)


def _compare(
    engine: Engine, recordings: Sequence[Recording], bound: Bound, expected: Activations
) -> Distance:
    """This rank's share of one activation. A collective: rank 0 hands out what is expected."""
    found = Distance()
    for row in range(bound.rows):
        whole = expected[bound.point][row] if dist.get_rank() == 0 else torch.empty(bound.shape)
        whole = whole.contiguous()
        dist.broadcast(whole, src=0)
        for mine in recordings:
            if (mine.point, mine.row) == (bound.point, row):
                found = _farther(found, mine, whole, engine.vocab_size)
    return found


def _farther(found: Distance, mine: Recording, whole: torch.Tensor, vocab_size: int) -> Distance:
    elements = found.elements + (0 if mine.is_copy else mine.data.numel())
    columns = vocab_size if mine.point == LOGITS else mine.data.shape[1]
    if columns != whole.shape[1]:
        return Distance(float("inf"), (mine.row, mine.positions[0]), elements)
    same = whole[list(mine.positions), mine.column : mine.column + mine.data.shape[1]]
    apart, place = farthest(mine.data, same)
    worst = (mine.row, mine.positions[place])
    return (
        Distance(apart, worst, elements)
        if apart > found.apart
        else Distance(found.apart, found.worst, elements)
    )


def _difference(bound: Bound, shares: Sequence[Distance]) -> PointDifference:
    worst = max(shares, key=lambda share: share.apart)
    compared = sum(share.elements for share in shares)
    whole = bound.rows * bound.shape[0] * bound.shape[1]
    assert compared == whole or worst.apart == float("inf"), f"{bound.point}: {compared} of {whole} compared"
    return PointDifference(bound.point, worst.apart / bound.scale, bound.allowed, worst.worst)
