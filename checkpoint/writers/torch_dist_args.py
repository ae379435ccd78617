"""What Megatron-LM asks for in common.pt beyond megatron-core: arguments of the model, and a schedule.

Its `load_checkpoint` compares num_layers, hidden_size and num_attention_heads with the run's own, takes
consumed_train_samples, and with --use-checkpoint-args whatever says how the model computes. Random states it
asks for unless the arguments have `no_save_rng`.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from checkpoint.manifest import Manifest

SAMPLES = "consumed_train_samples"
_SIZES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "padded_vocab_size": "padded_vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
"""Fact -> Megatron-LM's word."""
_EXPERT_SIZES = {
    "num_experts": "num_experts",
    "moe_ffn_hidden_size": "moe_ffn_hidden_size",
    "experts_per_token": "moe_router_topk",
}
_OWN = {
    "normalization": "normalization",
    "norm_epsilon": "norm_epsilon",
    "rope_theta": "rotary_base",
    "hidden_dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
}
"""Ratoon's word in a model's description -> Megatron-LM's."""
_HUGGINGFACE = {
    "rms_norm_eps": "norm_epsilon",
    "rope_theta": "rotary_base",
    "attention_dropout": "attention_dropout",
}
"""Key of a config.json -> Megatron-LM's word."""


def arguments(
    manifest: Manifest,
    facts: Mapping[str, int],
    dtypes: Collection[str],
    *,
    expert_ranks: int | None,
    samples: int | None,
) -> Namespace:
    """Megatron-LM's arguments as far as they are known: the source's own, and what its numbers say.

    Args:
        dtypes: of the weights.
        expert_ranks: that the optimizer's groups are for; None: any but one.
        samples: see `samples_seen`.
    """
    source = (manifest.state.get("source") or {}).get("args") or {}
    known: dict[str, Any] = {word: facts[fact] for fact, word in _SIZES.items() if fact in facts}
    known |= {word: facts.get(fact) or None for fact, word in _EXPERT_SIZES.items() if fact in facts}
    if "num_query_groups" in known:
        known["group_query_attention"] = True
    said = {
        "untie_embeddings_and_output_weights": not facts.get("tie_word_embeddings"),
        "bf16": set(dtypes) == {"bfloat16"},
        "fp16": set(dtypes) == {"float16"},
        "use_distributed_optimizer": True,
        "no_save_rng": True,
        "iteration": manifest.step,
        SAMPLES: samples or 0,
        "padded_vocab_size": None,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": expert_ranks,
        "expert_tensor_parallel_size": 1,
    }
    return Namespace(
        **{"consumed_valid_samples": 0, **_described(manifest, facts), **source, **said, **known}
    )


def samples_seen(manifest: Manifest, facts: Mapping[str, int]) -> int | None:
    """Sequences that the source's trainer had read, which Megatron-LM counts; None where it does not say."""
    if SAMPLES in facts:
        return facts[SAMPLES]
    source, data = manifest.state.get("source") or {}, manifest.state.get("data") or {}
    found = (source.get("args") or {}).get(SAMPLES) or source.get("global_samples")
    if found is None:
        found = (source.get("opt_param_scheduler") or {}).get("num_steps")
    if found is None and data.get("sequence_length"):
        found = sum(each["tokens"] for each in data.get("sources", [])) // data["sequence_length"]
    return int(found) if found is not None else None


def schedule(manifest: Manifest, groups: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any]:
    """The state of Megatron-LM's scheduler: the source's own, or a constant one at the last learning rate.

    Args:
        groups: of the optimizer, as megatron-core has them.
    """
    own = (manifest.state.get("source") or {}).get("opt_param_scheduler")
    if own:
        return dict(own)
    lr = max(float(group["lr"]) for group in groups)
    decay = max(float(group["weight_decay"]) for group in groups)
    return {
        "max_lr": lr,
        "min_lr": 0.0,
        "lr_warmup_steps": 0,
        "lr_decay_style": "constant",
        "lr_decay_steps": max(samples, 1),
        "num_steps": samples,
        "start_wd": decay,
        "end_wd": decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": max(samples, 1),
    }


def _described(manifest: Manifest, facts: Mapping[str, int]) -> dict[str, Any]:
    """How the model computes, from its description or Hugging Face config, and the names of its tensors."""
    state, names = manifest.state, {tensor.name for tensor in manifest.tensors}
    model, config = state.get("model") or {}, state.get("model_config") or {}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    config = {**config, **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})}
    found = {word: config[key] for key, word in _HUGGINGFACE.items() if config.get(key) is not None}
    found |= {"normalization": "RMSNorm"} if "norm_epsilon" in found else {}
    found |= {word: model[key] for key, word in _OWN.items() if key in model}
    if "rotary_base" in found:
        base = float(found["rotary_base"])
        share = rope.get("partial_rotary_factor") or config.get("rotary_pct") or 1.0
        found |= {"rotary_base": int(base) if base.is_integer() else base, "rotary_percent": float(share)}
        found["position_embedding_type"] = "rope"
    found |= _stretched(model, rope)
    keeps_order = model.get("norm_topk_prob", config.get("norm_topk_prob"))
    if facts.get("num_experts") and keeps_order is not None:
        found["moe_router_pre_softmax"] = not keeps_order
    activation = model.get("activation") or config.get("hidden_act") or "swiglu"
    biased = any(name.endswith(".o_proj.bias") for name in names)
    return found | {
        "swiglu": bool(facts.get("gated")) and activation in ("swiglu", "silu"),
        "add_position_embedding": True,
        "add_bias_linear": biased,
        "add_qkv_bias": not biased and any(name.endswith(".q_proj.bias") for name in names),
        "qk_layernorm": any(name.endswith(".q_norm.weight") for name in names),
    }


def _stretched(model: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling of the rotary frequencies."""
    kind = model.get("rope_scaling") or rope.get("rope_type") or rope.get("type")
    factor = model.get("rope_scaling_factor") or rope.get("factor")
    if kind != "llama3" or not isinstance(factor, int | float) or not math.isfinite(factor):
        return {}
    return {"use_rope_scaling": True, "rope_scaling_factor": float(factor)}
