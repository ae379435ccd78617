"""Packed sequences of several documents, as the trainer gives them to the engine."""

from __future__ import annotations

import torch

from trainer.data.batch import NEXT_TOKEN, NO_GROUP, MicroBatch

SEQUENCE = 32
DOCUMENTS = ((11, 21), (1, 6, 25), (32,), (8, 8, 15, 1))  # lengths, for each of the sequences


def packed_batch(
    vocab_size: int, *, seed: int = 3, documents: tuple[tuple[int, ...], ...] = DOCUMENTS
) -> MicroBatch:
    """All sequences as one batch [4, 32] of random tokens; the last token of a document has no label."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(documents)
    stream = torch.randint(vocab_size, (rows, SEQUENCE + 1), generator=generator)
    numbers = torch.stack([_numbers(lengths) for lengths in documents])
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in documents])
    last = torch.ones(rows, SEQUENCE, dtype=torch.bool)
    last[:, :-1] = numbers[:, 1:] != numbers[:, :-1]
    return MicroBatch(
        tokens=stream[:, :-1].contiguous(),
        labels=stream[:, 1:].contiguous(),
        loss_weights=(~last).float(),
        positions=positions,
        documents=numbers,
        sources=torch.zeros(rows, SEQUENCE, dtype=torch.int32),
        objectives=torch.full((rows, SEQUENCE), NEXT_TOKEN, dtype=torch.int32),
        groups=torch.full((rows, SEQUENCE), NO_GROUP, dtype=torch.int32),
    )


def rows_of(batch: MicroBatch, start: int, stop: int) -> MicroBatch:
    """Some sequences of a batch."""
    return MicroBatch(**{name: column[start:stop] for name, column in vars(batch).items()})


def _numbers(lengths: tuple[int, ...]) -> torch.Tensor:
    counts = torch.tensor(lengths)
    assert int(counts.sum()) == SEQUENCE
    return torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(counts)
