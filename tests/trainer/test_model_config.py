"""`[model]`: presets, fields, what follows from them, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from trainer.model.architecture import Architecture
from trainer.model.config import ModelConfig, preset, presets
from trainer.model.parameters import count_parameters

TINY = dict(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=100)

# Parameters of the published weights: the size of each model's safetensors files in numbers.
PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2-0.5b": 494_032_768,
    "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_presets_have_the_published_number_of_parameters(name: str, total: int) -> None:
    assert count_parameters(ModelConfig(preset=name).resolve()).total == total


@pytest.mark.parametrize(
    ("name", "non_embedding", "active"),
    [("qwen3-8b", 6.95e9, 8.19e9), ("qwen3-0.6b", 0.44e9, 0.60e9), ("qwen3-30b-a3b", 29.9e9, 3.3e9)],
)
def test_counts_agree_with_the_model_cards(name: str, non_embedding: float, active: float) -> None:
    count = count_parameters(ModelConfig(preset=name).resolve())
    assert count.non_embedding == pytest.approx(non_embedding, rel=0.005)  # cards round to three digits
    assert count.active == pytest.approx(active, rel=0.02)  # and to two


@pytest.mark.parametrize(
    ("name", "low", "high"), [("tiny", 1e5, 2e5), ("demo", 1e6, 3e6), ("llama-30m", 28e6, 34e6)]
)
def test_own_presets_have_the_size_they_promise(name: str, low: float, high: float) -> None:
    model = ModelConfig(preset=name).resolve(tokenizer_size=257)
    assert low < count_parameters(model).total < high


def test_config_and_architecture_have_the_same_fields() -> None:
    assert ModelConfig.model_fields.keys() == Architecture.model_fields.keys() | {"preset", "hf"}


@pytest.mark.parametrize("name", presets())
def test_a_resolved_model_resolves_to_itself(name: str) -> None:
    model = ModelConfig(preset=name).resolve(257)
    assert ModelConfig(**model.model_dump()).resolve() == model


def test_fields_win_over_the_preset() -> None:
    model = ModelConfig(preset="tiny", num_layers=2, tie_word_embeddings=False).resolve(300)
    assert (model.num_layers, model.tie_word_embeddings, model.hidden_size) == (2, False, 64)


def test_vocabulary_comes_from_the_tokenizer_only_where_nothing_else_says_it() -> None:
    assert ModelConfig(preset="tiny").resolve(300).vocab_size == 300
    assert ModelConfig(preset="tiny", vocab_size=512).resolve(300).vocab_size == 512
    assert ModelConfig(preset="llama-3-8b").resolve(300).vocab_size == 128256


def test_what_follows_from_the_fields() -> None:
    model = ModelConfig(**TINY).resolve()
    assert (model.head_dim, model.num_query_groups, model.ffn_hidden_size) == (16, 4, 192)
    assert ModelConfig(**TINY, activation="gelu").resolve().ffn_hidden_size == 256
    assert ModelConfig(**TINY, sliding_window=8).resolve().sliding_window_layers == (0, 1)
    assert ModelConfig(**TINY, num_experts=4).resolve().moe_ffn_hidden_size == 192


def test_dropout_is_off_and_the_balance_depends_on_no_layout_by_default() -> None:
    model = ModelConfig(**TINY, num_experts=4).resolve()
    assert (model.hidden_dropout, model.attention_dropout, model.router_aux_loss_coefficient) == (0, 0, 0)
    assert model.router_aux_loss_type == "seq_aux_loss"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_query_groups": 3}, "model.num_query_groups is 3"),
        ({"head_dim": 7}, "model.head_dim is 7"),
        ({"sliding_window": 8, "sliding_window_layers": [1, 2]}, "[2]"),
        ({"sliding_window_layers": [1]}, "give the window's length"),
        ({"attention_dropout": 1.0}, "model.attention_dropout is 1.0"),
        ({"experts_per_token": 2}, "model.num_experts is 0"),
        ({"num_experts": 4, "experts_per_token": 5}, "between 1 and model.num_experts, 4"),
        ({"num_experts": 4, "linear_bias": True}, "model.linear_bias is true"),
        ({"num_experts": 4, "experts_per_token": 1}, "router would get no gradient"),
        ({"vocab_size": 99}, "at least 100"),
    ],
)
def test_contradictions_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=r"model\.") as refusal:
        ModelConfig(**(TINY | fields)).resolve(tokenizer_size=100)
    assert named in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_all_contradictions_come_at_once() -> None:
    fields = TINY | {"num_query_groups": 3, "head_dim": 7, "num_experts": 4, "linear_bias": True}
    with pytest.raises(ValueError, match="num_query_groups") as refusal:
        ModelConfig(**fields).resolve()
    assert len(str(refusal.value).splitlines()) == 3


def test_every_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.num_layers is missing") as refusal:
        ModelConfig(hidden_size=64).resolve()
    assert len(str(refusal.value).splitlines()) == 3


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean llama-3-8b"):
        preset("llama3-8b")


def test_two_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="keep one of the two"):
        ModelConfig(preset="tiny", hf="somewhere").resolve()


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValidationError, match="hidden"):
        ModelConfig.model_validate({"hidden": 3})


def test_reading_the_configuration_imports_no_torch() -> None:
    """`ratoon check` answers at once because of it."""
    modules = "trainer.model.config, trainer.schedule, trainer.optimizer, trainer.precision, trainer.memory"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
