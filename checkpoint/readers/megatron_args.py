"""What Megatron-LM's arguments, which it saves in its checkpoints, say of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FACTS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "padded_vocab_size": "padded_vocab_size",
    "num_experts": "num_experts",
    "moe_ffn_hidden_size": "moe_ffn_hidden_size",
    "experts_per_token": "moe_router_topk",
}
"""Fact -> Megatron-LM's word. The vocabulary without padding it knows only if it was told."""
_GATES = ("swiglu", "geglu", "quick_geglu", "reglu", "gated_linear_unit")


def facts_of(args: Mapping[str, Any]) -> dict[str, int]:
    """Whole numbers about the model, as far as they are known."""
    facts = {}
    for fact, argument in _FACTS.items():
        value = args.get(argument)
        if isinstance(value, int) and value > 0:
            facts[fact] = int(value)
    heads = facts.get("num_attention_heads")
    if heads and args.get("group_query_attention") and args.get("num_query_groups"):
        facts["num_query_groups"] = int(args["num_query_groups"])
    elif heads:
        facts["num_query_groups"] = heads
    if heads and "head_dim" not in facts and "hidden_size" in facts:
        facts["head_dim"] = facts["hidden_size"] // heads
    if not facts.get("num_experts"):
        facts.pop("experts_per_token", None)
    if any(gate in args for gate in _GATES):
        facts["gated"] = int(any(args.get(gate) for gate in _GATES))
    if "untie_embeddings_and_output_weights" in args:
        facts["tie_word_embeddings"] = int(not args["untie_embeddings_and_output_weights"])
    return facts


def unreadable(args: Mapping[str, Any]) -> list[str]:
    """Settings under which stored numbers mean something else than elsewhere, a line each."""
    lines = []
    if args.get("apply_layernorm_1p"):
        lines.append(
            "apply_layernorm_1p is on: norm weights are stored minus one, and numbers are only moved here, "
            "never changed; save once without it, one added to these weights"
        )
    return lines
