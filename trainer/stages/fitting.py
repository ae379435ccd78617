"""Whether the weights of a checkpoint fit a run: their shapes, and the tokenizer of the ids they know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from checkpoint.manifest import PARAMETER_STATES
from trainer.model.of_checkpoint import stated_fields
from trainer.model.parameters import Shape, logical_parameters

if TYPE_CHECKING:
    from checkpoint.opening import Opened
    from trainer.config import RunConfig
    from trainer.model.architecture import Architecture

SHAPING = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "vocab_size",
    "normalization",
    "activation",
    "qkv_bias",
    "linear_bias",
    "qk_norm",
    "tie_word_embeddings",
    "num_experts",
    "moe_ffn_hidden_size",
)
"""Fields of an architecture that decide which parameters there are, and how large."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_LISTED = 3


def held_shapes(opened: Opened) -> dict[str, Shape]:
    """Shape of every parameter in a checkpoint, by its logical name."""
    return {one.name: tuple(one.shape) for one in opened.manifest.tensors if one.state in PARAMETER_STATES}


def held_fields(opened: Opened) -> dict[str, Any]:
    """What a checkpoint states of `SHAPING`; empty where it states nothing."""
    return {key: value for key, value in stated_fields(opened).items() if key in SHAPING}


def shape_problems(model: Architecture, held: Mapping[str, Shape], stated: Mapping[str, Any]) -> list[str]:
    """One sentence where these weights cannot become this model's; none where they can.

    Args:
        held: shapes of the checkpoint's parameters, by logical name.
        stated: fields of the architecture, as far as the checkpoint says them.
    """
    wanted = logical_parameters(model)
    wrong = [
        f"{name} is {_size(held.get(name))} there and {_size(shape)} here"
        for name, shape in wanted.items()
        if held.get(name) != shape
    ]
    layer_of = {name: int(found[1]) for name in held if (found := _LAYER.match(name))}
    if (last := max(layer_of.values(), default=-1)) >= model.num_layers:
        wrong.append(f"it has {last + 1} layers, and the model {model.num_layers}")
    wrong += [
        f"{name} is {_size(shape)} there and missing here"
        for name, shape in held.items()
        if name not in wanted and layer_of.get(name, -1) < model.num_layers
    ]
    if not wrong:
        return []
    now = model.model_dump()
    others = {key: old for key, old in stated.items() if old != now[key]}
    fields = [f"model.{key} is {old} there and {now[key]} here" for key, old in others.items()]
    listed = fields or wrong[:_LISTED]
    if not fields and len(wrong) > _LISTED:
        listed.append(f"and {len(wrong) - _LISTED} more")
    return [
        f"model: the checkpoint is of another shape: {'; '.join(listed)}. Weights keep their shape: give "
        "[model] the checkpoint's, start from another checkpoint, or start from none"
    ]


def _size(shape: Shape | None) -> str:
    return "missing" if shape is None else str(list(shape))


def fingerprint_of(config: RunConfig) -> str:
    """Of the tokenizer that the run file names."""
    from trainer.data.tokenizer import load_tokenizer  # brings numpy, which no wrong key needs

    return load_tokenizer(config.data.tokenizer, config.data.eod).fingerprint


def tokenizer_problems(config: RunConfig, state: Mapping[str, Any], *, keeps_data: bool) -> list[str]:
    """One sentence where a checkpoint was trained with another tokenizer; none where it does not say.

    Args:
        state: of the checkpoint's manifest.
        keeps_data: whether the run goes on from its data position, which counts that tokenizer's tokens.
    """
    before, now = (state.get("data") or {}).get("tokenizer"), fingerprint_of(config)
    if before in (None, now):
        return []
    name = state.get("config", {}).get("data", {}).get("tokenizer")
    there = f"{name}, fingerprint {before}" if name else f"fingerprint {before}"
    found = (
        f"data.tokenizer: the checkpoint was trained with another tokenizer ({there}; here "
        f"{config.data.tokenizer}, fingerprint {now})"
    )
    if config.start.vocabulary == "keep":
        return [
            f"{found}: its weights have learnt other ids. Set data.tokenizer and data.eod back; or, where "
            'the ids mean the same, set start.vocabulary = "change" and start.data = "reset"'
        ]
    if keeps_data:
        return [
            f"{found}, so how far its data have been read means nothing here: set start.data = "
            '"reset", or data.tokenizer and data.eod back'
        ]
    return []
