"""The families under test: tiny random transformers models, one for each thing done its own way."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from parallel.layout import Layout

_SMALL: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=67,  # odd, so that two tensor ranks pad it
    max_position_embeddings=128,
    initializer_range=0.15,  # activations of order one, so that no part of the model fades into rounding
    tie_word_embeddings=False,
)
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


@dataclass(frozen=True)
class Family:
    """A `model_type` with its settings.

    Attributes:
        without: the settings that take away what the case is there for: the logits must then be others.
    """

    name: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    without: dict[str, Any] = field(default_factory=dict)
    moe: bool = False


_QWEN3 = dict(head_dim=16)
_QWEN3_MOE = dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "llama"),
        Family("llama tied", "llama", dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)),
        Family(
            "llama 3.1 rope",
            "llama",
            dict(head_dim=16, rope_parameters=_LLAMA3_ROPE, max_position_embeddings=65536),
            dict(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        ),
        Family("qwen2", "qwen2"),
        Family(
            "qwen2, window in some layers",
            "qwen2",
            dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
            dict(use_sliding_window=False),
        ),
        Family("qwen3", "qwen3", _QWEN3),
        Family("mistral", "mistral", dict(head_dim=8, sliding_window=6), dict(sliding_window=None)),
        Family("mixtral", "mixtral", dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2), moe=True),
        Family(
            "qwen3_moe, normed",
            "qwen3_moe",
            dict(_QWEN3_MOE, norm_topk_prob=True),
            dict(norm_topk_prob=False),
            moe=True,
        ),
        Family(
            "qwen3_moe, not normed",
            "qwen3_moe",
            dict(_QWEN3_MOE, norm_topk_prob=False),
            dict(norm_topk_prob=True),
            moe=True,
        ),
    )
}


def plain(**degrees: Any) -> Layout:
    """A layout whose gradients stay whole on every data rank, so that they can be read."""
    return Layout(**degrees, distributed_optimizer=False)


# name -> (ranks, layout)
DENSE_LAYOUTS = {
    "one rank": (1, plain()),
    "TP2 SP": (2, plain(tensor=2, sequence_parallel=True)),
    "PP2": (2, plain(pipeline=2)),
    "CP2": (2, plain(context=2)),
}
MOE_LAYOUTS = {
    "one rank": (1, plain()),
    "EP2": (2, plain(expert=2)),
    "TP2 SP x EP2": (4, plain(tensor=2, expert=2, sequence_parallel=True)),
    "PP2": (2, plain(pipeline=2)),
}
LONG_DENSE_LAYOUTS = {
    "TP2": (2, plain(tensor=2)),
    "PP2 x VPP2": (2, plain(pipeline=2, virtual_pipeline=2)),
    "CP2 all-gather": (2, plain(context=2, context_kind="all_gather")),
    "CP2 Ulysses": (2, plain(context=2, context_kind="a2a")),
    "TP2 SP x PP2 x CP2": (8, plain(tensor=2, pipeline=2, context=2, sequence_parallel=True)),
}
LONG_MOE_LAYOUTS = {
    "TP2 SP": (2, plain(tensor=2, sequence_parallel=True)),
    "CP2": (2, plain(context=2)),
    "EP4": (4, plain(expert=4)),
    "EP2 x CP2": (2, plain(context=2, expert=2)),
    "EP2 x PP2 x VPP2": (4, plain(pipeline=2, virtual_pipeline=2, expert=2)),
    "TP2 SP x EP2 x PP2": (8, plain(tensor=2, pipeline=2, expert=2, sequence_parallel=True)),
}


def layouts(family: Family, *, long: bool = False) -> dict[str, tuple[int, Layout]]:
    """The layouts in which a family is compared."""
    if family.moe:
        return LONG_MOE_LAYOUTS if long else MOE_LAYOUTS
    return LONG_DENSE_LAYOUTS if long else DENSE_LAYOUTS


def build_model(family: Family, *, without: bool = False) -> PreTrainedModel:
    """The random float32 model: norms, biases and routers too are away from their usual initial values."""
    settings = _SMALL | family.settings | (family.without if without else {})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family.model_type, **settings), attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1.0 + 0.3 * draw)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * draw)
            elif name.endswith("mlp.gate.weight"):
                parameter.copy_(0.5 * draw)  # decided choices of experts: rounding must not turn one
            else:
                parameter.copy_(0.15 * draw)
    return model.eval()


def saved_model(name: str, folder: Path) -> tuple[PreTrainedModel, Path]:
    """A family's model, and `folder`, which now has its config.json as transformers writes it."""
    model = build_model(FAMILIES[name])
    model.config.save_pretrained(folder)
    return model, folder
