"""Measure an engine against transformers, on all ranks together."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from parallel.engine import Engine
from trainer.parity.probe import Recording, points, put_together, random_batch, record, rows_needed
from trainer.parity.reference import run_reference
from trainer.parity.report import ParityReport, compare

POSITIONS = 64
"""Length of the compared sequences; a multiple of what every context layout needs up to CP 32."""


def measure(engine: Engine, folder: Path, *, length: int = POSITIONS, seed: int = 0) -> ParityReport:
    """Compare the engine's logits, and what leads to them, with transformers' on random tokens.

    A collective: all ranks call it and get the same report. transformers runs on rank 0, in fp32, and for a
    bf16 engine in bf16 as well, to know how far bf16 is from fp32 by itself.

    Args:
        folder: Hugging Face's, with config.json and weights.

    Raises:
        ValueError: on every rank: transformers is missing or cannot load the folder.
    """
    batch = random_batch(engine.vocab_size, rows_needed(engine), length, seed=seed)
    recordings = _to_first(engine, record(engine, batch))
    outcome: ParityReport | str
    try:
        outcome = _judge(engine, folder, batch.tokens, recordings) if recordings is not None else ""
    except ValueError as error:
        outcome = str(error)
    answer = [outcome]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise ValueError(answer[0])
    return answer[0]


def _to_first(engine: Engine, recordings: list[Recording]) -> list[Recording] | None:
    """All ranks' recordings, on rank 0."""
    first = engine.mesh.rank == 0
    gathered: list[list[Recording]] | None = [[]] * dist.get_world_size() if first else None
    dist.gather_object(recordings, gathered, dst=0)
    return None if gathered is None else [one for some in gathered for one in some]


def _judge(engine: Engine, folder: Path, tokens: torch.Tensor, recordings: list[Recording]) -> ParityReport:
    precision = "bf16" if engine.config.bf16 else "fp32"
    ours = put_together(recordings)
    theirs = run_reference(folder, tokens, precision="fp32")
    noise = run_reference(folder, tokens, precision="bf16") if precision == "bf16" else None
    order = points(engine.config.num_layers)
    differences = compare(ours, theirs, order, noise=noise)
    layout = engine.mesh.layout.describe(dist.get_world_size())
    return ParityReport(differences, tokens.numel(), layout, precision)
