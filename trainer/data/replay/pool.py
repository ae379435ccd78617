"""Documents of several corpora as one corpus, read where they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.reader import Documents
from trainer.data.replay.sampling import Sample
from trainer.data.replay.seen import SeenDocuments

Locate = Callable[[NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.int64]]]
"""From documents of the pool to the corpora that hold them, and their numbers there."""
OFFSET_BITS = np.int64(32)
OFFSETS = np.int64(2**32 - 1)


class Pool:
    """A corpus made of chosen documents of others, with the interface of one (`Documents`).

    A place in it is a document's number, and in the lower 32 bits the token inside the document: documents
    need not lie one behind the other.
    """

    def __init__(
        self, corpora: Sequence[Documents], locate: Locate, *, documents: int, tokens: int, prefix: str
    ) -> None:
        """So many documents with so many tokens, found by `locate`; `prefix` is how messages call them."""
        self.prefix = prefix
        self.num_tokens = tokens
        self.tokens = PooledTokens(self)
        self._corpora = list(corpora)
        self.locate = locate
        self._count = documents

    def __len__(self) -> int:
        return self._count

    def spans(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First place and number of tokens of each of these documents, both int64 [documents]."""
        return documents << OFFSET_BITS, self.found(documents)[2]

    def found(
        self, documents: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of each document the number of its corpus, and its first token and length there, [documents]."""
        which, numbers = self.locate(documents)
        begins, lengths = np.empty_like(numbers), np.empty_like(numbers)
        for corpus in np.unique(which).tolist():
            here = which == corpus
            begins[here], lengths[here] = self._corpora[corpus].spans(numbers[here])
        return which, begins, lengths

    def read(self, corpus: int, places: NDArray[np.int64]) -> NDArray[Any]:
        """Tokens of one of the corpora, by the places in it."""
        return self._corpora[corpus].tokens[places]


class PooledTokens:
    """The tokens of a pool by place."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __getitem__(self, places: NDArray[np.int64], /) -> NDArray[Any]:
        """The tokens at these places, int64 in the shape of `places`."""
        flat = places.reshape(-1)
        documents = flat >> OFFSET_BITS
        starts = np.flatnonzero(np.diff(documents, prepend=-1))  # of runs of one document
        run_of = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(flat))))
        which, begins, _ = self._pool.found(documents[starts])
        there = begins[run_of] + (flat & OFFSETS)
        tokens, corpora = np.empty(len(flat), dtype=np.int64), which[run_of]
        for corpus in np.unique(which).tolist():
            here = corpora == corpus
            tokens[here] = self._pool.read(corpus, there[here])
        return tokens.reshape(places.shape)


def pool_of_all(parts: Sequence[SeenDocuments]) -> Pool:
    """Every document that was seen, source after source."""
    begins = np.cumsum([0, *(part.count for part in parts)])

    def locate(documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        which = np.searchsorted(begins[1:], documents, side="right")
        numbers = np.empty_like(documents)
        for part in np.unique(which).tolist():
            here = which == part
            numbers[here] = parts[part].numbers(documents[here] - begins[part])
        return which, numbers

    return Pool(
        [part.corpus for part in parts],
        locate,
        documents=int(begins[-1]),
        tokens=sum(part.num_tokens for part in parts),
        prefix=_described(parts),
    )


def pool_of_sample(parts: Sequence[SeenDocuments], sample: Sample) -> Pool:
    """The documents of a sample, in its order."""
    return Pool(
        [part.corpus for part in parts],
        lambda documents: (sample.parts[documents], sample.documents[documents]),
        documents=len(sample.documents),
        tokens=int(sample.lengths.sum()),
        prefix=_described(parts),
    )


def _described(parts: Sequence[SeenDocuments]) -> str:
    return " and ".join(part.corpus.prefix for part in parts)
