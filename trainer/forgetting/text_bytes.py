"""How many bytes of text the tokens of an evaluation stand for: what makes tokenizers comparable."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from trainer.data.stream import Batches
from trainer.data.tokenizer import BytesTokenizer, Tokenizer


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """Of a mean loss in nats over `tokens` tokens that spell `text_bytes` bytes; NaN without text."""
    return loss * tokens / (math.log(2) * text_bytes) if text_bytes else math.nan


def count_text_bytes(stream: Batches, steps: int) -> int:
    """UTF-8 bytes of the tokens that have a loss in the first `steps` steps of a validation set.

    The first token of a document has none, so its bytes count neither. Special tokens are no text. Where the
    steps end in the middle of a document, or of a character, what is decoded of the beginning counts.
    """
    tokenizer = stream.tokenizer
    return sum(
        _length(tokenizer, document) - _length(tokenizer, document[:1])
        for document in _documents(stream, steps)
    )


def _documents(stream: Batches, steps: int) -> Iterator[NDArray[np.int64]]:
    """The tokens of every document with a loss, its first token included, in the order of the file.

    Of labels laid out one after the other, those without a loss are the first of a document or padding.
    """
    open_document: list[NDArray[np.int64]] = []
    for step in range(steps):
        (batch,) = stream.micro_batches(step, data_rank=0, data_size=1, micro_batch=stream.global_batch)
        labels, weights = batch.labels.numpy().reshape(-1), batch.loss_weights.numpy().reshape(-1)
        if not open_document:
            open_document = [batch.tokens.numpy().reshape(-1)[:1]]
        borders = np.flatnonzero(weights == 0)
        begin = 0
        for border in borders.tolist():
            open_document.append(labels[begin:border])
            yield np.concatenate(open_document)
            open_document, begin = [labels[border : border + 1]], border + 1
        open_document.append(labels[begin:])
    if open_document:
        yield np.concatenate(open_document)


def _length(tokenizer: Tokenizer, ids: NDArray[np.int64]) -> int:
    text = ids[~np.isin(ids, list(tokenizer.special_ids))]
    if isinstance(tokenizer, BytesTokenizer):
        return len(text)  # half a character is as many bytes as it has, which its U+FFFD is not
    return len(tokenizer.decode(text).encode()) if len(text) else 0
