"""What a run had read at a step, source by source, and the documents that this means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.data.order import order_key, permute
from trainer.data.reader import Documents

CHUNK = 2**16
"""Documents that are looked at together."""


@dataclass(frozen=True)
class Seen:
    """How far a source had been read.

    Attributes:
        name: of the source.
        path: prefix of its files; empty where a checkpoint does not say.
        seed: of its order.
        epoch_tokens: tokens of all its documents.
        tokens: read of its order.
    """

    name: str
    path: str
    seed: int
    epoch_tokens: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return asdict(self)


class OpenParts(Protocol):
    """Opens the documents of sources, as far as they were read."""

    def __call__(
        self, seen: Sequence[Seen], counted: Sequence[Sequence[int]] | None = None
    ) -> list[SeenDocuments]:
        """One of each; `counted` as `SeenDocuments` takes it. Raises ValueError where they cannot be read."""


class SeenDocuments:
    """The documents that were read to their end at least once, numbered in the order of their first reading.

    That order is a permutation without memory, so no list of them is kept: only how many they are.
    """

    def __init__(self, seen: Seen, corpus: Documents, counted: Sequence[int] | None = None) -> None:
        """Count them, unless `counted` says how many they are and how many tokens they hold.

        It costs one look at the lengths of the documents that were read.
        """
        self.seen = seen
        self.corpus = corpus
        self._key = order_key(seen.seed, seen.name, 0)
        self.count, self.num_tokens = self._count() if counted is None else (counted[0], counted[1])

    def numbers(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The documents at these places, by their number in the source's files, int64 [places]."""
        return permute(places, len(self.corpus), self._key)

    def chunks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """All of them that have tokens, many at a time: numbers and lengths, both int64 [documents]."""
        for documents, lengths in self._chunks(self.count):
            held = lengths > 0
            yield documents[held], lengths[held]

    def _chunks(self, count: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        for first in range(0, count, CHUNK):
            documents = self.numbers(np.arange(first, min(first + CHUNK, count), dtype=np.int64))
            yield documents, self.corpus.spans(documents)[1]

    def _count(self) -> tuple[int, int]:
        if self.seen.tokens >= self.corpus.num_tokens:
            return len(self.corpus), self.corpus.num_tokens
        documents, tokens = 0, 0
        for chunk, lengths in self._chunks(len(self.corpus)):
            ends = tokens + np.cumsum(lengths)
            within = int(np.searchsorted(ends, self.seen.tokens, side="right"))
            documents, tokens = documents + within, int(ends[within - 1]) if within else tokens
            if within < len(chunk):
                break
        return documents, tokens
