"""Context parallelism "p2p": keys and values travel round a ring while each rank attends to what passes by.

Ring attention (Liu, Zaharia and Abbeel 2023, section 3) over zig-zag slices: at every step each rank has
about the same work, since blocks that no query sees are skipped. Blocks are merged by their log-sum-exp, and
the backward recomputes the scores from it (FlashAttention: Dao et al. 2022, section 3.1, appendix B.4), all
in float32 at least. The queries of a block go in bands, so that one tensor of scores takes at most 256 MiB
(forward holds one, backward two).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.attention.blocks import Band, Plan, ring_plan

_SCORES = 2**28  # bytes of a tensor of scores


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Tensor | None,
    *,
    group: dist.ProcessGroup,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention over a ring of ranks.

    Args:
        query: [s/cp, b, heads, head_dim], this rank's zig-zag slice.
        key: [s/cp, b, kv_heads, head_dim].
        value: like key.
        documents: int [b, s] over the whole sequence; None is one document a row.
        group: the context-parallel ranks.
        scale: of the scores.
        window: tokens a query sees before itself; None is no limit.

    Returns:
        [s/cp, b, heads, head_dim]
    """
    length, rank, size = query.size(0) * group.size(), group.rank(), group.size()
    plan = ring_plan(length, rank, size, window, query.device, documents)
    output: Tensor = _Ring.apply(query, key, value, plan, group, scale)
    return output


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: Plan,
        group: dist.ProcessGroup,
        scale: float,
    ) -> Tensor:
        q = _halves(query, key.size(2))
        out = [torch.zeros_like(half) for half in q]
        lse = [torch.full_like(half[..., :1], -torch.inf) for half in q]
        pair = torch.stack((key, value))
        for step, blocks in enumerate(plan):
            pending = _pass_on(pair, group) if step + 1 < len(plan) else None
            k, v = (_halves(tensor, key.size(2)) for tensor in pair)
            for block in blocks:
                i, (kj, vj) = block.query, (half[block.key].flatten(2, 3) for half in (k, v))
                for band in _bands(q[i], kj):
                    _merge(q[i][band], kj, vj, out[i][band], lse[i][band], mask=block.mask(band), scale=scale)
            pair = pending.wait() if pending else pair
        output = _join(out, query)
        ctx.save_for_backward(query, key, value, output, *lse)
        ctx.plan, ctx.group, ctx.scale = plan, group, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # P = exp(S - lse), dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)), dQ = dS K, dK = dS^T Q.
        query, key, value, output, *lse = ctx.saved_tensors
        q, o, do = (_halves(tensor, key.size(2)) for tensor in (query, output, grads[0]))
        delta = [(half * grad).sum(-1, keepdim=True) for half, grad in zip(o, do, strict=True)]
        dq = [torch.zeros_like(half) for half in q]
        pair = torch.stack((key, value))
        home: _Pending | None = None
        for step, blocks in enumerate(ctx.plan):
            pending = _pass_on(pair, ctx.group) if step + 1 < len(ctx.plan) else None
            k, v = (_halves(tensor, key.size(2)) for tensor in pair)
            dk, dv = (torch.zeros(2, *k[0].shape, dtype=k[0].dtype, device=k[0].device) for _ in range(2))
            for block in blocks:
                i, j = block.query, block.key
                kj, vj, dkj, dvj = (half[j].flatten(2, 3) for half in (k, v, dk, dv))  # views
                for band in _bands(q[i], kj):
                    qb, ob, lb, db = (half[i][band].flatten(2, 3) for half in (q, do, lse, delta))
                    p = _scores(q[i][band], kj, block.mask(band), ctx.scale).sub_(lb).exp_()
                    dvj += p.transpose(-1, -2) @ ob
                    ds = (ob @ vj.transpose(-1, -2)).sub_(db).mul_(p).mul_(ctx.scale)
                    dq[i][band] += (ds @ kj).view_as(q[i][band])
                    dkj += ds.transpose(-1, -2) @ qb
            travelling = torch.stack((dk, dv))
            if home:  # what the ranks before this one found for the same keys and values
                travelling += home.wait()
            home = _pass_on(travelling, ctx.group)
            pair = pending.wait() if pending else pair
        assert home is not None
        dk, dv = home.wait()
        return _join(dq, query), _join(list(dk), key), _join(list(dv), value), None, None, None


def _halves(tensor: Tensor, kv_heads: int) -> list[Tensor]:
    """[s, b, heads, d] as two halves [b, kv_heads, group, s/2, d], at least float32."""
    s, b, heads, dim = tensor.shape
    inner = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    split = inner.view(2, s // 2, b, kv_heads, heads // kv_heads, dim)
    return list(split.permute(0, 2, 3, 4, 1, 5).contiguous().unbind(0))


def _join(halves: list[Tensor], like: Tensor) -> Tensor:
    """The inverse of `_halves`, in the shape and dtype of `like`."""
    return torch.stack(halves).permute(0, 4, 1, 2, 3, 5).reshape(like.shape).to(like.dtype)


def _bands(q: Tensor, k: Tensor) -> Iterator[Band]:
    """Bands of the queries [b, kv_heads, group, queries, d], each with few enough scores over the keys."""
    queries = q.size(3)
    row = q.size(0) * q.size(1) * q.size(2) * k.size(2) * q.element_size()
    step = max(1, _SCORES // row)
    for start in range(0, queries, step):
        yield ..., slice(start, min(start + step, queries)), slice(None)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Scaled scores [b, kv_heads, group * queries, keys], -inf where the mask is false."""
    scores = (q.flatten(2, 3) @ k.transpose(-1, -2)).mul_(scale)
    if mask is not None:
        scores.view(*q.shape[:4], -1).masked_fill_(~mask, -torch.inf)
    return scores


def _merge(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, mask: Tensor | None, scale: float
) -> None:
    """Attend to one block of keys, and add it to `out` and `lse` in place."""
    scores = _scores(q, k, mask, scale)
    merged = torch.logaddexp(lse, scores.logsumexp(-1, keepdim=True).view_as(lse))
    weighted = scores.sub_(merged.flatten(2, 3)).exp_() @ v
    out.mul_((lse - merged).exp_()).add_(weighted.view_as(out))
    lse.copy_(merged)


class _Pending:
    """A tensor on its way to the next rank of the ring, and the one coming from the rank before."""

    def __init__(self, sent: Tensor, group: dist.ProcessGroup) -> None:
        rank, size = group.rank(), group.size()
        self._sent = sent  # alive until the transfer is over
        self._received = torch.empty_like(sent)
        after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, after, group=group),
                dist.P2POp(dist.irecv, self._received, before, group=group),
            ]
        )

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._received


def _pass_on(tensor: Tensor, group: dist.ProcessGroup) -> _Pending:
    return _Pending(tensor.contiguous(), group)
