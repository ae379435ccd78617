"""Reads the architecture from a Hugging Face config.json, and refuses what would change numbers unseen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Keys that describe the file, generation or the tokenizer, or that only choose an implementation.
_WITHOUT_EFFECT = frozenset(
    "_attn_implementation _name_or_path add_cross_attention architectures auto_map bos_token_id "
    "chunk_size_feed_forward dtype eos_token_id finetuning_task id2label is_decoder is_encoder_decoder "
    "label2id max_window_layers model_type output_attentions output_hidden_states pad_token_id "
    "pretraining_tp problem_type return_dict task_specific_params tokenizer_class torch_dtype "
    "transformers_version use_cache use_return_dict".split()
)
_READ = frozenset(
    "attention_bias attention_dropout head_dim hidden_act hidden_size initializer_range intermediate_size "
    "layer_types max_position_embeddings mlp_bias norm_topk_prob num_attention_heads num_experts "
    "num_experts_per_tok num_hidden_layers num_key_value_heads num_local_experts moe_intermediate_size "
    "original_max_position_embeddings rms_norm_eps rope_parameters rope_scaling rope_theta "
    "router_aux_loss_coef sliding_window tie_word_embeddings use_sliding_window vocab_size".split()
)
# Settings of these families that megatron-core's GPTModel does not compute, with the value that means "off".
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (None, 1),
    "mlp_only_layers": (None, []),
    "output_router_logits": (None, False),
    "router_jitter_noise": (None, 0, 0.0),
    "partial_rotary_factor": (None, 1, 1.0),
}
_INTEGERS = (
    "head_dim max_position_embeddings max_window_layers moe_intermediate_size num_experts "
    "num_experts_per_tok num_key_value_heads num_local_experts sliding_window"
).split()
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Llama 3.1's stretching of RoPE as megatron-core has it: these three are not configurable there.
_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Family:
    """What a `model_type` implies beyond the Llama block, and the values its files may leave out.

    Attributes:
        defaults: of Hugging Face keys, where they differ from Llama's.
        fixed: fields of `Architecture` that the family always has.
        windowed: which layers use the sliding window: "all", "from max_window_layers", or "never".
    """

    defaults: dict[str, Any]
    fixed: dict[str, Any]
    windowed: str = "never"


FAMILIES = {
    "llama": Family({}, {}),
    "qwen2": Family(
        {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096},
        {"qkv_bias": True},
        "from max_window_layers",
    ),
    "qwen3": Family(
        {
            "num_key_value_heads": 32,
            "head_dim": 128,
            "use_sliding_window": False,
            "sliding_window": 4096,
        },
        {"qk_norm": True},
        "from max_window_layers",
    ),
    "mistral": Family({"num_key_value_heads": 8, "sliding_window": 4096}, {}, "all"),
    "mixtral": Family(
        {
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        {},
        "all",
    ),
    "qwen3_moe": Family(
        {
            "num_key_value_heads": 4,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
        {"qk_norm": True},
        "all",
    ),
}
_LLAMA_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
}


def read_huggingface_config(path: str | Path) -> dict[str, Any]:
    """Fields of `Architecture` from a config.json, or from a folder that has one.

    Raises:
        ValueError: for a missing file, or listing every key that is missing or cannot be honoured.
    """
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"model.hf is {str(path)!r}: {error.strerror}; give a config.json or its folder"
        ) from None
    except ValueError as error:
        raise ValueError(f"model.hf: {file} is not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"model.hf: {file} holds {type(raw).__name__}, a JSON object is expected")
    return from_huggingface(raw, str(file))


def from_huggingface(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Translate the keys of a config.json, called `where` in errors.

    Raises:
        ValueError: with all problems.
    """
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise ValueError(
            f"{where}: model_type is {raw.get('model_type')!r}, supported are {', '.join(FAMILIES)}"
        )
    problems = [f"{where}: {key} is missing" for key in _NEEDED if raw.get(key) is None]
    problems += [
        f"{where}: {key} is {raw[key]!r}, a whole number is expected"
        for key in (*_NEEDED, *_INTEGERS)
        if raw.get(key) is not None and type(raw[key]) is not int
    ]
    if problems:
        raise ValueError("\n".join(problems))
    keys = {**_LLAMA_DEFAULTS, **family.defaults, **raw}
    fields: dict[str, Any] = dict(family.fixed)
    for translate in (_shape, _biases, _rope, _window, _experts):
        fields |= translate(keys, family, lambda problem: problems.append(f"{where}: {problem}"))
    problems += [f"{where}: {problem}" for problem in (*_not_computed(raw), *_unknown(raw))]
    if problems:
        raise ValueError("\n".join(problems))
    return fields


_Report = Callable[[str], None]


def _shape(keys: dict[str, Any], family: Family, report: _Report) -> dict[str, Any]:
    if keys["hidden_act"] != "silu":
        report(f"hidden_act is {keys['hidden_act']!r}, these families are supported with 'silu'")
    return {
        "num_layers": keys["num_hidden_layers"],
        "hidden_size": keys["hidden_size"],
        "ffn_hidden_size": keys["intermediate_size"],
        "num_attention_heads": keys["num_attention_heads"],
        "num_query_groups": keys.get("num_key_value_heads"),
        "head_dim": keys.get("head_dim"),
        "vocab_size": keys["vocab_size"],
        "max_position_embeddings": keys["max_position_embeddings"],
        "normalization": "RMSNorm",
        "norm_epsilon": keys["rms_norm_eps"],
        "activation": "swiglu",
        "tie_word_embeddings": keys.get("tie_word_embeddings", False),
        "attention_dropout": keys.get("attention_dropout"),
        "init_std": keys["initializer_range"],
    }


def _biases(keys: dict[str, Any], family: Family, report: _Report) -> dict[str, Any]:
    attention, mlp = bool(keys.get("attention_bias")), bool(keys.get("mlp_bias"))
    if attention != mlp:
        report(
            f"attention_bias is {attention} and mlp_bias is {mlp}: megatron-core has biases on both or none"
        )
    return {"linear_bias": attention and mlp}


def _rope(keys: dict[str, Any], family: Family, report: _Report) -> dict[str, Any]:
    """transformers 5 writes rope_parameters; files before it have rope_theta and rope_scaling."""
    rope = {**(keys.get("rope_scaling") or {}), **(keys.get("rope_parameters") or {})}
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    fields = {"rope_theta": rope.pop("rope_theta", None) or keys["rope_theta"]}
    if kind == "llama3":
        fields |= {"rope_scaling": "llama3", "rope_scaling_factor": rope.pop("factor", None)}
        if fields["rope_scaling_factor"] is None:
            report("rope factor is missing, which llama3 scaling needs")
        rope.setdefault("original_max_position_embeddings", keys.get("original_max_position_embeddings"))
        for name, needed in _LLAMA3.items():
            found = rope.pop(name, None)
            if found != needed:
                report(f"rope {name} is {found}, megatron-core's llama3 scaling has {needed}")
    elif kind != "default":
        report(f"RoPE of type {kind!r} is not supported, only 'default' and 'llama3' are")
        return fields
    if rope.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        report("rope partial_rotary_factor is not 1: RoPE over part of a head is not supported")
    for name, value in rope.items():
        if value is not None:
            report(f"rope setting {name} = {value!r} is not known for type {kind!r}")
    return fields


def _window(keys: dict[str, Any], family: Family, report: _Report) -> dict[str, Any]:
    length = keys.get("sliding_window") or 0
    if "use_sliding_window" in keys and not keys["use_sliding_window"]:
        length = 0
    num_layers = keys["num_hidden_layers"]
    layers = range(num_layers)
    types = keys.get("layer_types")
    if family.windowed == "from max_window_layers":
        layers = range(min(keys.get("max_window_layers", 28), num_layers), num_layers)
        if types is not None:
            unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
            if unknown or len(types) != num_layers:
                report(f"layer_types has {len(types)} entries for {num_layers} layers, unknown: {unknown}")
            layers = [i for i, kind in enumerate(types) if kind == "sliding_attention"]  # type: ignore[assignment]
    elif types is not None and set(types) != {"sliding_attention" if length else "full_attention"}:
        report("layer_types mixes kinds of attention, which this model_type does not have")
    if family.windowed == "never" and length:
        report(f"sliding_window is {length}, which this model_type does not have")
    if not length or not layers:
        return {"sliding_window": 0, "sliding_window_layers": ()}
    return {"sliding_window": length, "sliding_window_layers": tuple(layers)}


def _experts(keys: dict[str, Any], family: Family, report: _Report) -> dict[str, Any]:
    # Published Qwen3-MoE files say num_experts, transformers 5 writes num_local_experts for both families.
    if "num_local_experts" not in family.defaults:
        return {}
    return {
        "num_experts": keys.get("num_experts", keys["num_local_experts"]),
        "experts_per_token": keys["num_experts_per_tok"],
        "moe_ffn_hidden_size": keys.get("moe_intermediate_size", keys["intermediate_size"]),
        "norm_topk_prob": keys["norm_topk_prob"],
    }


def _not_computed(raw: dict[str, Any]) -> list[str]:
    remedies = {"output_router_logits": "; set it to false, and model.router_aux_loss_coefficient if wanted"}
    return [
        f"{key} is {raw[key]!r}, only {off[-1]!r} is supported{remedies.get(key, '')}"
        for key, off in _MUST_BE.items()
        if raw.get(key) not in off
    ]


def _unknown(raw: dict[str, Any]) -> list[str]:
    """Keys that nothing reads, unless their value can only mean "off"."""
    known = _READ | _WITHOUT_EFFECT | _MUST_BE.keys()
    return [
        f"{key} = {value!r} is not known and may change what the model computes; if not, remove it"
        for key, value in raw.items()
        if key not in known and value not in (None, False, [], {})
    ]
