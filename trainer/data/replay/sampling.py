"""A uniform sample of documents, by the smallest of their hashes.

Every document has a priority that depends on nothing but itself and a key, and the sample is those of the
lowest priorities: drawn without replacement, each document as likely as any other (bottom-k sampling: Cohen
and Kaplan 2007, "Summarizing data using bottom-k sketches"). So what has been read decides the sample, and
neither the order of reading, nor the layout, nor a restart does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.order import mix
from trainer.data.replay.seen import SeenDocuments


@dataclass(frozen=True)
class Sample:
    """Documents in rising priority, all arrays [n]."""

    parts: NDArray[np.int64]
    """index of the source that it is of"""
    documents: NDArray[np.int64]
    """number in the source's files"""
    lengths: NDArray[np.int64]
    """tokens"""
    priorities: NDArray[np.int64]

    def within(self, tokens: int, limit: int) -> tuple[Sample, int]:
        """The first ones that hold at most so many tokens together, at least one.

        Returns:
            Them, and the priority of the first that is left out: `limit` where none is.
        """
        order = np.lexsort((self.documents, self.parts, self.priorities))
        count = int(np.searchsorted(np.cumsum(self.lengths[order]), tokens, side="right"))
        kept, others = np.split(order, [max(1, count)])
        return self.chosen(kept), int(self.priorities[others[0]]) if len(others) else limit

    def chosen(self, places: NDArray[np.int64] | NDArray[np.bool_]) -> Sample:
        """Those at these places."""
        arrays = (self.parts, self.documents, self.lengths, self.priorities)
        return Sample(*(one[places] for one in arrays))


def draw_sample(parts: Sequence[SeenDocuments], *, tokens: int, seed: int, name: str) -> Sample:
    """At most `tokens` tokens of the documents of all sources; `seed` and `name` choose the hash.

    The documents up to the first that does not fit; always one, however long it is. Takes memory for the
    sample, and not for what it is drawn from.
    """
    pending, waiting, limit = [_empty()], 0, 2**63 - 1
    for number, part in enumerate(parts):
        key = _key(seed, name, part.seen.name)
        for documents, lengths in part.chunks():
            which = np.full(len(documents), number, dtype=np.int64)
            more = Sample(which, documents, lengths, mix(documents.astype(np.uint64), key).astype(np.int64))
            pending.append(more.chosen(more.priorities < limit))
            waiting += int(pending[-1].lengths.sum())
            if waiting > tokens:
                held, limit = _joined(pending).within(tokens, limit)
                pending, waiting = [held], 0
    return _joined(pending).within(tokens, limit)[0]


def _empty() -> Sample:
    nothing = np.empty(0, dtype=np.int64)
    return Sample(nothing, nothing, nothing, nothing)


def _joined(samples: Sequence[Sample]) -> Sample:
    fields = ("parts", "documents", "lengths", "priorities")
    return Sample(*(np.concatenate([getattr(one, field) for one in samples]) for field in fields))


def _key(seed: int, name: str, source: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}/{source}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
