"""Places in a source with metadata, and the places in its text alone that they stand for.

A run may read a source with its metadata in one stage and without in the next. What carries over is the place
in the text: so many documents of the epoch, and so many tokens of the one under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.order import BLOCK, BLOCKS_AHEAD, order_key, permute
from trainer.data.transforms.prefixed import PrefixedDocuments


@dataclass(frozen=True)
class Milestone:
    """A border between two documents of an epoch.

    Attributes:
        epoch: its number.
        documents: how many of the epoch lie before it, a multiple of `BLOCK`.
        tokens: of these documents, with their metadata.
        text: of these documents without.
    """

    epoch: int
    documents: int
    tokens: int
    text: int


class Places:
    """Translates places of one source; remembers where it has been, so that the next one is near."""

    def __init__(self, view: PrefixedDocuments, *, seed: int, name: str) -> None:
        """`seed` and `name` are those of the source's order."""
        self.view = view
        self._seed = seed
        self._name = name
        self._near = Milestone(0, 0, 0, 0)

    def go_on(self, tokens: int, passed: Sequence[int]) -> None:
        """Begin to look near this place; `passed` is what `passed` returned there."""
        self._near = Milestone(tokens // self.view.num_tokens, *passed)

    def passed(self, tokens: int) -> tuple[int, int, int]:
        """Documents of the epoch that end before this place, their tokens, and those of their texts."""
        self.text_before(tokens)
        return self._near.documents, self._near.tokens, self._near.text

    def text_before(self, tokens: int) -> int:
        """The tokens of text among the first `tokens` tokens of the source."""
        epoch, inside = divmod(tokens, self.view.num_tokens)
        found = self._find(epoch, inside, with_metadata=True)
        texts = epoch * self.view.text.num_tokens + found.text
        return texts + max(0, inside - found.tokens - found.given)

    def place_of(self, text: int) -> int:
        """The tokens, with metadata, that lie before the token number `text` of the text.

        That is the first token of a document's metadata where it is the first of its text.
        """
        epoch, inside = divmod(text, self.view.text.num_tokens)
        found = self._find(epoch, inside, with_metadata=False)
        offset = inside - found.text
        return epoch * self.view.num_tokens + found.tokens + (found.given + offset if offset else 0)

    def _find(self, epoch: int, inside: int, *, with_metadata: bool) -> _Document:
        """The document of an epoch that holds a token: with metadata the `inside`-th, or that of the text."""
        near = self._near
        if near.epoch != epoch or (near.tokens if with_metadata else near.text) > inside:
            near = Milestone(epoch, 0, 0, 0)
        total = self.view.num_tokens if with_metadata else self.view.text.num_tokens
        mean = total / len(self.view)
        while True:
            before = near.tokens if with_metadata else near.text
            blocks = min(BLOCKS_AHEAD, 1 + int((inside - before) / mean / BLOCK))
            lengths, given = self._lengths(near, blocks * BLOCK)
            ends = np.cumsum(lengths)
            text_ends = np.cumsum(lengths - given)
            at = int(np.searchsorted(ends if with_metadata else text_ends, inside - before, side="right"))
            whole = at // BLOCK * BLOCK
            begin = near
            if whole:
                near = Milestone(
                    epoch,
                    near.documents + whole,
                    near.tokens + int(ends[whole - 1]),
                    near.text + int(text_ends[whole - 1]),
                )
            if at < len(lengths):
                self._near = near
                tokens = begin.tokens + int(ends[at] - lengths[at])
                text = begin.text + int(text_ends[at] - lengths[at] + given[at])
                return _Document(tokens, text, int(given[at]))

    def _lengths(self, near: Milestone, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens of the next documents, and how many of each are metadata."""
        last = min(near.documents + count, len(self.view))
        assert near.documents < last, "an epoch has more documents than the corpus"
        ranks = np.arange(near.documents, last, dtype=np.int64)
        documents = permute(ranks, len(self.view), order_key(self._seed, self._name, near.epoch))
        return self.view.spans(documents)[1], self.view.given(documents)


@dataclass(frozen=True)
class _Document:
    """Where a document of an epoch begins, with metadata and in the text alone, and how much that is."""

    tokens: int
    text: int
    given: int
