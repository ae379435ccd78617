"""Hugging Face configs: families, old and new files, and refusals, against transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from parallel.layout import Layout
from trainer.model.architecture import Architecture
from trainer.model.config import ModelConfig
from trainer.model.huggingface import from_huggingface, read_huggingface_config
from trainer.model.parameters import count_parameters, logical_parameters
from trainer.model.transformer import Execution, transformer_config

TINY = dict(
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=80,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=72,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 16},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
}
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def saved(folder: Path, family: str, **fields: Any) -> tuple[Any, Architecture]:
    """A transformers config, and what we read from the folder that it was saved to."""
    config = getattr(transformers, f"{family}Config")(**(TINY | FAMILIES[family] | fields))
    config.save_pretrained(folder)
    return config, ModelConfig(hf=str(folder)).resolve()


def unfused_shapes(model: torch.nn.Module, tied: bool) -> dict[str, tuple[int, ...]]:
    """A transformers state dict with experts one by one, gate and up apart."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if ".mlp.experts." not in name:
            shapes[name] = tuple(tensor.shape)
            continue
        prefix, packed = name.rsplit(".", 1)
        parts = ("gate_proj", "up_proj") if packed == "gate_up_proj" else ("down_proj",)
        rows = tensor.shape[1] // len(parts)
        for expert in range(tensor.shape[0]):
            for part in parts:
                shapes[f"{prefix}.{expert}.{part}.weight"] = (rows, tensor.shape[2])
    if tied:
        del shapes["lm_head.weight"]
    return shapes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logical_parameters_are_those_of_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    config, model = saved(tmp_path, family, tie_word_embeddings=tied)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{family}ForCausalLM")(config)
    assert logical_parameters(model) == unfused_shapes(theirs, tied)
    assert count_parameters(model).total == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_that_parameters_do_not_show(tmp_path: Path, family: str) -> None:
    _, model = saved(tmp_path, family, rms_norm_eps=3e-6, initializer_range=0.03, attention_dropout=0.1)
    assert (model.norm_epsilon, model.init_std, model.attention_dropout) == (3e-6, 0.03, 0.1)
    assert (model.normalization, model.activation, model.hidden_dropout) == ("RMSNorm", "swiglu", 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_old_and_new_rope_settings_read_the_same(tmp_path: Path, family: str) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    _, new = saved(tmp_path, family, rope_parameters=rope)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    del raw["rope_parameters"]
    raw |= {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}}
    file.write_text(json.dumps(raw))
    assert ModelConfig(hf=str(file)).resolve() == new
    assert (new.rope_theta, new.rope_scaling, new.rope_scaling_factor) == (5e5, "llama3", 8.0)


def test_megatrons_llama3_frequencies_are_those_of_transformers() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    config = transformers.LlamaConfig(head_dim=128, rope_parameters=rope)
    theirs, factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    ours = RotaryEmbedding(
        128, 1.0, rotary_base=5e5, rope_scaling=True, rope_scaling_factor=8.0, use_cpu_initialization=True
    ).inv_freq
    assert factor == 1.0
    torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0)  # two roundings to float32


@pytest.mark.parametrize(
    ("family", "fields", "window", "layers"),
    [
        ("Mistral", {"sliding_window": 16}, 16, (0, 1)),
        ("Mistral", {"sliding_window": None}, 0, ()),
        ("Mixtral", {"sliding_window": 16}, 16, (0, 1)),
        ("Qwen2", {"sliding_window": 16, "use_sliding_window": False}, 0, ()),
        ("Qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, 16, (1,)),
        (
            "Qwen3",
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            16,
            (0,),
        ),
        ("Qwen3Moe", {"sliding_window": 16, "use_sliding_window": True}, 16, (0, 1)),
    ],
)
def test_sliding_windows(
    tmp_path: Path, family: str, fields: dict[str, Any], window: int, layers: tuple[int, ...]
) -> None:
    _, model = saved(tmp_path, family, **fields)
    assert (model.sliding_window, model.sliding_window_layers) == (window, layers)


def test_a_missing_sliding_window_is_the_familys_own(tmp_path: Path) -> None:
    """transformers' Mistral has a window of 4096 when the file does not speak of it."""
    saved(tmp_path, "Mistral")
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    del raw["sliding_window"]
    assert from_huggingface(raw, "file")["sliding_window"] == transformers.MistralConfig().sliding_window


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_megatrons_routing_is_that_of_transformers(tmp_path: Path, norm_topk_prob: bool) -> None:
    config, model = saved(tmp_path, "Qwen3Moe", norm_topk_prob=norm_topk_prob)
    router = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter(config)
    torch.nn.init.normal_(router.weight)
    logits, weights, chosen = router(torch.randn(50, 32))
    ours, chosen_map = topk_routing_with_score_function(
        logits,
        model.experts_per_token,
        use_pre_softmax=transformer_config(model, Layout(), Execution()).moe_router_pre_softmax,
    )
    theirs = torch.zeros_like(logits).scatter(1, chosen, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # one float32 softmax in another order
    assert torch.equal(chosen_map, theirs > 0)


def test_mixtral_normalises_its_experts(tmp_path: Path) -> None:
    assert saved(tmp_path, "Mixtral")[1].norm_topk_prob


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("Llama", {"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ("Llama", {"hidden_size": None}, "hidden_size is missing"),
        ("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE of type 'yarn'"),
        ("Llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "'linear'"),
        ("Llama", {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2}}, "is 2"),
        (
            "Llama",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ("Llama", {"attention_bias": True}, "attention_bias is True and mlp_bias is False"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("Llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("Llama", {"residual_multiplier": 0.2}, "residual_multiplier = 0.2"),
        ("Mixtral", {"output_router_logits": True}, "model.router_aux_loss_coefficient"),
        ("Mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ("Qwen3Moe", {"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
        ("Qwen3Moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
    ],
)
def test_what_would_change_numbers_is_refused_by_name(
    tmp_path: Path, family: str, changes: dict[str, Any], named: str
) -> None:
    saved(tmp_path, family)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=r"config\.json") as refusal:
        read_huggingface_config(tmp_path)
    assert named in str(refusal.value)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    saved(tmp_path, "Llama")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"hidden_act": "relu", "attention_bias": True, "logit_scale": 0.1}
    with pytest.raises(ValueError, match="hidden_act") as refusal:
        from_huggingface(raw, "file")
    assert len(str(refusal.value).splitlines()) == 3


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_unreadable_files_are_named(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=r"model\.hf"):
        read_huggingface_config(file)


def test_wrong_types_in_a_file_are_named(tmp_path: Path) -> None:
    saved(tmp_path, "Llama")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": "many"}))
    with pytest.raises(ValueError, match="num_hidden_layers is 'many'"):
        ModelConfig(hf=str(file)).resolve()


def test_fields_win_over_the_file(tmp_path: Path) -> None:
    saved(tmp_path, "Mistral")
    model = ModelConfig(hf=str(tmp_path), num_layers=5, sliding_window=0, sliding_window_layers=()).resolve()
    assert (model.num_layers, model.sliding_window, model.hidden_size) == (5, 0, 32)
