"""Zig-zag slices of a sequence over context-parallel ranks, as megatron-core cuts them.

A sequence is cut into 2*CP equal chunks; rank r holds chunk r and chunk 2*CP-1-r, one after the other. Under
a causal mask every rank then has the same work. megatron-core's `get_batch_on_this_cp_rank` and its rotary
embeddings use the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def context_spans(length: int, rank: int, size: int) -> tuple[tuple[int, int], ...]:
    """The spans [start, end) of a sequence of `length` tokens that rank `rank` of `size` holds, in its order.

    Raises:
        ValueError: when the length is not a multiple of 2*size (size 1 takes any length).
    """
    if size == 1:
        return ((0, length),)
    if length % (2 * size):
        raise ValueError(
            f"sequence length {length} cannot be cut over context parallelism {size}: it must be a multiple "
            f"of {2 * size}. Change data.sequence_length or parallel.context"
        )
    chunk = length // (2 * size)
    return tuple((first * chunk, (first + 1) * chunk) for first in (rank, 2 * size - 1 - rank))


def context_slice(tensor: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """What rank `rank` of `size` holds of a whole tensor whose dimension `dim` is the sequence."""
    if size == 1:
        return tensor
    spans = context_spans(tensor.size(dim), rank, size)
    return torch.cat([tensor.narrow(dim, start, end - start) for start, end in spans], dim)


def context_join(slices: Sequence[Tensor], dim: int) -> Tensor:
    """The inverse of `context_slice`: the whole tensor from the slices of all ranks, in rank order."""
    if len(slices) == 1:
        return slices[0]
    early, late = zip(*(part.chunk(2, dim) for part in slices), strict=True)
    return torch.cat([*early, *reversed(late)], dim)
