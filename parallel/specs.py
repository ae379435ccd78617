"""The modules of a transformer layer: Transformer Engine's where it is, portable ones elsewhere."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from parallel.attention import PortableAttention
from parallel.norms import LayerNorm, RMSNorm
from parallel.router import Router


@dataclass(frozen=True)
class Backend:
    """The modules in use, and why."""

    kind: Literal["transformer_engine", "portable"]
    reason: str


def choose_backend(*, portable: bool = False, fp32: bool = False) -> Backend:
    """Transformer Engine where CUDA and it are present, the portable modules elsewhere or when asked for.

    Args:
        fp32: weights and activations are float32, which Transformer Engine would multiply with less.
    """
    if not torch.cuda.is_available():
        return Backend("portable", "torch sees no CUDA device")
    if importlib.util.find_spec("transformer_engine") is None:
        return Backend("portable", "Transformer Engine is not installed; pip install 'ratoon[gpu]' adds it")
    if fp32:
        return Backend("portable", "Transformer Engine multiplies float32 in TF32, torch in full")
    if portable:
        return Backend("portable", "asked for")
    return Backend("transformer_engine", "CUDA and Transformer Engine are present")


class PortableSpecProvider(LocalSpecProvider):
    """megatron-core's own linear layers, with norms and attention that run in every layout."""

    def __init__(self, normalization: str) -> None:
        self._norm = RMSNorm if normalization == "RMSNorm" else LayerNorm

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return self._norm

    def core_attention(self) -> type:
        return PortableAttention


def block_spec(
    config: TransformerConfig, backend: Backend, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers that this rank builds for one model chunk, and the norm after the last."""
    if backend.kind == "transformer_engine":
        layer = _engine_layer(config)
        from megatron.core.extensions.transformer_engine import TENorm

        norm: Any = TENorm
    else:
        provider = PortableSpecProvider(config.normalization)
        layer, norm = _portable_layer(config, provider), provider.layer_norm()
    if config.num_moe_experts:
        layer.submodules.mlp.submodules.router = Router
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


def _engine_layer(config: TransformerConfig) -> ModuleSpec:
    """Transformer Engine's layer, with its attention told the documents of a packed sequence."""
    from parallel.attention.packed import packed_attention

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    spec.submodules.self_attention.submodules.core_attention = packed_attention()
    return spec


def _portable_layer(config: TransformerConfig, provider: PortableSpecProvider) -> ModuleSpec:
    norm = provider.layer_norm()
    qk_norm = norm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec_for_backend(
                provider, num_experts=config.num_moe_experts, moe_grouped_gemm=False
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
