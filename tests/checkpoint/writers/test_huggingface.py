"""Hugging Face folders: loaded by from_pretrained with the very weights, and computing the same logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from checkpoint.convert.run import convert, prepare
from checkpoint.folder import read_manifest
from checkpoint.writers.huggingface_config import config_of
from checkpoint.writers.options import WriteOptions
from tests.checkpoint.models import rewrite
from tests.families.cases import FAMILIES, build_model
from trainer.model.config import ModelConfig

TOKENS = torch.arange(12).reshape(1, 12)


def convert_model(model: Any, folder: Path, **options: Any) -> Path:
    """Through a universal checkpoint and back."""
    model.save_pretrained(folder / "source")
    convert(prepare(folder / "source", "universal", WriteOptions()), folder / "universal")
    convert(prepare(folder / "universal", "huggingface", WriteOptions(**options)), folder / "target")
    return folder / "target"


def load(folder: Path, **options: Any) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, **options
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize(
    "name", ["llama", "llama tied", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe, normed"]
)
def test_every_family_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = build_model(FAMILIES[name])
    again = load(convert_model(model, tmp_path, shard_bytes=20_000))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_configuration_of_ours_means_the_same_model(name: str, tmp_path: Path) -> None:
    model = build_model(FAMILIES[name])
    folder = convert_model(model, tmp_path)
    ours = ModelConfig(hf=str(folder)).resolve(0).model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(config_of(ours, dtype="float32")))
    assert torch.equal(logits(load(folder)), logits(model))
    assert ModelConfig(hf=str(folder)).resolve(0).model_dump(mode="json") == ours


def test_weights_are_rounded_where_that_is_asked_for(tmp_path: Path) -> None:
    model = build_model(FAMILIES["llama"])
    again = load(convert_model(model, tmp_path, dtype="bfloat16"))
    assert again.dtype == torch.bfloat16
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.bfloat16(), other)


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    model = build_model(FAMILIES["llama"])
    convert_model(model, tmp_path)
    other = tmp_path / "other"
    build_model(FAMILIES["llama tied"]).save_pretrained(other)
    file = other / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 68, "num_hidden_layers": 5}))
    with pytest.raises(ValueError, match="not of this model") as error:
        prepare(tmp_path / "universal", "huggingface", WriteOptions(carry=other))
    assert "vocab_size is 68 in config.json and 67 in the checkpoint" in str(error.value)
    assert "num_layers is 5 in config.json and 4 in the checkpoint" in str(error.value)
    assert "tie_word_embeddings is True" in str(error.value)


def test_a_part_of_a_model_is_refused(tmp_path: Path) -> None:
    convert_model(build_model(FAMILIES["llama"]), tmp_path)
    folder, manifest = read_manifest(tmp_path / "universal")
    rest = tuple(tensor for tensor in manifest.tensors if "embed_tokens" not in tensor.name)
    rewrite(folder, replace(manifest, tensors=rest))
    with pytest.raises(ValueError, match="it is part of a model, which nothing loads"):
        prepare(folder, "huggingface", WriteOptions())


def test_a_config_that_computes_otherwise_is_refused(tmp_path: Path) -> None:
    folder = convert_model(build_model(FAMILIES["llama"]), tmp_path)
    ours = ModelConfig(hf=str(folder)).resolve(0).model_dump(mode="json")
    _own_model(tmp_path / "universal", ours)
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    theta = {"rope_theta": 5e5}
    rope = {"rope_parameters": raw["rope_parameters"] | theta} if "rope_parameters" in raw else theta
    file.write_text(json.dumps(raw | rope | {"rms_norm_eps": 0.5}))
    with pytest.raises(ValueError, match="not of this model") as error:
        prepare(tmp_path / "universal", "huggingface", WriteOptions(carry=folder))
    assert "rms_norm_eps is 0.5 in config.json" in str(error.value)
    assert "rope_theta is 500000.0 in config.json" in str(error.value)


def test_another_stretching_of_rope_is_refused(tmp_path: Path) -> None:
    folder = convert_model(build_model(FAMILIES["llama 3.1 rope"]), tmp_path)
    _own_model(tmp_path / "universal", ModelConfig(hf=str(folder)).resolve(0).model_dump(mode="json"))
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"rope_parameters": raw["rope_parameters"] | {"factor": 32.0}}))
    with pytest.raises(ValueError, match=r"rope factor is 32.0 in config.json and 8.0 in the checkpoint"):
        prepare(tmp_path / "universal", "huggingface", WriteOptions(carry=folder))


def test_a_config_that_leaves_the_usual_rope_unsaid_goes_along(tmp_path: Path) -> None:
    """As the files of the first Llama do."""
    folder = convert_model(build_model(FAMILIES["llama"]), tmp_path)
    _own_model(tmp_path / "universal", ModelConfig(hf=str(folder)).resolve(0).model_dump(mode="json"))
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({key: raw[key] for key in raw if not key.startswith("rope")}))
    prepare(tmp_path / "universal", "huggingface", WriteOptions(carry=folder))


def test_a_config_of_the_same_model_goes_along(tmp_path: Path) -> None:
    folder = convert_model(build_model(FAMILIES["llama"]), tmp_path)
    _own_model(tmp_path / "universal", ModelConfig(hf=str(folder)).resolve(0).model_dump(mode="json"))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 7}))
    conversion = prepare(tmp_path / "universal", "huggingface", WriteOptions(carry=folder))
    convert(conversion, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == 7


def _own_model(folder: Path, model: dict[str, Any]) -> None:
    """Let a checkpoint say how its model computes, as those of Ratoon's own runs do."""
    _, manifest = read_manifest(folder)
    rewrite(folder, replace(manifest, state={**manifest.state, "model": model}))
