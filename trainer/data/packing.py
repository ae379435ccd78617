"""Cutting runs of tokens into sequences, with what the model has to know about every token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.order import Spans
from trainer.data.reader import Tokens


@dataclass(frozen=True)
class Sequences:
    """Packed sequences, all [n, s]; see `MicroBatch` for the meaning of each."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_weights: NDArray[np.float32]
    positions: NDArray[np.int64]
    documents: NDArray[np.int32]


def pack(
    tokens: Tokens,
    spans: Spans,
    rows: NDArray[np.int64],
    *,
    length: int,
    fill: int,
    document_mask: bool,
) -> Sequences:
    """Lay the spans out one after the other and take the sequences `rows` of `length` tokens each.

    Args:
        tokens: the corpus that `spans` point into.
        rows: numbers of the sequences; sequence r holds tokens r * length, ..., (r + 1) * length - 1 of the
            layout. fill: id that pads what lies behind the last span. document_mask: restart positions and
            count documents at every span; else a sequence is one document.

    The label of a token is the next token of the layout. Its loss weight is 0 where that token begins another
    document, or where it is given (`Spans.given`): every other pair of neighbours inside a document is learnt
    exactly once, wherever the cuts fall.
    """
    ends = np.cumsum(spans.lengths)
    starts = np.concatenate([ends - spans.lengths, ends[-1:]])  # behind the last span, padding
    first = rows[:, None] * length
    places = first + np.arange(length + 1)
    which = np.searchsorted(starts, places, side="right") - 1
    padding = which == len(spans)
    begins = np.append(spans.begins, 0)
    index = np.where(padding, 0, begins[which] + places - starts[which])
    ids = np.where(padding, fill, tokens[index].astype(np.int64))
    learnt = (which[:, :-1] == which[:, 1:]) & ~padding[:, :-1]
    if spans.given is not None:
        given = np.append(starts[:-1] + spans.given, 0)
        learnt &= places[:, 1:] >= given[which[:, 1:]]
    if document_mask:
        positions = (places - np.maximum(starts[which], first))[:, :-1]
        documents = which[:, :-1] - which[:, :1]
    else:
        positions = np.broadcast_to(np.arange(length), learnt.shape)
        documents = np.broadcast_to(0, learnt.shape)
    return Sequences(
        ids[:, :-1],
        ids[:, 1:],
        learnt.astype(np.float32),
        positions.astype(np.int64),
        documents.astype(np.int32),
    )
