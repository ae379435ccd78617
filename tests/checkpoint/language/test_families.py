"""The shipped specs against transformers' own models: names in memory and in files, and what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from checkpoint.language.choose import choose_spec
from checkpoint.language.place import place
from checkpoint.language.spec import load_spec
from checkpoint.source import Source
from tests.checkpoint.language.rebuild import Array, rebuild, same, store
from trainer.model.config import ModelConfig
from trainer.model.parameters import logical_parameters

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 17,
    "intermediate_size": 24,
}
GQA = SMALL | {"num_key_value_heads": 2, "head_dim": 6}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "llama", GQA),
    "mistral": ("Mistral", "llama", GQA),
    "qwen2": ("Qwen2", "llama", SMALL | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", "llama", GQA),
    "mixtral": ("Mixtral", "mixtral", GQA | {"num_local_experts": 3}),
    "qwen3-moe": (
        "Qwen3Moe",
        "qwen3-moe",
        GQA | {"num_experts": 3, "moe_intermediate_size": 10, "num_experts_per_tok": 2},
    ),
    "gpt-neox": ("GPTNeoX", "gpt-neox", SMALL),
    "olmo2": ("Olmo2", "olmo2", SMALL | {"num_key_value_heads": 2}),
}


def build(family: str) -> Any:
    torch.manual_seed(1)
    name, _, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**settings, tie_word_embeddings=False)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def source_of(arrays: dict[str, Array], facts: dict[str, int]) -> Source:
    return Source("test", Path("."), tensors=[store(n, a)[0] for n, a in arrays.items()], facts=facts)


def logical_of(arrays: dict[str, Array], facts: dict[str, int], spec: str) -> dict[str, Array]:
    """The logical tensors of stored arrays, by the spec that `choose_spec` finds, which must be this one."""
    chosen = choose_spec(source_of(arrays, facts))
    assert chosen.name == spec
    stored = [store(name, array) for name, array in arrays.items()]
    found = rebuild(place(chosen, [tensor for tensor, _ in stored], facts=facts), stored)
    return {name: array for (name, _), array in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_and_files_are_the_same_model(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    facts = {"num_attention_heads": 4, "hidden_size": 16}
    memory = {name: p.detach().numpy() for name, p in model.named_parameters()}
    files = logical_of(load_file(tmp_path / "model.safetensors"), facts, FAMILIES[family][1])
    in_memory = "qwen3-moe" if family == "mixtral" else FAMILIES[family][1]  # the same names there
    same({(n, "weight"): a for n, a in files.items()}, logical_of(memory, facts, in_memory))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("gpt-neox", "olmo2")])
def test_the_logical_tensors_are_those_of_the_architecture(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    files = logical_of(load_file(tmp_path / "model.safetensors"), {}, FAMILIES[family][1])
    expected = logical_parameters(ModelConfig(hf=str(tmp_path)).resolve())
    assert {name: array.shape for name, array in files.items()} == expected


def test_gpt_neox_takes_queries_apart_as_the_model_does() -> None:
    model = build("gpt-neox")
    memory = {name: p.detach().numpy() for name, p in model.named_parameters()}
    logical = logical_of(memory, {"num_attention_heads": 4, "hidden_size": 16}, "gpt-neox")
    attention = model.gpt_neox.layers[1].attention
    inputs = torch.randn(1, 3, 16)
    fused = attention.query_key_value(inputs).view(1, 3, 4, 12).transpose(1, 2)
    for part, expected in zip("qkv", fused.chunk(3, dim=-1), strict=True):
        weight = torch.from_numpy(logical[f"model.layers.1.self_attn.{part}_proj.weight"]).float()
        bias = torch.from_numpy(logical[f"model.layers.1.self_attn.{part}_proj.bias"]).float()
        got = torch.nn.functional.linear(inputs, weight, bias).view(1, 3, 4, 4).transpose(1, 2)
        torch.testing.assert_close(got, expected)


def test_metas_rotary_pairs_become_halves() -> None:
    """Turning neighbouring rows as complex numbers and turning halves must give the same attention scores."""
    heads, dim, length = 2, 8, 5
    rng = np.random.default_rng(0)
    stored = [
        store(f"layers.0.attention.w{which}.weight", rng.standard_normal((heads * dim, 6))) for which in "qk"
    ]
    spec = load_spec("torchtitan-llama")
    spec = spec.model_copy(update={"rules": tuple(r for r in spec.rules if r.interleaved)})
    found = rebuild(place(spec, [t for t, _ in stored], facts={"head_dim": dim}), stored)
    inputs = rng.standard_normal((length, 6))
    angles = np.outer(np.arange(length), 10000.0 ** (-np.arange(0, dim, 2) / dim))[:, None]

    def turned_pairs(weight: Array) -> Array:
        x = (inputs @ weight.T).reshape(length, heads, dim // 2, 2)
        turned = (x[..., 0] + 1j * x[..., 1]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], -1).reshape(length, heads, dim)

    def turned_halves(weight: Array) -> Array:
        x = (inputs @ weight.T).reshape(length, heads, dim)
        first, second = x[..., : dim // 2], x[..., dim // 2 :]
        low = first * np.cos(angles) - second * np.sin(angles)
        return np.concatenate([low, second * np.cos(angles) + first * np.sin(angles)], -1)

    def scores(query: Array, key: Array) -> Array:
        return np.einsum("ahd,bhd->hab", query, key)

    expected = scores(*(turned_pairs(array) for _, array in stored))
    weights = [found[f"model.layers.0.self_attn.{which}_proj.weight", "weight"] for which in "qk"]
    np.testing.assert_allclose(scores(*map(turned_halves, weights)), expected, atol=1e-12)


def test_a_model_without_its_head_and_with_wrappers() -> None:
    model = build("llama").model
    names = [f"module.{name}" for name, _ in model.named_parameters()]
    arrays = {name: p.detach().numpy() for name, p in zip(names, model.parameters(), strict=True)}
    logical = logical_of(arrays, {}, "llama")
    assert logical["model.layers.1.mlp.up_proj.weight"].shape == (24, 16)
