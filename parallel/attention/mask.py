"""Which tokens see which: causal, inside one document, inside a sliding window."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor

P = TypeVar("P")


def visible(
    query_positions: Tensor,
    key_positions: Tensor,
    window: int | None,
    *,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
) -> Tensor:
    """True where a query sees a key: bool [..., queries, keys].

    Args:
        query_positions: global positions [queries].
        key_positions: global positions [keys].
        window: tokens a query sees before itself; None is no limit.
        query_documents: documents of the queries [..., queries]; None is one document.
        key_documents: documents of the keys [..., keys]; given exactly when query_documents is.
    """
    distance = query_positions[:, None] - key_positions[None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance <= window
    if query_documents is None or key_documents is None:
        return seen
    return seen & (query_documents[..., :, None] == key_documents[..., None, :])


def document_runs(documents: Tensor) -> list[list[tuple[int, int]]]:
    """The runs [start, end) of equal numbers in each row of documents [b, s]."""
    rows = documents.detach().cpu()
    runs = []
    for row in rows:
        starts = [0, *(torch.nonzero(row[1:] != row[:-1]).flatten() + 1).tolist()]
        runs.append(list(zip(starts, [*starts[1:], row.numel()], strict=True)))
    return runs


class PlanCache(Generic[P]):
    """Keeps what was derived from the last few `documents` tensors: built once a batch, not once a layer.

    A tensor is told by its memory and version, since recomputation passes another object over the same
    memory. The cache holds the tensor: as long as an entry lives, its memory goes to no other batch.
    """

    def __init__(self, capacity: int = 8) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[Hashable, tuple[Tensor, P]] = OrderedDict()

    def get(self, documents: Tensor, variant: Hashable, build: Callable[[], P]) -> P:
        """The plan for these documents and this variant, built when it is not there."""
        key = (documents.data_ptr(), documents._version, documents.shape, documents.stride(), variant)
        if key not in self._entries:
            self._entries[key] = (documents, build())
            if len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        return self._entries[key][1]
