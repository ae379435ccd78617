"""Bytes of the evaluated text, counted by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.data.corpora import EOD, write_lines, write_tokens, write_words
from trainer.data.config import DataConfig
from trainer.data.stream import ValidationStream
from trainer.data.tokenizer import load_tokenizer
from trainer.data.train_tokenizer import train_bpe
from trainer.forgetting.text_bytes import bits_per_byte, count_text_bytes


def stream(path: str, tokenizer: str = "bytes", *, length: int = 4, batch: int = 2) -> ValidationStream:
    config = DataConfig.model_validate(
        {
            "tokenizer": tokenizer,
            "sequence_length": length,
            "sources": [{"name": "prose", "path": write_tokens(Path(path).with_name("prose"), [[1, 2]])}],
            "validation": [{"name": "held-out", "path": path}],
        }
    )
    return ValidationStream(config, "held-out", global_batch=batch)


def test_every_byte_but_the_first_of_a_document_counts(tmp_path: Path) -> None:
    documents = [[*b"prose", 256], [*"größe".encode(), 256], [256], [*b"x", 256]]
    found = stream(write_tokens(tmp_path / "a", documents))
    assert count_text_bytes(found, found.steps) == 4 + 6 + 0 + 0  # "ö" and "ß" have two bytes each


def test_only_what_was_read_counts(tmp_path: Path) -> None:
    found = stream(write_tokens(tmp_path / "a", [[*b"twelve bytes", 256], [*b"more!", 256]]))
    assert [count_text_bytes(found, steps) for steps in (1, 2, 3)] == [8, 11 + 3, 11 + 4]


@pytest.mark.parametrize("length", [1, 3, 7, 64])
def test_the_cut_into_sequences_does_not_matter(tmp_path: Path, length: int) -> None:
    documents = [[*b"a document", 256], [*b"of some", 256], [*b"length", 256]]
    found = stream(write_tokens(tmp_path / "a", documents), length=length)
    assert count_text_bytes(found, found.steps) == 9 + 6 + 5


def test_words_are_as_long_as_their_text(tmp_path: Path) -> None:
    words = stream(write_tokens(tmp_path / "a", [[1, 22, 333, EOD], [EOD], [4, EOD]]), write_words(tmp_path))
    assert count_text_bytes(words, words.steps) == len(" w22 w333")  # the marker at the end is no text


def test_text_that_spells_a_special_token_is_text(tmp_path: Path) -> None:
    text = "a <|endoftext|> is quoted; größe, naïve, 東京"
    path = str(tmp_path / "bpe.json")
    train_bpe([write_lines(tmp_path / "text.jsonl", [text] * 3)], path, vocab_size=300)
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(text).tolist()
    found = stream(write_tokens(tmp_path / "a", [[*ids, tokenizer.eod_id]]), path, length=256)
    first = len(tokenizer.decode(np.array(ids[:1])).encode())
    assert count_text_bytes(found, found.steps) == len(text.encode()) - first


def test_one_nat_per_token_of_two_bytes() -> None:
    assert bits_per_byte(1.0, 10, 20) == pytest.approx(0.5 / math.log(2))
    assert math.isnan(bits_per_byte(1.0, 10, 0))
