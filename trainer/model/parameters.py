"""What a model is made of: logical parameters, how many there are, and how many of them a rank holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.model.architecture import Architecture
from trainer.model.transformer import padded_vocab_size

if TYPE_CHECKING:
    from parallel.layout import Layout

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def logical_parameters(model: Architecture) -> dict[str, Shape]:
    """Layout-free name -> unpadded shape of every parameter, in the order of the data's path."""
    shapes: dict[str, Shape] = {EMBEDDING: (model.vocab_size, model.hidden_size)}
    for layer in range(model.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_parameters(model).items()}
    shapes |= _norm(model, "model.norm", model.hidden_size)
    if not model.tie_word_embeddings:
        shapes[HEAD] = (model.vocab_size, model.hidden_size)
    return shapes


def layer_parameters(model: Architecture) -> dict[str, Shape]:
    """Name below `model.layers.{i}.` -> shape; all layers are alike."""
    hidden = model.hidden_size
    shapes = _norm(model, "input_layernorm", hidden)
    for part, width in (("q", model.query_size), ("k", model.key_value_size), ("v", model.key_value_size)):
        bias = model.qkv_bias or model.linear_bias
        shapes |= _linear(f"self_attn.{part}_proj", width, hidden, bias=bias)
    if model.qk_norm:
        shapes |= _norm(model, "self_attn.q_norm", model.head_dim)
        shapes |= _norm(model, "self_attn.k_norm", model.head_dim)
    shapes |= _linear("self_attn.o_proj", hidden, model.query_size, bias=model.linear_bias)
    shapes |= _norm(model, "post_attention_layernorm", hidden)
    if not model.num_experts:
        return shapes | _mlp(model, "mlp")
    shapes["mlp.gate.weight"] = (model.num_experts, hidden)
    for expert in range(model.num_experts):
        shapes |= _mlp(model, f"mlp.experts.{expert}")
    return shapes


def _mlp(model: Architecture, prefix: str) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for part in ("gate", "up") if model.gated else ("up",):
        shapes |= _linear(f"{prefix}.{part}_proj", model.mlp_size, model.hidden_size, bias=model.linear_bias)
    return shapes | _linear(f"{prefix}.down_proj", model.hidden_size, model.mlp_size, bias=model.linear_bias)


def _linear(name: str, out: int, into: int, *, bias: bool) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.weight": (out, into)}
    return shapes | ({f"{name}.bias": (out,)} if bias else {})


def _norm(model: Architecture, name: str, size: int) -> dict[str, Shape]:
    kinds = ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",)
    return {f"{name}.{kind}": (size,) for kind in kinds}


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; a tied embedding counts once.

    Attributes:
        active: that one token passes: of the experts only experts_per_token.
        non_embedding: without input embedding and output layer.
    """

    total: int
    active: int
    non_embedding: int


def count_parameters(model: Architecture) -> ParameterCount:
    """Count the logical parameters of the whole model."""
    sizes = {name: math.prod(shape) for name, shape in logical_parameters(model).items()}
    total = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if is_expert(name))
    idle = experts * (model.num_experts - model.experts_per_token) // model.num_experts if experts else 0
    embeddings = sizes[EMBEDDING] + sizes.get(HEAD, 0)
    return ParameterCount(total=total, active=total - idle, non_embedding=total - embeddings)


def is_expert(name: str) -> bool:
    """Whether a logical parameter belongs to one expert, and so is spread over expert-parallel ranks."""
    return ".mlp.experts." in f".{name}"


@dataclass(frozen=True)
class RankParameters:
    """Numbers of parameters in the memory of one rank, vocabulary padding included.

    Attributes:
        stage: pipeline stage of the rank.
        dense: shared by all data- and context-parallel ranks.
        expert: of the experts that this rank keeps.
    """

    stage: int
    dense: int
    expert: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.expert


def parameters_per_rank(model: Architecture, layout: Layout, *, cuda: bool = False) -> list[RankParameters]:
    """What a rank of each pipeline stage holds; tensor ranks hold equally much, as do expert ranks.

    A tied embedding lies on the first and on the last stage.
    """
    ranks = []
    for stage, held in enumerate(stage_parameters(model, layout, cuda=cuda)):
        expert = sum(size for name, size in held.items() if is_expert(name))
        ranks.append(RankParameters(stage, sum(held.values()) - expert, expert // layout.expert))
    return ranks


def stage_parameters(model: Architecture, layout: Layout, *, cuda: bool = False) -> list[dict[str, int]]:
    """By pipeline stage, logical name -> numbers on a tensor rank, vocabulary padding included.

    All experts are there, each whole: expert ranks share them.
    """
    stages: list[dict[str, int]] = [{} for _ in range(layout.pipeline)]
    rows = padded_vocab_size(model.vocab_size, layout.tensor, cuda=cuda) // layout.tensor
    stages[0][EMBEDDING] = rows * model.hidden_size
    stages[-1][EMBEDDING if model.tie_word_embeddings else HEAD] = rows * model.hidden_size
    layer = {name: _local_size(name, shape, layout) for name, shape in layer_parameters(model).items()}
    per_chunk = max(1, model.num_layers // (layout.pipeline * layout.chunks))
    for number in range(model.num_layers):
        stage = stages[number // per_chunk % layout.pipeline]
        stage |= {f"model.layers.{number}.{name}": size for name, size in layer.items()}
    for name, shape in _norm(model, "model.norm", model.hidden_size).items():
        stages[-1][name] = math.prod(shape)
    return stages


def _local_size(name: str, shape: Shape, layout: Layout) -> int:
    """Elements of a layer's parameter on one tensor rank. Norms, the router and summed biases are whole."""
    whole = "norm" in name or name == "mlp.gate.weight"
    whole = whole or name.endswith(("o_proj.bias", "down_proj.bias"))
    return math.prod(shape) // (1 if whole else layout.tensor)
