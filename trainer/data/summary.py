"""What a prepared corpus holds, for whoever looks at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.corpus import Sidecar, read_sidecar
from trainer.data.indexed import IndexedReader
from trainer.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Summary:
    """Counts over a whole corpus; reads its index, and no token."""

    prefix: str
    documents: int
    tokens: int
    dtype: str
    file_bytes: int
    """of the .bin"""
    shortest: int
    longest: int
    median: float
    """tokens of a document"""
    histogram: list[tuple[int, int, int]]
    """(lowest, highest, documents) of lengths in powers of two, in tokens, without gaps"""
    sidecar: Sidecar | None


def summarise(prefix: str) -> Summary:
    """Count documents, tokens and lengths.

    Raises:
        ValueError: the files are missing, broken or empty.
    """
    corpus = IndexedReader(prefix)
    if not len(corpus):
        raise ValueError(f"{prefix}: holds no documents")
    _, lengths = corpus.spans(np.arange(len(corpus)))
    return Summary(
        prefix=prefix,
        documents=len(corpus),
        tokens=corpus.num_tokens,
        dtype=corpus.dtype.name,
        file_bytes=corpus.num_tokens * corpus.dtype.itemsize,
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        median=float(np.median(lengths)),
        histogram=_histogram(lengths),
        sidecar=read_sidecar(prefix),
    )


def _histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    powers = np.frexp(np.maximum(lengths, 1))[1] - 1  # floor(log2), exact for integers
    first, last = int(powers.min()), int(powers.max())
    counts = np.bincount(powers - first, minlength=last - first + 1)
    return [(2**power, 2 ** (power + 1) - 1, int(counts[power - first])) for power in range(first, last + 1)]


def tokenizer_of(sidecar: Sidecar | None, spec: str | None, eod: str | None = None) -> Tokenizer | str:
    """The tokenizer that made a corpus, or a sentence that says why it cannot be had.

    Args:
        spec: names it, where the sidecar does not or where it has moved since.
    """
    if spec is None and sidecar is None:
        return "no .json beside the data says which tokenizer made them; name it with --tokenizer"
    try:
        if spec is not None or sidecar is None:
            return load_tokenizer(spec or "bytes", eod)
        tokenizer = load_tokenizer(sidecar.tokenizer, sidecar.eod)
    except ValueError as error:
        return f"{error}; name it with --tokenizer"
    if tokenizer.fingerprint != sidecar.fingerprint:
        return f"{sidecar.tokenizer} has changed since the data were made; name theirs with --tokenizer"
    return tokenizer


def preview(prefix: str, count: int, tokens: int) -> list[tuple[int, NDArray[Any]]]:
    """Of the first `count` documents: the length in tokens, and at most `tokens` ids from the beginning."""
    corpus = IndexedReader(prefix)
    documents = [corpus[number] for number in range(min(count, len(corpus)))]
    return [(len(document), document[:tokens]) for document in documents]
