"""What a Hugging Face config.json says about the model's sizes, in the names of `Architecture`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FACTS: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "ffn_hidden_size": ("intermediate_size", "n_inner"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_query_groups": ("num_key_value_heads", "num_attention_heads", "n_head", "n_heads"),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    # Published Qwen3-MoE files say num_experts; transformers 5 writes num_local_experts for all families.
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok",),
}
"""Fact -> keys that mean it, the first that is there counts."""


def read_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of a folder; None where there is none.

    Raises:
        ValueError: it is no JSON object.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{file}: is no JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: holds {type(config).__name__}, a JSON object is expected")
    return config


def facts_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Whole numbers about the model, as far as the config has them; also `tie_word_embeddings` as 0 or 1.

    A config of several modalities has its language model's under "text_config".
    """
    inner = config.get("text_config")
    keys = {**config, **inner} if isinstance(inner, dict) else config
    facts = {}
    for fact, names in FACTS.items():
        found = [keys[name] for name in names if type(keys.get(name)) is int]
        if found:
            facts[fact] = found[0]
    if "head_dim" not in facts and facts.get("num_attention_heads") and "hidden_size" in facts:
        facts["head_dim"] = facts["hidden_size"] // facts["num_attention_heads"]
    expert_size = keys.get("moe_intermediate_size", facts.get("ffn_hidden_size"))
    if facts.get("num_experts") and type(expert_size) is int:
        facts["moe_ffn_hidden_size"] = expert_size
    if type(keys.get("tie_word_embeddings")) is bool:
        facts["tie_word_embeddings"] = int(keys["tie_word_embeddings"])
    return facts


def quantisation(config: Mapping[str, Any]) -> str | None:
    """The method that the weights are quantised with; None where they are not."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(settings, dict):
        return None
    return str(settings.get("quant_method", "an unnamed method"))
