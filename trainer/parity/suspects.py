"""Why logits differ: what to look at first, from the two configurations, the weights, and the place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

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
    "ffn_hidden_size": "the width of the MLP",
    "moe_ffn_hidden_size": "the width of an expert",
}
_NOT_WITHOUT = {"rope_scaling_factor": "rope_scaling", "norm_topk_prob": "num_experts"}
Weights = Mapping[str, torch.Tensor]
Orders = Mapping[str, torch.Tensor]
"""what an order of rows is called -> the rows in that order"""


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
    """Logical tensors that are not the same on both sides, with the order of rows that would make them so.

    Of two dtypes the lower one counts: a bf16 copy of an fp32 weight is the same.
    """
    found = []
    explained: set[str] = set()
    for names, orders in _fused(ours.keys() & theirs.keys(), model):
        mine, other = (torch.cat([side[name] for name in names]) for side in (ours, theirs))
        what = None if _same(mine, other) else _reordered(mine, other, orders)
        if what is not None:
            found.append(f"{what}: {', '.join(names)} have the same rows in that other order")
            explained.update(names)
    for name in sorted((ours.keys() | theirs.keys()) - explained):
        if name not in ours or name not in theirs:
            where = "there" if name not in ours else "here"
            kind = "a bias" if name.endswith(".bias") else "a tensor"
            found.append(f"{kind} that only one side has: {name}, {where}")
        elif ours[name].shape != theirs[name].shape:
            found.append(
                f"the shape of {name}: {list(ours[name].shape)} here, {list(theirs[name].shape)} there"
            )
        elif not _same(ours[name], theirs[name]):
            what = _reordered(ours[name], theirs[name], _orders(name, len(ours[name]), model))
            same_rows = f"{what}: {name} has the same rows in that other order"
            found.append(same_rows if what is not None else f"the values of {name}")
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


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    lower = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(ours.to(lower), theirs.to(lower))


def _reordered(ours: torch.Tensor, theirs: torch.Tensor, orders: Orders) -> str | None:
    """What the order of rows is called under which the two tensors are the same."""
    rows = [(what, order) for what, order in orders.items() if len(order) == len(ours)]
    return next((what for what, order in rows if _same(ours[order], theirs)), None)


def _fused(names: Iterable[str], model: Architecture) -> Iterator[tuple[tuple[str, ...], Orders]]:
    """Tensors that trainers fuse into one, and orders in which they are taken for one another's rows."""
    there = sorted(names)
    for name in there:
        if ".q_proj." in name:
            yield tuple(name.replace("q_proj", f"{one}_proj") for one in "qkv"), _qkv_orders(model)
        elif ".gate_proj." in name:
            halves = torch.arange(2 * model.mlp_size).view(2, -1)
            orders = {
                "gate and up are swapped": halves.flip(0).reshape(-1),
                "gate and up were taken for rows in turn, and are one after the other": halves.T.reshape(-1),
                "gate and up are rows in turn, and were taken for one after the other": halves.view(
                    -1, 2
                ).T.reshape(-1),
            }
            yield (name, name.replace("gate_proj", "up_proj")), orders


def _qkv_orders(model: Architecture) -> Orders:
    groups, head = model.num_query_groups, model.head_dim
    rows = torch.arange(model.query_size + 2 * model.key_value_size)
    parts = rows.split([model.query_size, model.key_value_size, model.key_value_size])
    grouped = torch.cat([part.view(groups, -1, head) for part in parts], dim=1).reshape(-1)
    return {
        "the qkv order: one after the other in the file, and taken for groups": grouped,
        "the qkv order: by group in the file, and taken for one after the other": grouped.argsort(),
    }


def _orders(name: str, rows: int, model: Architecture) -> Orders:
    head = model.head_dim
    if (".q_proj." not in name and ".k_proj." not in name) or rows % head:
        return {}
    heads = torch.arange(rows).view(-1, head)
    orders = {
        "RoPE halves interleaved (Meta's order) instead of apart (Hugging Face's)": heads.view(
            -1, 2, head // 2
        )
        .transpose(1, 2)
        .reshape(-1),
        "RoPE halves apart (Hugging Face's order) instead of interleaved (Meta's)": heads.view(
            -1, head // 2, 2
        )
        .transpose(1, 2)
        .reshape(-1),
    }
    groups = model.num_query_groups
    if ".q_proj." in name and rows % (groups * head) == 0:
        orders["the qkv order: query heads by position instead of by group"] = (
            heads.view(groups, -1, head).transpose(0, 1).reshape(-1)
        )
    return orders
