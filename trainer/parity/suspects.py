"""Why logits differ: what to look at first, from the two configurations, the weights, and the place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainer.model.architecture import Architecture
from trainer.parity.probe import EMBEDDING, LOGITS

# Fields that change the numbers, and what people call them. Names of the field as in `[model]`.
_CAUSES = {
    "rope_theta": "the RoPE base",
    "rope_scaling": "the RoPE scaling",
    "rope_scaling_factor": "the RoPE scaling",
    "norm_epsilon": "the norm's epsilon",
    "normalization": "the kind of norm",
    "activation": "the activation",
    "qkv_bias": "the bias of q, k and v",
    "linear_bias": "the biases of the linear layers",
    "qk_norm": "the norms of q and k",
    "head_dim": "the size of a head",
    "num_attention_heads": "the number of heads",
    "num_query_groups": "the number of key/value heads",
    "num_layers": "the number of layers",
    "vocab_size": "the vocabulary, or its padding",
    "tie_word_embeddings": "tied embeddings",
    "sliding_window": "the attention window",
    "sliding_window_layers": "the layers with an attention window",
    "experts_per_token": "the experts a token is sent to",
    "norm_topk_prob": "the normalisation of the router's weights",
    "num_experts": "the number of experts",
}
_NOT_WITHOUT = {"rope_scaling_factor": "rope_scaling", "norm_topk_prob": "num_experts"}
Weights = Mapping[str, torch.Tensor]


def configuration_suspects(ours: Architecture, theirs: Architecture) -> list[str]:
    """Settings of the model that are not the same on both sides."""
    mine, other = ours.model_dump(), theirs.model_dump()
    found = []
    for key, cause in _CAUSES.items():
        owner = _NOT_WITHOUT.get(key)
        if owner is not None and mine[owner] in ("none", 0) and other[owner] in ("none", 0):
            continue
        if mine[key] != other[key]:
            found.append(f"{cause}: model.{key} is {mine[key]!r} here and {other[key]!r} there")
    return found


def weight_suspects(ours: Weights, theirs: Weights, model: Architecture) -> list[str]:
    """Logical tensors that are not the same on both sides, with the order of rows that would make them so."""
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            where = "there" if name not in ours else "here"
            kind = "a bias" if name.endswith(".bias") else "a tensor"
            found.append(f"{kind} that only one side has: {name}, {where}")
        elif ours[name].shape != theirs[name].shape:
            found.append(
                f"the shape of {name}: {list(ours[name].shape)} here, {list(theirs[name].shape)} there"
            )
        elif not torch.equal(ours[name].float(), theirs[name].float()):
            found.append(_reordered(name, ours[name], theirs[name], model) or f"the values of {name}")
    return found


def place_suspects(point: str, model: Architecture) -> list[str]:
    """What the first differing point says by itself, when settings and weights are the same."""
    if point == EMBEDDING:
        return ["the vocabulary: rows of the embedding, its padding, or a scaled embedding"]
    if point == LOGITS:
        return ["the final norm or the output layer: its rows, their padding, or whether it is tied"]
    if point.endswith("attention"):
        more = ", the norms of q and k" if model.qk_norm else ""
        return [f"the attention: RoPE (base, scaling, order of halves), the order of q, k and v, masks{more}"]
    if point.endswith("mlp"):
        return [
            "the router or the experts" if model.num_experts else "the MLP: gate and up swapped, activation"
        ]
    return ["the norms or the residual of the layer"]


def _reordered(name: str, ours: torch.Tensor, theirs: torch.Tensor, model: Architecture) -> str | None:
    """A known order of rows under which the two tensors are the same."""
    for what, order in _orders(name, len(ours), model).items():
        if torch.equal(ours[order].float(), theirs.float()):
            return f"{what}: {name} has the same rows in that other order"
    return None


def _orders(name: str, rows: int, model: Architecture) -> dict[str, Any]:
    head = model.head_dim
    orders: dict[str, Any] = {}
    if ".q_proj." in name or ".k_proj." in name:
        heads = torch.arange(rows).view(-1, head)
        orders["RoPE halves interleaved (Meta's order) instead of apart (Hugging Face's)"] = (
            heads.view(-1, 2, head // 2).transpose(1, 2).reshape(-1)
        )
        orders["RoPE halves apart (Hugging Face's order) instead of interleaved (Meta's)"] = (
            heads.view(-1, head // 2, 2).transpose(1, 2).reshape(-1)
        )
    if ".q_proj." in name:
        groups = model.num_query_groups
        queries = torch.arange(rows).view(groups, -1, head)
        orders["the qkv order: query heads by position instead of by group"] = queries.transpose(
            0, 1
        ).reshape(-1)
    return orders
