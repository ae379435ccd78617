"""What a step consumes: whole sequences with everything that is known about each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """`b` whole sequences of `s` tokens, not sliced for context parallelism."""

    tokens: Tensor
    """int64 [b, s]"""
    labels: Tensor
    """int64 [b, s], the next token"""
    loss_weights: Tensor
    """float32 [b, s], 0 where the label is padding or belongs to the next document"""
    positions: Tensor
    """int64 [b, s], restarts at every document"""
    documents: Tensor
    """int32 [b, s], number of the document inside its sequence, from 0; padding is a document of its own"""
    sources: Tensor
    """int32 [b, s], index of the source"""
