"""The config.json of a model, from what Ratoon's own checkpoints say of it.

Keys are those of transformers' configuration classes; what versions 4 and 5 call differently is there twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMING = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3-moe",
    "gpt_neox": "gpt-neox",
    "olmo2": "olmo2",
}
"""model_type -> the shipped spec of its names."""
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def config_of(model: Mapping[str, Any], *, dtype: str) -> dict[str, Any]:
    """config.json of `state["model"]` of a Ratoon checkpoint.

    Args:
        model: fields of `Architecture`.
        dtype: of the weights, "float32" or "bfloat16".

    Raises:
        ValueError: no family of transformers that Ratoon reads computes this model; all reasons.
    """
    family, problems = _family(model)
    if problems:
        raise ValueError("no Hugging Face family computes this model:\n  " + "\n  ".join(problems))
    config: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": model["hidden_size"],
        "intermediate_size": model["ffn_hidden_size"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_attention_heads"],
        "num_key_value_heads": model["num_query_groups"],
        "head_dim": model["head_dim"],
        "vocab_size": model["vocab_size"],
        "max_position_embeddings": model["max_position_embeddings"],
        "rms_norm_eps": model["norm_epsilon"],
        "initializer_range": model["init_std"],
        "tie_word_embeddings": model["tie_word_embeddings"],
        "attention_dropout": model["attention_dropout"],
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    return config | _rope(model) | _window(model, family) | _particular(model, family)


def _family(model: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The family that has these features, and what else the model has that this family has not."""
    windowed = tuple(model["sliding_window_layers"])
    everywhere = windowed == tuple(range(model["num_layers"]))
    if model["num_experts"]:
        family = "qwen3_moe" if model["qk_norm"] else "mixtral"
    elif model["qk_norm"]:
        family = "qwen3"
    elif model["qkv_bias"]:
        family = "qwen2"
    else:
        family = "mistral" if windowed else "llama"
    narrow = model["head_dim"] * model["num_attention_heads"] != model["hidden_size"]
    excluded = {
        f"{model['normalization']} with {model['activation']} instead of RMSNorm with swiglu": (
            model["normalization"] != "RMSNorm" or model["activation"] != "swiglu"
        ),
        "linear_bias": model["linear_bias"] and family not in ("llama", "qwen3"),
        "qkv_bias": model["qkv_bias"] and family != "qwen2",
        "heads that are not hidden_size / num_attention_heads wide": family == "qwen2" and narrow,
        "norm_topk_prob = false": family == "mixtral" and not model["norm_topk_prob"],
        "a sliding window in some layers only": (
            bool(windowed) and not everywhere and family not in ("qwen2", "qwen3")
        ),
        f"rope_scaling {model['rope_scaling']!r}": model["rope_scaling"] != "none" and family != "llama",
    }
    return family, [f"{family} has no {what}" for what, found in excluded.items() if found]


def _rope(model: Mapping[str, Any]) -> dict[str, Any]:
    theta = model["rope_theta"]
    if model["rope_scaling"] == "none":
        parameters: dict[str, Any] = {"rope_type": "default"}
        old = None
    else:
        parameters = {
            "rope_type": "llama3",
            "factor": model["rope_scaling_factor"],
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        old = dict(parameters)
    return {
        "rope_theta": theta,
        "rope_scaling": old,
        "rope_parameters": parameters | {"rope_theta": theta},
    }


def _window(model: Mapping[str, Any], family: str) -> dict[str, Any]:
    length, layers = model["sliding_window"], list(model["sliding_window_layers"])
    if family == "llama":
        return {}
    if family in ("mistral", "mixtral"):
        return {"sliding_window": length or None}
    used: dict[str, Any] = {"use_sliding_window": bool(length), "sliding_window": length or None}
    if family in ("qwen2", "qwen3"):
        kinds = ["full_attention", "sliding_attention"]
        used["layer_types"] = [kinds[layer in layers] for layer in range(model["num_layers"])]
        used["max_window_layers"] = min(layers, default=model["num_layers"])
    return used


def _particular(model: Mapping[str, Any], family: str) -> dict[str, Any]:
    if family == "llama":
        return {"attention_bias": model["linear_bias"], "mlp_bias": model["linear_bias"]}
    if family == "qwen3":
        return {"attention_bias": model["linear_bias"]}
    if family not in ("mixtral", "qwen3_moe"):
        return {}
    experts = {
        "num_experts_per_tok": model["experts_per_token"],
        "router_aux_loss_coef": model["router_aux_loss_coefficient"],
        "output_router_logits": False,
        "num_local_experts": model["num_experts"],
    }
    if family == "mixtral":
        return experts | {"intermediate_size": model["moe_ffn_hidden_size"]}
    return experts | {
        "num_experts": model["num_experts"],
        "moe_intermediate_size": model["moe_ffn_hidden_size"],
        "norm_topk_prob": model["norm_topk_prob"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    }
