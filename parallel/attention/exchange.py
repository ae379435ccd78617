"""What context-parallel ranks send each other, differentiably: gathered sequences, heads for sequence."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.context import context_join


def gather_sequence(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole sequence [s, ...], in its natural order, from the zig-zag slices [s/cp, ...] of the ranks.

    Backward sums over the ranks, in rank order and at least float32, the gradients of this rank's slice.
    """
    gathered: Tensor = _Gather.apply(tensor, group)
    return context_join(gathered.unbind(0), dim=0)


def replicate_key_heads(tensor: Tensor, cp: int) -> Tensor:
    """Repeat the heads of keys or values [s, b, kv_heads, d] just so often that cp ranks can share them."""
    repeats = cp // math.gcd(tensor.size(2), cp)
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=2)


def sequence_to_heads(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Trade a slice [s/cp, b, heads, d] of all heads for all tokens of some heads [s, b, heads/cp, d].

    DeepSpeed Ulysses (Jacobs et al. 2023, section 3). Rank r receives the r-th run of heads/cp heads.
    """
    s, b, heads, dim = tensor.shape
    parts = tensor.view(s, b, group.size(), heads // group.size(), dim)
    received: Tensor = _AllToAll.apply(parts.permute(2, 0, 1, 3, 4), group)
    return context_join(received.unbind(0), dim=0)


def heads_to_sequence(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse of `sequence_to_heads`."""
    s, b, heads, dim = tensor.shape
    cp = group.size()
    # Rank r takes chunks r and 2cp-1-r: the late half, read backwards, lies beside the early half.
    early, late = tensor.view(2, cp, s // (2 * cp), b, heads, dim).unbind(0)
    parts = torch.stack((early, late.flip(0)), dim=1).flatten(1, 2)
    received: Tensor = _AllToAll.apply(parts, group)
    return received.permute(1, 2, 0, 3, 4).reshape(s // cp, b, cp * heads, dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = tensor.new_empty((group.size(), *tensor.shape))
        dist.all_gather(list(gathered.unbind(0)), tensor.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # A reduce-scatter whose sum is ours: not rounded to bfloat16 on the way, in one order on any backend.
        received = _all_to_all(grads[0], ctx.group)
        total = received.sum(0, dtype=torch.promote_types(received.dtype, torch.float32))
        return total.to(received.dtype), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(parts, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grads[0], ctx.group), None


def _all_to_all(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send parts[i] to rank i of the group; result[i] came from rank i."""
    sent = parts.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received
