"""Packing against an oracle that walks token by token."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.corpora import ragged, write_tokens
from trainer.data.indexed import IndexedReader
from trainer.data.order import SourceOrder, cut
from trainer.data.packing import Sequences, pack

FILL = 7777


def oracle(runs: list[list[int]], row: int, length: int, document_mask: bool) -> dict[str, list[Any]]:
    """One sequence, as the definition of a MicroBatch has it."""
    stream = [(token, run) for run, tokens in enumerate(runs) for token in tokens]
    padding = (FILL, len(runs))
    out: dict[str, list[Any]] = {
        key: [] for key in ("tokens", "labels", "loss_weights", "positions", "documents")
    }
    position = document = 0
    previous = -1
    for place in range(row * length, (row + 1) * length):
        token, run = stream[place] if place < len(stream) else padding
        following, next_run = stream[place + 1] if place + 1 < len(stream) else padding
        if document_mask and place > row * length and run != previous:
            position, document = 0, document + 1
        out["tokens"].append(token)
        out["labels"].append(following)
        out["loss_weights"].append(float(run == next_run and run < len(runs)))
        out["positions"].append(position)
        out["documents"].append(document)
        position, previous = position + 1, run
    return out


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize(("longest", "length"), [(1, 8), (5, 8), (40, 8), (40, 64), (300, 16)])
def test_ragged_documents_match_the_oracle(
    tmp_path: Path, longest: int, length: int, document_mask: bool
) -> None:
    corpus = IndexedReader(write_tokens(tmp_path / "c", ragged(60, longest=longest)))
    spans = SourceOrder(corpus, seed=3, name="s").spans(5, min(corpus.num_tokens, 1000))
    runs = [
        corpus.tokens[begin : begin + size].tolist()
        for begin, size in zip(spans.begins.tolist(), spans.lengths.tolist(), strict=True)
    ]
    rows = np.arange(int(spans.lengths.sum()) // length + 3)  # the last ones run into padding
    packed = pack(corpus.tokens, spans, rows, length=length, fill=FILL, document_mask=document_mask)
    for row in rows.tolist():
        for name, expected in oracle(runs, row, length, document_mask).items():
            assert getattr(packed, name)[row].tolist() == expected, (name, row)


def test_rows_may_come_in_any_order(tmp_path: Path) -> None:
    corpus = IndexedReader(write_tokens(tmp_path / "c", ragged(60)))
    spans = SourceOrder(corpus, seed=3, name="s").spans(0, 161)

    def take(rows: list[int]) -> Sequences:
        return pack(corpus.tokens, spans, np.array(rows), length=16, fill=FILL, document_mask=True)

    assert take([7, 2]).positions.tolist() == take(list(range(10))).positions[[7, 2]].tolist()


def test_cut_takes_the_asked_tokens_only(tmp_path: Path) -> None:
    corpus = IndexedReader(write_tokens(tmp_path / "c", ragged(60)))
    spans = SourceOrder(corpus, seed=3, name="s").spans(0, 500)
    part = cut(spans, 123, 45)
    assert part.lengths.sum() == 45
    whole = np.concatenate([np.arange(b, b + n) for b, n in zip(spans.begins, spans.lengths, strict=True)])
    got = np.concatenate([np.arange(b, b + n) for b, n in zip(part.begins, part.lengths, strict=True)])
    assert got.tolist() == whole[123:168].tolist()
