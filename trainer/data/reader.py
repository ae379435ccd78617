"""What an order of documents and packing ask of a corpus, wherever its tokens lie."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Tokens(Protocol):
    """All tokens of a corpus, one document after the other."""

    def __getitem__(self, places: NDArray[np.int64], /) -> NDArray[Any]:
        """The tokens at these places, in the shape of `places`."""


class Documents(Protocol):
    """A corpus of numbered documents. `IndexedReader` is one; others are views of it."""

    @property
    def prefix(self) -> str:
        """How messages call it: the path of its files, where it has its own."""

    @property
    def num_tokens(self) -> int:
        """Of all its documents."""

    @property
    def tokens(self) -> Tokens: ...

    def __len__(self) -> int:
        """How many documents there are."""

    def spans(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First token and number of tokens of each of these documents, both int64 [documents]."""
