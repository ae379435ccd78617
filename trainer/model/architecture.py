"""The architecture of a decoder-only transformer, complete: what `[model]` resolves to."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from parallel.settings import Settings

Normalization = Literal["RMSNorm", "LayerNorm"]
Activation = Literal["swiglu", "geglu", "gelu"]
RopeScaling = Literal["none", "llama3"]
AuxLossType = Literal["aux_loss", "seq_aux_loss", "global_aux_loss"]


class Architecture(Settings):
    """Every number that decides what a model computes. `ModelConfig.resolve` makes it.

    Attributes:
        num_query_groups: key/value heads (grouped-query attention, arXiv 2305.13245).
        head_dim: size of one attention head; Megatron's kv_channels.
        vocab_size: rows of the embedding that mean a token, without padding.
        activation: of the MLP; "swiglu" and "geglu" are gated (arXiv 2002.05202), "gelu" is not.
        qkv_bias: biases on the query, key and value projections alone (Qwen2).
        linear_bias: biases on every linear layer of attention and MLP (implies those of q, k, v).
        qk_norm: normalise each query and key head over head_dim before RoPE (Qwen3).
        rope_scaling: "llama3" stretches the low frequencies as Llama 3.1 does: wavelengths above 8192 / 1 by
            rope_scaling_factor, below 8192 / 4 not at all, smoothly in between.
        sliding_window: tokens that a query sees, itself included; 0 is full attention.
        sliding_window_layers: global indices, from 0, of the layers that use the window.
        num_experts: experts of each layer; 0 is a dense model.
        experts_per_token: experts that each token is sent to (top-k).
        norm_topk_prob: whether the chosen experts' weights sum to one (Mixtral, Qwen3-MoE) or stay the
            softmax over all experts.
        router_aux_loss_coefficient: of the load-balancing loss; 0 turns it off. As in megatron-core, it sums
            over all tokens and is divided by those with a label: the more are masked, the more it weighs.
        router_aux_loss_type: "seq_aux_loss" balances each sequence by itself and so depends on no layout;
            "aux_loss" balances a micro-batch, "global_aux_loss" the global batch.
        init_std: standard deviation of the initial weights.
    """

    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    normalization: Normalization
    norm_epsilon: PositiveFloat
    activation: Activation
    qkv_bias: bool
    linear_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    rope_theta: PositiveFloat
    rope_scaling: RopeScaling
    rope_scaling_factor: PositiveFloat
    sliding_window: NonNegativeInt
    sliding_window_layers: tuple[int, ...]
    hidden_dropout: NonNegativeFloat
    attention_dropout: NonNegativeFloat
    num_experts: NonNegativeInt
    experts_per_token: NonNegativeInt
    moe_ffn_hidden_size: NonNegativeInt
    norm_topk_prob: bool
    router_aux_loss_coefficient: NonNegativeFloat
    router_aux_loss_type: AuxLossType
    init_std: PositiveFloat

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate projection beside the up projection."""
        return self.activation in ("swiglu", "geglu")

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together; the values are as wide."""
        return self.num_query_groups * self.head_dim

    @property
    def mlp_size(self) -> int:
        """Inner width of the MLP that a token passes: of one expert in a mixture of experts."""
        return self.moe_ffn_hidden_size if self.num_experts else self.ffn_hidden_size


def architecture_problems(model: Architecture) -> list[str]:
    """Every contradiction between the fields, one sentence each with both numbers and a remedy."""
    return _attention_problems(model) + _expert_problems(model)


def _attention_problems(model: Architecture) -> list[str]:
    problems = []
    if model.num_attention_heads % model.num_query_groups:
        problems.append(
            f"model.num_attention_heads is {model.num_attention_heads} and model.num_query_groups is "
            f"{model.num_query_groups}: the heads must divide evenly over the groups; choose a divisor of "
            f"{model.num_attention_heads}"
        )
    if model.head_dim % 2:
        problems.append(
            f"model.head_dim is {model.head_dim}: rotary embeddings turn pairs of numbers; make it even"
        )
    outside = [i for i in model.sliding_window_layers if not 0 <= i < model.num_layers]
    if outside:
        problems.append(
            f"model.sliding_window_layers names layers {outside}, but the model has layers 0 to "
            f"{model.num_layers - 1}; remove them"
        )
    if model.sliding_window_layers and not model.sliding_window:
        problems.append(
            "model.sliding_window_layers is set and model.sliding_window is 0: give the window's length"
        )
    for key in ("hidden_dropout", "attention_dropout"):
        if getattr(model, key) >= 1:
            problems.append(f"model.{key} is {getattr(model, key)}: a probability below 1 is needed")
    return problems


def _expert_problems(model: Architecture) -> list[str]:
    if not model.num_experts:
        keys = ("experts_per_token", "moe_ffn_hidden_size", "router_aux_loss_coefficient")
        return [
            f"model.{key} is {getattr(model, key)} but model.num_experts is 0: set one, remove the other"
            for key in keys
            if getattr(model, key)
        ]
    problems = []
    if not 1 <= model.experts_per_token <= model.num_experts:
        problems.append(
            f"model.experts_per_token is {model.experts_per_token}: it must lie between 1 and "
            f"model.num_experts, {model.num_experts}"
        )
    if not model.moe_ffn_hidden_size:
        problems.append("model.moe_ffn_hidden_size is 0: give the inner width of one expert")
    if model.linear_bias:
        problems.append(
            "model.linear_bias is true and model.num_experts is set: megatron-core would give the router a "
            "bias as well, which no supported family has; set linear_bias to false (qkv_bias is allowed)"
        )
    if model.experts_per_token == 1 and model.norm_topk_prob:
        problems.append(
            "model.experts_per_token is 1 and model.norm_topk_prob is true: the weight would always be 1 and "
            "the router would get no gradient; set norm_topk_prob to false"
        )
    return problems
