"""From our words to megatron-core's: the TransformerConfig and the arguments of a GPTModel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainer.model.architecture import Architecture
from trainer.precision import FP8, MEGATRON_FP8_RECIPE

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from parallel.layout import Layout

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Execution:
    """How the arithmetic of a model is carried out; what it computes is the architecture's matter.

    Attributes:
        precision: of weights and activations; bf16 keeps fp32 masters.
        fp8: Transformer Engine recipe of the matrix products.
        recompute: activations that the backward pass computes again: none, those of the core attention, or
            everything but each layer's input (arXiv 2205.05198).
        cuda: there is a GPU, so fused kernels pay.
        transformer_engine: its modules are used.
        deterministic: only kernels that give the same bits twice.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    fp8: FP8 = "off"
    recompute: Recompute = "none"
    cuda: bool = False
    transformer_engine: bool = False
    deterministic: bool = False


@dataclass(frozen=True)
class GPTArguments:
    """Keyword arguments of megatron-core's GPTModel beside config and spec.

    `vocab_size` is padded: the logits past the architecture's vocab_size mean no token and must not enter
    the softmax, or the loss would depend on the layout.
    """

    vocab_size: int
    max_sequence_length: int
    share_embeddings_and_output_weights: bool
    rotary_base: float
    rope_scaling: bool
    rope_scaling_factor: float
    position_embedding_type: str = "rope"


def padded_vocab_size(vocab_size: int, tensor: int, *, cuda: bool) -> int:
    """Rows of the embedding so that `tensor` ranks have equal shares.

    On a GPU each share is a multiple of 128, as tensor cores like it (Megatron-LM's
    make-vocab-size-divisible-by); elsewhere padding would only cost.
    """
    multiple = tensor * (128 if cuda else 1)
    return -(-vocab_size // multiple) * multiple


def gpt_arguments(
    model: Architecture, layout: Layout, execution: Execution, *, sequence_length: int | None = None
) -> GPTArguments:
    """Arguments of GPTModel. RoPE is computed to `sequence_length`, by default max_position_embeddings."""
    return GPTArguments(
        vocab_size=padded_vocab_size(model.vocab_size, layout.tensor, cuda=execution.cuda),
        max_sequence_length=sequence_length or model.max_position_embeddings,
        share_embeddings_and_output_weights=model.tie_word_embeddings,
        rotary_base=model.rope_theta,
        rope_scaling=model.rope_scaling == "llama3",
        rope_scaling_factor=model.rope_scaling_factor,
    )


def transformer_config(model: Architecture, layout: Layout, execution: Execution) -> TransformerConfig:
    """megatron-core's configuration of `model` under `layout`.

    The loss function must return (sum, number of tokens, report): `calculate_per_token_loss` is on, so that
    gradients are divided once, by the tokens of the whole mesh.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        **_architecture(model, cuda=execution.cuda),
        **_experts(model, execution),
        **_layout(layout),
        **_execution(execution),
        calculate_per_token_loss=True,
        transformer_impl="transformer_engine" if execution.transformer_engine else "local",
        cp_comm_type=layout.context_kind,
    )


def _architecture(model: Architecture, *, cuda: bool) -> dict[str, Any]:
    import torch.nn.functional as F

    window: dict[str, Any] = {}
    if model.sliding_window:
        # megatron-core counts the tokens to the left of the query, Hugging Face counts the query as well.
        window["window_size"] = (model.sliding_window - 1, 0)
        windowed = [int(i in model.sliding_window_layers) for i in range(model.num_layers)]
        window["window_attn_skip_freq"] = None if all(windowed) else windowed
    return window | dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_norm,
        add_bias_linear=model.linear_bias,
        add_qkv_bias=model.qkv_bias,
        gated_linear_unit=model.gated,
        activation_func=F.silu if model.activation == "swiglu" else F.gelu,
        # megatron-core compiles the fused activation for GPUs, and an ungated one only with a bias.
        bias_activation_fusion=cuda and (model.gated or model.linear_bias),
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_std,
    )


def _experts(model: Architecture, execution: Execution) -> dict[str, Any]:
    """The router's softmax over the chosen logits equals the softmax over all, chosen, then normalised.

    So `norm_topk_prob` (Mixtral, Qwen3-MoE) is megatron-core's default, and without it the softmax comes
    before the choice (`moe_router_pre_softmax`).
    """
    if not model.num_experts:
        return {}
    balanced = model.router_aux_loss_coefficient > 0
    return dict(
        num_moe_experts=model.num_experts,
        moe_router_topk=model.experts_per_token,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_router_pre_softmax=not model.norm_topk_prob,
        moe_router_load_balancing_type=model.router_aux_loss_type if balanced else "none",
        moe_aux_loss_coeff=model.router_aux_loss_coefficient,
        moe_router_dtype="fp32",
        moe_grouped_gemm=execution.transformer_engine,
        # all-to-all sends each token only where it is needed; on a CPU its index arithmetic costs more.
        moe_token_dispatcher_type="alltoall" if execution.cuda else "allgather",
    )


def _layout(layout: Layout) -> dict[str, Any]:
    # Interleaved with two stages, the batched messages between the same two ranks would be swapped.
    interleaved = layout.virtual_pipeline is not None
    return dict(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        sequence_parallel=layout.sequence_parallel,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        variable_seq_lengths=False,
    )


def _execution(execution: Execution) -> dict[str, Any]:
    import torch

    dtype = torch.bfloat16 if execution.precision == "bf16" else torch.float32
    settings: dict[str, Any] = dict(
        bf16=execution.precision == "bf16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        deterministic_mode=execution.deterministic,
        # Fusions are compiled for GPUs; the last two need Apex or a fixed set of hidden sizes.
        bias_dropout_fusion=execution.cuda,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    if execution.recompute == "full":
        settings |= dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif execution.recompute == "selective":
        settings |= dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    if execution.fp8 != "off":
        settings |= dict(fp8="hybrid", fp8_recipe=MEGATRON_FP8_RECIPE[execution.fp8])
        # "delayed" as Megatron-LM's recipes for H100 have it; megatron-core's default looks back one step.
        settings |= dict(fp8_amax_history_len=1024, fp8_amax_compute_algo="max")
    return settings
