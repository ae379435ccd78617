"""Megatron's file format, against megatron-core's own reader and writer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from tests.data.corpora import ragged, write_tokens
from trainer.data.indexed import IndexedReader, token_dtype


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_megatron_reads_what_we_write(tmp_path: Path, dtype: type[np.generic]) -> None:
    documents = ragged(50)
    megatron = IndexedDataset(write_tokens(tmp_path / "c", documents, dtype))
    assert [megatron[i].tolist() for i in range(len(megatron))] == documents
    assert megatron.document_indices.tolist() == list(range(51))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_what_megatron_writes(tmp_path: Path, dtype: type[np.generic]) -> None:
    documents = ragged(20)
    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=dtype)
    for document in documents:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "c.idx"))
    reader = IndexedReader(tmp_path / "c")
    assert [reader[i].tolist() for i in range(len(reader))] == documents


def test_a_document_of_several_sequences_is_one_document(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.int32)
    builder.add_document(torch.arange(6), lengths=[1, 2, 3])
    builder.add_document(torch.arange(6, 10), lengths=[4])
    builder.finalize(str(tmp_path / "c.idx"))
    reader = IndexedReader(tmp_path / "c")
    assert [reader[i].tolist() for i in range(len(reader))] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]


@pytest.mark.parametrize("closed", [0, 1])
def test_sequences_behind_the_last_document_are_refused(tmp_path: Path, closed: int) -> None:
    """As a builder leaves them that was never told of the last document's end."""
    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.int32)
    for number in range(3):
        builder.add_item(torch.arange(4))
        if number < closed:
            builder.end_document()
    builder.finalize(str(tmp_path / "c.idx"))
    with pytest.raises(ValueError, match=rf"c\.idx: .* tokens 0 to {4 * closed} of the 12 in .*c\.bin"):
        IndexedReader(tmp_path / "c")


def test_an_empty_corpus_opens(tmp_path: Path) -> None:
    assert len(IndexedReader(write_tokens(tmp_path / "c", []))) == 0


def test_the_narrow_type_ends_where_megatrons_does() -> None:
    assert token_dtype(65499) is np.uint16
    assert token_dtype(65500) is np.int32


def test_a_bin_of_another_length_is_refused(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "c", ragged(5))
    with open(prefix + ".bin", "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ValueError, match=r"c\.bin: .* bytes, its index says"):
        IndexedReader(prefix)


def test_an_index_cut_short_is_refused(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "c", ragged(5))
    index = Path(prefix + ".idx")
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        IndexedReader(prefix)


def test_something_else_is_no_index(tmp_path: Path) -> None:
    (tmp_path / "c.idx").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="not a Megatron index"):
        IndexedReader(tmp_path / "c")
