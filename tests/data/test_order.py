"""Each source's endless stream of tokens."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.corpora import ragged, write_tokens
from trainer.data import order
from trainer.data.indexed import HEADER, IndexedReader
from trainer.data.order import SourceOrder, Spans, file_spans, permute


def read(corpus: IndexedReader, spans: Spans) -> list[int]:
    runs = zip(spans.begins.tolist(), spans.lengths.tolist(), strict=True)
    return [token for begin, length in runs for token in corpus.tokens[begin : begin + length].tolist()]


@pytest.fixture
def corpus(tmp_path: Path) -> IndexedReader:
    return IndexedReader(write_tokens(tmp_path / "c", ragged(200)))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "BLOCK", 16)  # so that 200 documents cross many borders


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000, 4099])
def test_permute_is_a_permutation(count: int) -> None:
    assert sorted(permute(np.arange(count), count, 123456789).tolist()) == list(range(count))


def test_permute_does_not_favour_any_place() -> None:
    """Chi-squared over 8 x 8 places, 4000 keys: 49 degrees of freedom; 100 is passed once in 30,000 times."""
    keys = np.random.default_rng(0).integers(0, 2**63, 4000)
    hits = np.zeros((8, 8))
    for key in keys.tolist():
        hits[np.arange(8), permute(np.arange(8), 8, key)] += 1
    assert ((hits - 500) ** 2 / 500).sum() < 100


def test_an_epoch_reads_every_token_exactly_once(corpus: IndexedReader) -> None:
    source = SourceOrder(corpus, seed=1, name="s")
    for epoch in range(3):
        tokens = read(corpus, source.spans(epoch * corpus.num_tokens, corpus.num_tokens))
        assert sorted(tokens) == list(range(corpus.num_tokens))


def test_documents_stay_whole_and_in_another_order_each_epoch(corpus: IndexedReader) -> None:
    source = SourceOrder(corpus, seed=1, name="s")
    orders = []
    for epoch in range(2):
        spans = source.spans(epoch * corpus.num_tokens, corpus.num_tokens)
        assert sorted(spans.documents.tolist()) == list(range(200))
        orders.append(spans.documents.tolist())
    assert orders[0] != orders[1]


def test_any_cut_reads_the_same_stream(corpus: IndexedReader) -> None:
    total = 3 * corpus.num_tokens
    whole = read(corpus, SourceOrder(corpus, seed=1, name="s").spans(0, total))
    rng = np.random.default_rng(0)
    source = SourceOrder(corpus, seed=1, name="s")
    for first, count in zip(rng.integers(0, total - 500, 50), rng.integers(1, 500, 50), strict=True):
        assert read(corpus, source.spans(int(first), int(count))) == whole[first : first + count]


def test_seed_and_name_decide_the_order(corpus: IndexedReader) -> None:
    def documents(seed: int, name: str) -> list[int]:
        return SourceOrder(corpus, seed=seed, name=name).spans(0, corpus.num_tokens).documents.tolist()

    assert documents(1, "s") == documents(1, "s")
    assert documents(1, "s") != documents(2, "s")
    assert documents(1, "s") != documents(1, "t")


def test_empty_documents_leave_no_span(tmp_path: Path) -> None:
    corpus = IndexedReader(write_tokens(tmp_path / "c", [[], [1, 2], [], [3], []]))
    spans = SourceOrder(corpus, seed=1, name="s").spans(0, 6)
    assert sorted(read(corpus, spans)) == [1, 1, 2, 2, 3, 3]
    assert spans.lengths.min() > 0


@pytest.mark.parametrize(
    "read", [file_spans, lambda corpus: SourceOrder(corpus, seed=1, name="s").spans(0, 9)]
)
def test_an_index_with_too_few_tokens_ends(tmp_path: Path, read: Callable[[IndexedReader], Spans]) -> None:
    """Lengths that do not sum to the .bin, as a damaged index has them, must not be searched for ever."""
    prefix = write_tokens(tmp_path / "c", [[1, 2, 3], [4, 5], [6, 7, 8, 9]])
    with open(prefix + ".idx", "r+b") as file:
        file.seek(HEADER.size)
        file.write(np.array([1], "<i4").tobytes())
    with pytest.raises(ValueError, match=r"c\.idx: its documents hold fewer than the 9 tokens"):
        read(IndexedReader(prefix))
