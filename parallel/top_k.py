"""The k most likely tokens of a distribution over a vocabulary that is split over the tensor ranks.

What is left out is kept as one number, the logarithm of its probability, so that a distribution is k + 1
bins: k tokens and the rest. A divergence over these bins is never above the one over the whole vocabulary
(the data processing inequality: Cover and Thomas, Elements of Information Theory, section 2.8), is zero for
equal distributions, and is exact where k is the whole vocabulary. How the rest is spread over its tokens is
what it does not see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.vocab_parallel import log_softmax, log_sum_exp, tempered

_LOWEST = -1e30  # log-probabilities below are those of padding


@dataclass(frozen=True)
class TopK:
    """The most likely tokens of every position, the same on every tensor rank.

    Attributes:
        tokens: int32 [..., k], vocabulary ids, the likeliest first.
        log_probabilities: fp32 [..., k].
        log_rest: fp32 [...], of all other tokens together; minus infinity where there are none.
    """

    tokens: Tensor
    log_probabilities: Tensor
    log_rest: Tensor


@torch.no_grad()
def top_k(logits: Tensor, k: int, group: dist.ProcessGroup, *, temperature: float = 1.0) -> TopK:
    """The `k` likeliest tokens of softmax(logits / temperature); logits are this rank's columns [..., V/TP].

    k must be at most the size of the vocabulary without padding. Of equally likely tokens any may be listed.
    """
    columns = logits.size(-1)
    log_p = log_softmax(tempered(logits, temperature), group)
    values, places = log_p.topk(min(k, columns))
    places += columns * group.rank()
    if group.size() > 1:
        values, places = (_gather_last(part, group) for part in (values, places))
        values, chosen = values.topk(k)
        places = places.gather(-1, chosen)
    gone = _is_listed(places, log_p, group) | (log_p < _LOWEST)
    return TopK(places.int(), values, log_sum_exp(log_p.masked_fill(gone, -torch.inf), group))


@torch.no_grad()
def spread(target: TopK, logits: Tensor, group: dist.ProcessGroup, *, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of all tokens that agree with `target`: this rank's columns, fp32 [..., V/TP].

    The rest is spread as softmax(logits / temperature) spreads it. So the divergence between them and that
    softmax, and its gradient, are those over the k + 1 bins.
    """
    log_q = log_softmax(tempered(logits, temperature), group)
    listed = _is_listed(target.tokens.long(), log_q, group)
    log_rest = log_sum_exp(log_q.masked_fill(listed, -torch.inf), group)
    shift = torch.where(target.log_rest.isneginf(), -torch.inf, target.log_rest - log_rest)
    result = log_q + shift.unsqueeze(-1)
    local, here = _local(target.tokens.long(), log_q, group)
    # A column of its own takes what other ranks hold, since scatter has no mask.
    padded = torch.cat([result, result.new_empty(*result.shape[:-1], 1)], -1)
    padded.scatter_(-1, torch.where(here, local, log_q.size(-1)), target.log_probabilities)
    return padded[..., :-1]


def _gather_last(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group)
    return torch.cat(parts, -1)


def _local(tokens: Tensor, columns: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(column of each token on this rank, whether this rank has it)."""
    local = tokens - columns.size(-1) * group.rank()
    return local, (local >= 0) & (local < columns.size(-1))


def _is_listed(tokens: Tensor, columns: Tensor, group: dist.ProcessGroup) -> Tensor:
    """bool like `columns`: whether the token of a column is among `tokens` [..., k]."""
    local, here = _local(tokens, columns, group)
    size = columns.size(-1)
    listed = torch.zeros(*columns.shape[:-1], size + 1, dtype=torch.bool, device=columns.device)
    return listed.scatter_(-1, torch.where(here, local, size), True)[..., :size]
