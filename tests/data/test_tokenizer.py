"""Tokenizers: bytes, a trained BPE, a trained SentencePiece model."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from tests.data.corpora import write_lines, write_tokens, write_words
from trainer.data.config import DataConfig
from trainer.data.corpus import Sidecar, open_corpora
from trainer.data.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer
from trainer.data.train_tokenizer import train_bpe

TEXTS = [
    "The quick brown fox.\n  Indented:\ttab.",
    "naïve Größe 你好 🙂",
    "def f(x):\n    return x ** 2\n",
    "say <|endoftext|> and </s>",
]
CORPUS = [f"{text} number {n} of the corpus" for n in range(50) for text in TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained tokenizer.json and a trained SentencePiece model."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train_bpe([write_lines(folder / "text.jsonl", CORPUS)], str(folder / "bpe.json"), vocab_size=350)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "sp"),
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    return folder


@pytest.fixture(params=["bytes", "bpe.json", "sp.model"])
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    return load_tokenizer("bytes" if request.param == "bytes" else str(folder / request.param))


def test_text_survives(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_is_its_texts_one_by_one(tokenizer: Tokenizer) -> None:
    ids, lengths = tokenizer.encode_batch([*TEXTS, "", "x"])
    one_by_one = [tokenizer.encode(text).tolist() for text in [*TEXTS, "", "x"]]
    assert lengths.tolist() == [len(one) for one in one_by_one]
    assert ids.tolist() == [i for one in one_by_one for i in one]


def test_no_batch_no_tokens(tokenizer: Tokenizer) -> None:
    ids, lengths = tokenizer.encode_batch([])
    assert ids.dtype == lengths.dtype == np.int64
    assert len(ids) == len(lengths) == 0


def test_ids_stay_below_the_vocabulary_and_off_the_end_of_document(tokenizer: Tokenizer) -> None:
    ids, _ = tokenizer.encode_batch(TEXTS)
    assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert tokenizer.eod_id < tokenizer.vocab_size
    assert tokenizer.eod_id not in ids.tolist()  # not even where the text spells it


def test_trained_vocabulary_has_the_size_asked_for(folder: Path) -> None:
    assert load_tokenizer(str(folder / "bpe.json")).vocab_size == 350


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least 257"):
        train_bpe([write_lines(tmp_path / "t.jsonl", TEXTS)], str(tmp_path / "t.json"), vocab_size=256)


def test_fingerprints_differ_and_ignore_the_layout_of_the_file(folder: Path, tmp_path: Path) -> None:
    names = ["bytes", str(folder / "bpe.json"), str(folder / "sp.model"), write_words(tmp_path)]
    assert len({load_tokenizer(name).fingerprint for name in names}) == 4
    again = tmp_path / "again.json"
    again.write_text(json.dumps(json.loads((folder / "bpe.json").read_text())))
    assert load_tokenizer(str(again)).fingerprint == load_tokenizer(str(folder / "bpe.json")).fingerprint


def test_another_end_of_document_is_another_fingerprint(folder: Path) -> None:
    path = str(folder / "bpe.json")
    assert load_tokenizer(path).fingerprint != load_tokenizer(path, eod="!").fingerprint


def test_a_folder_and_its_declared_end_of_document(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((folder / "bpe.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "!"}}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.decode([tokenizer.eod_id]) == "!"


def test_what_cannot_be_a_tokenizer_says_so(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "bad.model").write_text("x")
    for spec, eod, message in (
        (str(tmp_path / "none.json"), None, "no file"),
        (str(tmp_path), None, "no tokenizer.json"),
        (str(tmp_path / "bad.json"), None, "not a tokenizer.json"),
        (str(tmp_path / "bad.model"), None, "not a SentencePiece model"),
        (str(folder / "bpe.json"), "<nope>", "no token '<nope>'"),
        (str(folder / "sp.model"), "<nope>", "no piece '<nope>'"),
        ("bytes", "x", "leave eod out"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tokenizer(spec, eod)


def test_data_of_another_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "c", [[1, 2, 256]])
    made = BytesTokenizer()
    Sidecar("bytes", None, made.fingerprint, made.vocab_size, made.eod_id, 1, 3, 2, ["c.txt"]).write(
        tmp_path / "c.json"
    )
    sources = [{"name": "c", "path": prefix}]
    open_corpora(DataConfig(sources=sources), "sources")
    with pytest.raises(ValueError, match=r"data.sources 'c': .*made with the tokenizer bytes \(257 ids"):
        open_corpora(DataConfig(sources=sources, tokenizer=str(folder / "bpe.json")), "sources")
