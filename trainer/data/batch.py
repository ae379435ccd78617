"""What a step consumes: whole sequences with everything that is known about each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NEXT_TOKEN = 0
"""The objective of every token that no transform has given another."""
NO_GROUP = -1
"""The group of a source without one."""
COLUMNS: Mapping[str, str] = {
    "tokens": "int64",
    "labels": "int64",
    "loss_weights": "float32",
    "positions": "int64",
    "documents": "int32",
    "sources": "int32",
    "objectives": "int32",
    "groups": "int32",
}
"""The fields of a `MicroBatch` in their order, and what they are."""


@dataclass(frozen=True)
class MicroBatch:
    """`b` whole sequences of `s` tokens, not sliced for context parallelism."""

    tokens: Tensor
    """int64 [b, s]"""
    labels: Tensor
    """int64 [b, s], the next token"""
    loss_weights: Tensor
    """float32 [b, s], 0 where the label is padding, belongs to the next document, or is given rather than
    learnt (metadata); otherwise 1, times what the run's transforms make of it"""
    positions: Tensor
    """int64 [b, s], restarts at every document"""
    documents: Tensor
    """int32 [b, s], number of the document inside its sequence, from 0; padding is a document of its own"""
    sources: Tensor
    """int32 [b, s], index of the source"""
    objectives: Tensor
    """int32 [b, s], `NEXT_TOKEN`, or the number that a transform gives to its own"""
    groups: Tensor
    """int32 [b, s], index of the source's group in `DataConfig.group_names`; `NO_GROUP` where it has none"""
