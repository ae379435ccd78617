"""The order of a source's tokens: each epoch its documents in another shuffled order, one after the other.

A source is an endless stream of tokens, epoch after epoch; a place in it is one integer. The shuffle is a
stateless permutation, so no epoch is ever laid out in memory: only the token count of every block of
documents that has been passed is kept.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from trainer.data.reader import Documents

BLOCK = 128
"""Documents whose order and lengths are worked out together; few, so that many sources start with little."""
BLOCKS_AHEAD = 512
"""Most blocks that are passed over in one go on the way to a far token."""
ROUNDS = 4


@dataclass(frozen=True)
class Spans:
    """Runs of tokens in the order they are read; a run never holds more than one document."""

    documents: NDArray[np.int64]
    """[n] number of the document in the file"""
    begins: NDArray[np.int64]
    """[n] first token, counted from the start of the file"""
    lengths: NDArray[np.int64]
    """[n] tokens, all above 0"""
    given: NDArray[np.int64] | None = None
    """[n] how many of the first tokens are read and not learnt; None where none is"""

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def learnt(self) -> int:
        """Labels that count: every token but the first of its run, and but those that are given."""
        skipped = 1 if self.given is None else np.maximum(self.given, 1)
        return int((self.lengths - skipped).sum())


class SourceOrder:
    """The endless token stream of one source."""

    def __init__(self, corpus: Documents, *, seed: int, name: str) -> None:
        """`seed` and `name` decide the order, and nothing else does: no other source, no layout."""
        self.corpus = corpus
        self._seed = seed
        self._name = name
        self._epochs: dict[int, _Epoch] = {}

    def go_on(self, tokens: int, passed: tuple[int, int]) -> None:
        """Spare the walk from the epoch's beginning to this token: `passed` is what `passed` returned."""
        number, place = divmod(tokens, self.corpus.num_tokens)
        documents, begin = passed
        if documents % BLOCK == 0 and documents < len(self.corpus) and begin <= place:
            key = order_key(self._seed, self._name, number)
            self._epochs[number] = _Epoch(self.corpus, key, documents // BLOCK, begin)

    def passed(self, tokens: int) -> tuple[int, int] | None:
        """Documents of the epoch that end well before this token of the stream, and their tokens.

        None where it has not been near.
        """
        number, place = divmod(tokens, self.corpus.num_tokens)
        return self._epochs[number].passed(place) if number in self._epochs else None

    def documents_read(self, tokens: int, *, times: int = 1) -> NDArray[np.int64]:
        """Documents read to their end at least so many times by whoever has read the first `tokens` tokens.

        Returns:
            Their numbers in the file, int64 [documents], in rising order. Documents without tokens never
            are among them.
        """
        epochs, place = divmod(tokens, self.corpus.num_tokens)
        if times > epochs + 1:
            return np.empty(0, dtype=np.int64)
        whole = times <= epochs
        key = None if whole else order_key(self._seed, self._name, epochs)
        limit = self.corpus.num_tokens if whole else place
        return np.sort(np.concatenate(list(_read_to_end(self.corpus, key, limit))))

    def spans(self, first: int, count: int) -> Spans:
        """The runs that make up tokens first, ..., first + count - 1 of the stream."""
        pieces: list[Spans] = []
        while count > 0:
            number, place = divmod(first, self.corpus.num_tokens)
            taken = min(count, self.corpus.num_tokens - place)
            pieces += self._epoch(number).spans(place, taken)
            first, count = first + taken, count - taken
        return _join(pieces)

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            self._epochs = {old: epoch for old, epoch in self._epochs.items() if old == number - 1}
            self._epochs[number] = _Epoch(self.corpus, order_key(self._seed, self._name, number))
        return self._epochs[number]


def file_spans(corpus: Documents) -> Spans:
    """All documents in the order of the file, once."""
    return _join(_Epoch(corpus, None).spans(0, corpus.num_tokens))


class _Epoch:
    """One pass over the documents; finds the documents at a token without having listed them all."""

    def __init__(self, corpus: Documents, key: int | None, block: int = 0, begin: int = 0) -> None:
        """`block` is the first block whose first token is known: `begin`."""
        self._corpus = corpus
        self._key = key
        self._base = block
        self._starts = array("q", [begin])  # first token of each block from base on, and of the next one
        self._last: tuple[int, Spans] | None = None

    def passed(self, token: int) -> tuple[int, int] | None:
        place = bisect_right(self._starts, token) - 1
        return None if place < 0 else ((self._base + place) * BLOCK, self._starts[place])

    def spans(self, first: int, count: int) -> list[Spans]:
        if first < self._starts[0]:
            self._base, self._starts = 0, array("q", [0])
        while self._starts[-1] <= first:
            self._pass_over(first - self._starts[-1])
        block = self._base + bisect_right(self._starts, first) - 1
        pieces: list[Spans] = []
        while count > 0:
            piece = cut(self._block(block), first - self._starts[block - self._base], count)
            taken = int(piece.lengths.sum())
            pieces.append(piece)
            first, count, block = first + taken, count - taken, block + 1
        return pieces

    def _pass_over(self, tokens: int) -> None:
        """Note where the next blocks begin: about as many as `tokens` take, at least one."""
        mean = self._corpus.num_tokens / len(self._corpus)
        blocks = min(BLOCKS_AHEAD, 1 + int(tokens / mean / BLOCK))
        block = self._base + len(self._starts) - 1
        _, lengths = self._corpus.spans(self._documents(block, block + blocks))
        sums = np.add.reduceat(lengths, np.arange(0, len(lengths), BLOCK))
        self._starts.extend((self._starts[-1] + np.cumsum(sums)).tolist())

    def _documents(self, first_block: int, last_block: int) -> NDArray[np.int64]:
        count = len(self._corpus)
        if first_block * BLOCK >= count:
            raise ValueError(
                f"{self._corpus.prefix}.idx: its documents hold fewer than the {self._corpus.num_tokens} "
                "tokens of the .bin; the index is damaged, copy or prepare both again"
            )
        places = np.arange(first_block * BLOCK, min(last_block * BLOCK, count), dtype=np.int64)
        return places if self._key is None else permute(places, count, self._key)

    def _block(self, block: int) -> Spans:
        if self._last is None or self._last[0] != block:
            documents = self._documents(block, block + 1)
            begins, lengths = self._corpus.spans(documents)
            kept = lengths > 0
            self._last = (block, Spans(documents[kept], begins[kept], lengths[kept]))
            if block == self._base + len(self._starts) - 1:
                self._starts.append(self._starts[-1] + int(lengths.sum()))
        return self._last[1]


def _read_to_end(corpus: Documents, key: int | None, tokens: int) -> Iterator[NDArray[np.int64]]:
    """The documents that lie within the first `tokens` tokens of an epoch, many at a time."""
    at, step = 0, BLOCK * BLOCKS_AHEAD
    yield np.empty(0, dtype=np.int64)
    for first in range(0, len(corpus), step):
        documents = np.arange(first, min(first + step, len(corpus)), dtype=np.int64)
        documents = documents if key is None else permute(documents, len(corpus), key)
        _, lengths = corpus.spans(documents)
        ends = at + np.cumsum(lengths)
        yield documents[(ends <= tokens) & (lengths > 0)]
        at = int(ends[-1])
        if at >= tokens:
            return


def permute(indices: NDArray[np.int64], count: int, key: int) -> NDArray[np.int64]:
    """Where a key-dependent permutation of 0, ..., count - 1 sends `indices`, without listing the others.

    A Feistel network over a rectangle just larger than `count`, walked again by whoever lands outside (Black
    and Rogaway 2002, "Ciphers with arbitrary finite domains", section 4 and cycle walking of section 3).
    """
    rows = isqrt(max(0, count - 1)) + 1
    columns = -(-count // rows)
    result = _feistel(indices.astype(np.uint64), rows, columns, key)
    outside = np.flatnonzero(result >= count)
    while len(outside):
        result[outside] = _feistel(result[outside], rows, columns, key)
        outside = outside[result[outside] >= count]
    return result.astype(np.int64)


def _feistel(values: NDArray[np.uint64], rows: int, columns: int, key: int) -> NDArray[np.uint64]:
    high, low = np.divmod(values, np.uint64(columns))
    for turn in range(ROUNDS):
        high = (high + mix(low, key + 2 * turn)) % np.uint64(rows)
        low = (low + mix(high, key + 2 * turn + 1)) % np.uint64(columns)
    return high * np.uint64(columns) + low


def mix(values: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """A 62-bit hash: the finaliser of SplitMix64 (Steele, Lea, Flood 2014, figure 14)."""
    mixed = values + np.uint64(key * 0x9E3779B97F4A7C15 % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(2)


def order_key(seed: int, name: str, epoch: int) -> int:
    """The key of a source's permutation in an epoch."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def cut(spans: Spans, first: int, count: int) -> Spans:
    """At most `count` tokens of these spans, from their token number `first` on."""
    ends = np.cumsum(spans.lengths)
    starts = ends - spans.lengths
    low = int(np.searchsorted(ends, first, side="right"))
    high = int(np.searchsorted(starts, first + count, side="left"))
    part = slice(low, high)
    skipped = np.maximum(first - starts[part], 0)
    lengths = np.minimum(ends[part], first + count) - starts[part] - skipped
    return Spans(spans.documents[part], spans.begins[part] + skipped, lengths)


def _join(pieces: list[Spans]) -> Spans:
    if len(pieces) == 1:
        return pieces[0]
    return Spans(
        np.concatenate([piece.documents for piece in pieces]),
        np.concatenate([piece.begins for piece in pieces]),
        np.concatenate([piece.lengths for piece in pieces]),
    )
