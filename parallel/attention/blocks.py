"""The blocks of ring attention: which half of a rank's queries sees what of the keys passing by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from types import EllipsisType

import torch
from torch import Tensor

from parallel.attention.mask import PlanCache, visible
from parallel.context import context_spans

Span = tuple[int, int]
Band = tuple[EllipsisType, slice, slice]  # the last two dimensions: queries, and all of the other


@dataclass(frozen=True)
class Block:
    """Half `query` of this rank's queries sees (some of) half `key` of the keys passing by."""

    query: int
    key: int
    sight: Sight | None  # None: every query sees every key

    def mask(self, band: Band) -> Tensor | None:
        """Which keys a band of the queries sees; None is all."""
        return None if self.sight is None else self.sight.mask(band[1])


@dataclass(frozen=True)
class Sight:
    """What the queries of a span see of a span of keys; masks are made band by band, for all would be s^2."""

    queries: Span
    keys: Span
    window: int | None
    documents: Tensor | None  # [b, s]
    device: torch.device

    def mask(self, band: slice) -> Tensor:
        """Bool, broadcasts to [b, kv_heads, group, queries of the band, keys]."""
        rows = slice(self.queries[0] + band.start, self.queries[0] + band.stop)
        columns = slice(*self.keys)
        query_positions, key_positions = (
            torch.arange(run.start, run.stop, dtype=torch.int32, device=self.device)
            for run in (rows, columns)
        )
        if self.documents is None:
            return visible(query_positions, key_positions, self.window)
        seen = visible(
            query_positions,
            key_positions,
            self.window,
            query_documents=self.documents[:, rows],
            key_documents=self.documents[:, columns],
        )
        return seen[:, None, None]

    def some(self) -> bool:
        """Whether any query sees any key: if so, the nearest two do."""
        distance = self.queries[0] - (self.keys[1] - 1)
        if self.queries == self.keys:
            return True
        near = distance > 0 and (self.window is None or distance <= self.window)
        return near and bool(self._alike(self.queries[0], self.keys[1] - 1).any())

    def all(self) -> bool:
        """Whether every query sees every key: if so, the nearest and the farthest two do."""
        farthest = self.queries[1] - 1 - self.keys[0]
        before = self.queries[0] >= self.keys[1] - 1
        near = self.window is None or farthest <= self.window
        return before and near and bool(self._alike(self.queries[1] - 1, self.keys[0]).all())

    def _alike(self, query: int, key: int) -> Tensor:
        """Whether the two are of one document, in each row."""
        if self.documents is None:
            return torch.ones(1, dtype=torch.bool)
        return self.documents[:, query] == self.documents[:, key]


Plan = tuple[tuple[Block, ...], ...]  # blocks of every step of the ring

_plans: PlanCache[Plan] = PlanCache()


def ring_plan(
    length: int, rank: int, size: int, window: int | None, device: torch.device, documents: Tensor | None
) -> Plan:
    """`plan_blocks`, once a batch and not once a layer."""
    if documents is None:
        return _plan_one_document(length, rank, size, window, device)
    where = (length, rank, size, window, device)
    return _plans.get(documents, where, lambda: plan_blocks(*where, documents))


@lru_cache(maxsize=8)
def _plan_one_document(length: int, rank: int, size: int, window: int | None, device: torch.device) -> Plan:
    return plan_blocks(length, rank, size, window, device, None)


def plan_blocks(
    length: int, rank: int, size: int, window: int | None, device: torch.device, documents: Tensor | None
) -> Plan:
    """The blocks that a rank attends to, left out what no query sees.

    Args:
        length: of the whole sequence.
        rank: of this rank among the context-parallel ones.
        size: context-parallel ranks.
        window: tokens a query sees before itself; None is no limit.
        device: where attention is computed.
        documents: int [b, s], each document one run of equal numbers, best on the host; None is one document.
    """
    spans = context_spans(length, rank, size)
    # A copy: backward makes masks of it, and the batch may have been rewritten by then.
    moved = None if documents is None else documents.to(device, copy=True)
    steps = []
    for step in range(size):
        sources = context_spans(length, (rank - step) % size, size)
        blocks = []
        for query, queries in enumerate(spans):
            for key, keys in enumerate(sources):
                sight = Sight(queries, keys, window, documents, device)
                if sight.some():
                    there = None if sight.all() else replace(sight, documents=moved)
                    blocks.append(Block(query, key, there))
        # The diagonal first: it leaves every query a finite log-sum-exp to merge the others into.
        steps.append(tuple(sorted(blocks, key=lambda block: block.query != block.key)))
    return tuple(steps)
