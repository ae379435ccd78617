"""Documents with their metadata before them (MeCo, Gao et al. 2025, arXiv 2501.01956, section 2)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.indexed import IndexedReader
from trainer.data.order import Spans
from trainer.data.reader import Documents

OFFSET_BITS = np.int64(32)
"""A place is a document's number, and behind it the number of the token inside the document."""
OFFSETS = np.int64((1 << 32) - 1)


class PrefixedDocuments:
    """A view of a corpus in which document i is its metadata and then its text.

    The metadata is given: the model reads it, and no token of it is a label that counts. The first token of
    the text is learnt from the last one of the metadata.
    """

    def __init__(self, text: Documents, metadata: IndexedReader) -> None:
        """Both have the same number of documents; no document of `text` is empty if its metadata is not."""
        assert len(text) == len(metadata), "whoever opens the files compares them"
        self.text = text
        self.metadata = metadata

    @property
    def prefix(self) -> str:
        """Of the text's files."""
        return self.text.prefix

    @property
    def num_tokens(self) -> int:
        """Of texts and metadata."""
        return self.text.num_tokens + self.metadata.num_tokens

    @property
    def tokens(self) -> _PrefixedTokens:
        """By place: whole documents, one behind the other, with gaps between them."""
        return _PrefixedTokens(self.text, self.metadata)

    def __len__(self) -> int:
        return len(self.text)

    def spans(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First place and number of tokens of each of these documents, both int64 [documents]."""
        _, lengths = self.text.spans(documents)
        return documents << OFFSET_BITS, lengths + self.given(documents)

    def given(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens the metadata of each of these documents has."""
        return self.metadata.spans(documents)[1]

    def given_of(self, spans: Spans) -> NDArray[np.int64]:
        """How many of the first tokens of each span are metadata, [n]."""
        left = self.given(spans.documents) - (spans.begins & OFFSETS)
        return np.clip(left, 0, spans.lengths)


class _PrefixedTokens:
    def __init__(self, text: Documents, metadata: IndexedReader) -> None:
        self._text = text
        self._metadata = metadata

    def __getitem__(self, places: NDArray[np.int64], /) -> NDArray[Any]:
        """The tokens at these places, in the shape of `places`."""
        flat = places.reshape(-1)
        if not len(flat):
            return self._text.tokens[places]
        documents = flat >> OFFSET_BITS
        runs = np.cumsum(np.diff(documents, prepend=documents[:1]) != 0)  # which run of one document it is in
        of_run = documents[np.flatnonzero(np.diff(runs, prepend=-1))]
        given_begins, given = self._metadata.spans(of_run)
        text_begins, _ = self._text.spans(of_run)
        behind = (flat & OFFSETS) - given[runs]  # places behind the first token of the text
        in_text = behind >= 0
        found = np.empty(len(flat), np.result_type(self._text.tokens[flat[:0]], self._metadata.tokens[:0]))
        found[in_text] = self._text.tokens[(text_begins[runs] + behind)[in_text]]
        found[~in_text] = self._metadata.tokens[(given_begins[runs] + given[runs] + behind)[~in_text]]
        return found.reshape(places.shape)
