"""The tokenizer of a run goes into the Hugging Face folder by itself, and says the same there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from checkpoint.convert.output import WritePlan
from checkpoint.convert.run import convert, prepare
from checkpoint.folder import read_manifest
from checkpoint.writers.huggingface_tokenizer import COMMON_EOD, end_of_document
from checkpoint.writers.options import WriteOptions
from tests.checkpoint.models import rewrite
from tests.families.cases import FAMILIES, build_model
from trainer.data import tokenizer as trained_with
from trainer.model.config import ModelConfig

TEXT = "def main():\n    return 'The cat, 123'  \n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=66, special_tokens=["<unk>", "<eos>"], show_progress=False
    )
    inner.train_from_iterator([TEXT], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "mine.json"
    inner.save(str(path))
    return path


@pytest.fixture
def universal(tmp_path: Path) -> Path:
    """As of a run of Ratoon's own: it says how the model computes, and has no file beside the weights."""
    build_model(FAMILIES["llama"]).save_pretrained(tmp_path / "source")
    convert(prepare(tmp_path / "source", "universal", WriteOptions()), tmp_path / "universal")
    for name in ("config.json", "generation_config.json"):
        (tmp_path / "universal" / name).unlink()
    model = ModelConfig(hf=str(tmp_path / "source")).resolve(0).model_dump(mode="json")
    return with_state(tmp_path / "universal", model=model)


def with_state(folder: Path, **more: Any) -> Path:
    _, manifest = read_manifest(folder)
    rewrite(folder, replace(manifest, state={**manifest.state, **more}))
    return folder


def planned(universal: Path, **data: Any) -> WritePlan:
    with_state(universal, config={"data": {"eod": None, **data}})
    return prepare(universal, "huggingface", WriteOptions()).plan


def test_the_tokenizer_of_the_run_cuts_text_in_transformers_as_it_did(
    universal: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with_state(universal, config={"data": {"tokenizer": str(tokenizer), "eod": None}})
    convert(prepare(universal, "huggingface", WriteOptions()), tmp_path / "target")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "target")
    assert loaded(TEXT)["input_ids"] == trained_with.load_tokenizer(str(tokenizer)).encode(TEXT).tolist()
    assert loaded.eos_token == "<eos>"


def test_generation_ends_where_documents_do(universal: Path, tokenizer: Path, tmp_path: Path) -> None:
    with_state(universal, config={"data": {"tokenizer": str(tokenizer), "eod": "e"}})
    convert(prepare(universal, "huggingface", WriteOptions()), tmp_path / "target")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    expected = trained_with.load_tokenizer(str(tokenizer), "e").eod_id
    assert model.generation_config.eos_token_id == model.config.eos_token_id == expected
    assert model.config.bos_token_id is None


def test_it_is_said_that_the_tokenizer_goes_along(universal: Path, tokenizer: Path) -> None:
    plan = planned(universal, tokenizer=str(tokenizer))
    assert f"the run's tokenizer goes along: {tokenizer}" in plan.notes
    assert plan.carried["tokenizer.json"] == tokenizer


def test_it_is_said_that_the_tokenizer_is_gone(universal: Path) -> None:
    plan = planned(universal, tokenizer="/gone/tokenizer.json")
    assert any("/gone/tokenizer.json, is not there any more" in note for note in plan.notes)
    assert json.loads(plan.small["config.json"])["eos_token_id"] is None


def test_bytes_have_no_tokenizer_file_and_an_end(universal: Path) -> None:
    plan = planned(universal, tokenizer="bytes")
    assert any("the run's is `bytes`" in note for note in plan.notes)
    assert json.loads(plan.small["generation_config.json"]) == {
        "eos_token_id": trained_with.BytesTokenizer.eod_id
    }


def test_what_lies_beside_the_tokenizer_comes_with_it(
    universal: Path, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<unk>"}}')
    plan = planned(universal, tokenizer=str(tmp_path))
    assert {"tokenizer.json", "tokenizer_config.json"} <= plan.carried.keys()
    assert json.loads(plan.small["generation_config.json"])["eos_token_id"] == 0


def test_the_end_of_a_unigram_vocabulary_is_found(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": [["<unk>", 0.0], ["</s>", 0.0]]}, "added_tokens": []}))
    assert end_of_document(path) == ("</s>", 1)


def test_both_sides_know_the_same_ends() -> None:
    assert COMMON_EOD == trained_with.COMMON_EOD
