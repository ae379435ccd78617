"""Attention of a rank's queries over whole keys, as calls of torch SDPA on tiles.

A tile is a run of queries and the run of keys they can see. A plain causal batch is one tile for all rows;
packed documents give tiles of whole documents, so the work is the sum of len^2 and not s^2; a sliding window
gives tiles along the diagonal, so the work is s * window. What needs a mask is cut into bands of few queries,
which all look at one mask: masks take at most 1024 s bytes, and not s^2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.attention.mask import PlanCache, document_runs, visible

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Tile:
    """Queries [start, end) and keys [key_start, end), in global positions; mask None is square and causal."""

    start: int
    end: int
    key_start: int
    mask: Tensor | None  # bool [queries, keys]


Plan = list[list[Tile]]  # tiles of each row, in the order of the rank's queries; one list if rows are alike

_plans: PlanCache[Plan] = PlanCache()
_BAND = 1024  # queries of a masked tile
_SMALL = 64  # tokens: neighbouring documents share one masked tile up to here, for a call has its own cost


def plan_tiles(documents: Tensor | None, spans: Spans, window: int | None, device: torch.device) -> Plan:
    """Cut the queries of `spans` into tiles.

    Args:
        documents: int [b, s] over the whole sequence, or None for one document a row.
        spans: global spans of the rank's queries, see `parallel.context.context_spans`.
        window: tokens a query sees before itself; None is no limit.
        device: where the masks are made.
    """
    if documents is None:
        return _plan_one_document(spans, window, device)

    def build() -> Plan:
        runs = document_runs(documents)
        rows = documents.to(device)
        if all(row_runs == runs[0] for row_runs in runs):
            return [_row_tiles(runs[0], spans, window, row=rows[0])]
        of_rows = zip(runs, rows, strict=True)
        return [_row_tiles(row_runs, spans, window, row=row) for row_runs, row in of_rows]

    return _plans.get(documents, (spans, window, device), build)


@lru_cache(maxsize=8)
def _plan_one_document(spans: Spans, window: int | None, device: torch.device) -> Plan:
    length = max(end for _, end in spans)
    return [_row_tiles([(0, length)], spans, window, row=torch.zeros(length, device=device))]


def _row_tiles(
    runs: Sequence[tuple[int, int]], spans: Spans, window: int | None, *, row: Tensor
) -> list[Tile]:
    """Tiles of one row, whose documents [s] make these runs, in the order of the spans."""
    tiles = []
    for group in _group_small(_segments(runs, spans)):
        for start, end, key_start in _bands(group, window):
            mask = None
            if group.documents > 1:
                mask = _documents_mask(row, start, end, key_start, window)
            elif key_start < start or (window is not None and end - start > window + 1):
                mask = _band_mask(end - start, end - key_start, window, row=row)
            tiles.append(Tile(start, end, key_start, mask))
    return tiles


def _documents_mask(row: Tensor, start: int, end: int, key_start: int, window: int | None) -> Tensor:
    return visible(
        torch.arange(start, end, device=row.device),
        torch.arange(key_start, end, device=row.device),
        window,
        query_documents=row[start:end],
        key_documents=row[key_start:end],
    )


def _band_mask(queries: int, keys: int, window: int | None, *, row: Tensor) -> Tensor:
    """Mask of the last `queries` of `keys` tokens of one document: a corner of the mask all bands share."""
    most = min(_BAND, row.numel())
    reach = row.numel() if window is None else min(row.numel(), most + window)
    return _shared_mask(most, reach, window, row.device)[-queries:, -keys:]


@lru_cache(maxsize=2)  # layers with a window and layers without
def _shared_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)
    return mask if window is None else mask.triu_(keys - queries - window)


@dataclass(frozen=True)
class _Group:
    """Neighbouring queries [start, end) of one or more documents, the first of which starts at key_start."""

    start: int
    end: int
    key_start: int
    documents: int


def _segments(runs: Sequence[tuple[int, int]], spans: Spans) -> Iterator[_Group]:
    for span_start, span_end in spans:
        for start, end in runs:
            if start < span_end and end > span_start:
                yield _Group(max(start, span_start), min(end, span_end), start, 1)


def _group_small(segments: Iterable[_Group]) -> Iterator[_Group]:
    held: _Group | None = None
    for segment in segments:
        # The next document, and its very beginning: in a later span a document may have begun long before.
        follows = held is not None and held.end == segment.start == segment.key_start
        if held and follows and segment.end - held.key_start <= _SMALL:
            held = replace(held, end=segment.end, documents=held.documents + 1)
            continue
        if held:
            yield held
        held = segment
    if held:
        yield held


def _bands(group: _Group, window: int | None) -> Iterator[tuple[int, int, int]]:
    """(start, end, key_start) of the tiles of a group: one without a mask, or a row of them."""
    unlimited = window is None or group.end - group.key_start <= window + 1
    if unlimited and group.start == group.key_start:
        yield group.start, group.end, group.key_start
        return
    step = _BAND if window is None else min(max(window + 1, _SMALL), _BAND)
    for start in range(group.start, group.end, step):
        reach = group.key_start if window is None else max(group.key_start, start - window)
        yield start, min(start + step, group.end), reach


def attend_tiles(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, *, scale: float, dropout: float = 0.0
) -> Tensor:
    """Softmax attention of a rank's queries over whole keys.

    Args:
        query: [sq, b, heads, head_dim], the tokens of the plan's spans, in their order.
        key: [s, b, kv_heads, head_dim], the whole sequence in its natural order.
        value: like key.
        plan: from `plan_tiles`.
        scale: of the scores.
        dropout: probability of dropping a weight.

    Returns:
        [sq, b, heads, head_dim]
    """
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    if len(plan) == 1:
        rows = [_attend_row(q, k, v, plan[0], scale, dropout)]
    else:
        columns = zip(q.split(1), k.split(1), v.split(1), plan, strict=True)
        rows = [_attend_row(qs, ks, vs, tiles, scale, dropout) for qs, ks, vs, tiles in columns]
    return torch.cat(rows).permute(2, 0, 1, 3) if len(rows) > 1 else rows[0].permute(2, 0, 1, 3)


def _attend_row(
    q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float, dropout: float
) -> Tensor:
    """q [rows, heads, sq, head_dim], k and v [rows, kv_heads, s, head_dim]."""
    if sum(tile.end - tile.key_start for tile in tiles if _lacks_groups(q, k, tile.mask)) > k.size(2):
        k, v = _repeat_groups(q, k, v)  # once, for the tiles overlap
    if len(tiles) == 1 and tiles[0].end - tiles[0].key_start == k.size(2):
        return _attend_tile(q, k, v, tiles[0].mask, scale, dropout)
    sizes = [tile.end - tile.start for tile in tiles]
    if sum(sizes) == k.size(2) and all(tile.key_start == tile.start for tile in tiles):
        keys, values = k.split(sizes, dim=2), v.split(sizes, dim=2)
    else:
        spans = [(tile.key_start, tile.end) for tile in tiles]
        keys, values = _Slices.apply(k, spans), _Slices.apply(v, spans)
    columns = zip(q.split(sizes, dim=2), keys, values, tiles, strict=True)
    outputs = [_attend_tile(qs, ks, vs, tile.mask, scale, dropout) for qs, ks, vs, tile in columns]
    return torch.cat(outputs, dim=2)


class _Slices(torch.autograd.Function):
    """Overlapping slices along dimension 2, whose gradients are summed in one tensor, at least float32.

    The gradient of a narrow would be, for every tile, a tensor as long as the sequence.
    """

    @staticmethod
    def forward(ctx: Any, whole: Tensor, spans: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        ctx.spans, ctx.shape = spans, whole.shape
        return tuple(whole[:, :, start:end] for start, end in spans)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        dtype = torch.promote_types(grads[0].dtype, torch.float32)
        total = grads[0].new_zeros(ctx.shape, dtype=dtype)
        for (start, end), grad in zip(ctx.spans, grads, strict=True):
            total[:, :, start:end] += grad
        return total.to(grads[0].dtype), None


def _lacks_groups(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel knows no grouped heads (CUDA's for masks and float32): the scores would be kept."""
    return q.is_cuda and q.size(1) != k.size(1) and (mask is not None or q.dtype == torch.float32)


def _repeat_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    repeats = q.size(1) // k.size(1)
    return k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)


def _attend_tile(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> Tensor:
    if _lacks_groups(q, k, mask):
        k, v = _repeat_groups(q, k, v)
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
