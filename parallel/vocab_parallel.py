"""Softmax quantities of logits whose vocabulary is split over the tensor ranks, with exact gradients.

Every function takes this rank's columns, [..., V/TP], in any floating dtype and computes in fp32. The maximum
and the sums go over the tensor group, as in megatron-core's cross-entropy, whose conventions hold: what has
no vocabulary dimension is the same on every tensor rank, and its gradient arrives on every one of them, so
that only a gradient that is itself split has to be summed. Logits of padded rows are the lowest number of
their dtype (`parallel/engine.py`): they have no probability and no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def log_sum_exp(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log Z = log sum exp over the whole vocabulary: fp32 [...], the same on every tensor rank."""
    result: Tensor = _LogSumExp.apply(logits, group)
    return result


def log_softmax(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's columns of the log-probabilities, fp32 [..., V/TP]."""
    result: Tensor = _LogSoftmax.apply(logits, group)
    return result


def kl_divergence(
    logits: Tensor,
    reference: Tensor,
    group: dist.ProcessGroup,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """KL(p || q) of every token, where q = softmax(logits / temperature): fp32 [...], in nats.

    Its gradient with respect to a logit is (q - p) / temperature, and for `reverse`, KL(q || p), it is
    q (log q - log p - KL) / temperature. It never flows into the reference.

    Args:
        reference: log p, this rank's columns; without probability where the logits have none.
    """
    result: Tensor = _KLDivergence.apply(logits, reference, group, temperature, reverse)
    return result


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, in fp32 where that changes anything."""
    return logits if temperature == 1.0 else logits.float() / temperature


def _sums(logits: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(the logits in fp32, their log-sum-exp over the whole vocabulary)."""
    values = logits.float()
    largest = values.amax(-1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    # Where a whole vocabulary has no probability, minus infinity is the answer rather than NaN.
    largest = largest.nan_to_num(neginf=0.0)
    total = (values - largest.unsqueeze(-1)).exp_().sum(-1)
    dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return values, total.log_() + largest


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        _, total = _sums(logits, group)
        ctx.save_for_backward(logits, total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, total = ctx.saved_tensors
        softmax = (logits.float() - total.unsqueeze(-1)).exp_()
        return softmax.mul_(gradient.unsqueeze(-1)).to(logits.dtype), None


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        values, total = _sums(logits, group)
        result = values - total.unsqueeze(-1)
        ctx.save_for_backward(result)
        ctx.group, ctx.dtype = group, logits.dtype
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        total = gradient.sum(-1, keepdim=True)
        dist.all_reduce(total, dist.ReduceOp.SUM, ctx.group)
        return (gradient - result.exp() * total).to(ctx.dtype), None


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        reference: Tensor,
        group: dist.ProcessGroup,
        temperature: float,
        reverse: bool,
    ) -> Tensor:
        values, total = _sums(tempered(logits, temperature), group)
        log_q = values - total.unsqueeze(-1)
        terms, _ = _kl_terms(log_q, reference, reverse)
        result = terms.sum(-1)
        dist.all_reduce(result, dist.ReduceOp.SUM, group)
        ctx.save_for_backward(log_q, reference, result)
        ctx.temperature, ctx.reverse, ctx.dtype = temperature, reverse, logits.dtype
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        log_q, log_p, result = ctx.saved_tensors
        if ctx.reverse:
            terms, q = _kl_terms(log_q, log_p, True)
            slope = terms - q * result.unsqueeze(-1)
        else:
            slope = log_q.exp() - log_p.exp()
        slope *= (gradient / ctx.temperature).unsqueeze(-1)
        return slope.to(ctx.dtype), None, None, None, None


def _kl_terms(log_q: Tensor, log_p: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The summands of the divergence, and the probabilities that weigh them; 0 log 0 is 0."""
    a, b = (log_q, log_p) if reverse else (log_p, log_q)
    weight = a.exp()
    return torch.where(weight > 0, weight * (a - b), 0.0), weight
