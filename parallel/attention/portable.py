"""Core attention for megatron-core's layer specs without Transformer Engine, on CPU and CUDA."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from parallel.attention.exchange import (
    gather_sequence,
    heads_to_sequence,
    replicate_key_heads,
    sequence_to_heads,
)
from parallel.attention.ring import ring_attention
from parallel.attention.tiles import attend_tiles, plan_tiles
from parallel.context import context_spans
from parallel.layout import context_kind_problem

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer import TransformerConfig

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class PortableAttention(MegatronModule):
    """Causal softmax attention: grouped heads, packed documents, sliding window, context parallelism.

    It takes the place of megatron-core's DotProductAttention and TEDotProductAttention and is built and
    called like them, but for one argument: `attention_mask` carries the documents of the batch.

    The kinds of context parallelism: "all_gather" gathers keys and values; "p2p" sends them round a ring;
    "a2a" trades sequence for heads. All three compute the same numbers.

    Raises:
        ValueError: for what this module does not do (all of it at once).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.context_group: dist.ProcessGroup = pg_collection.cp
        self.context_kind = cp_comm_type or layer_context_kind(config, layer_number)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.window = layer_window(config, layer_number)
        query_heads = max(1, config.num_attention_heads // pg_collection.tp.size())
        problems = self._problems(attn_mask_type, attention_type, query_heads)
        if problems:
            raise ValueError(f"attention of layer {layer_number}: " + "; ".join(problems))

    def _problems(self, mask_type: AttnMaskType, attention_type: str, query_heads: int) -> list[str]:
        cp = self.context_group.size()
        problems = []
        if mask_type not in _CAUSAL or attention_type != "self":
            problems.append(
                f"{attention_type} attention with mask {mask_type.name}, and only causal self-attention is "
                "available without Transformer Engine"
            )
        if self.config.softmax_type != "vanilla":
            problems.append(f'softmax_type is "{self.config.softmax_type}", expected "vanilla"')
        if problem := context_kind_problem(self.context_kind, query_heads, cp):
            problems.append(problem)
        if cp > 1 and self.dropout > 0:
            problems.append(
                f"attention_dropout is {self.dropout} with context parallelism {cp}: set it to 0, for the "
                "kinds of context parallelism would draw different masks"
            )
        return problems

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s/cp, b, heads/tp, head_dim], this rank's zig-zag slice of the sequence.
            key: [s/cp, b, kv_heads/tp, head_dim].
            value: [s/cp, b, kv_heads/tp, head_dim].
            attention_mask: the documents, int [b, s], over the *whole* sequence: each document is one run of
                equal numbers. None is one document a row.
            attn_mask_type: causal, whatever else the layer was built with.
            attention_bias: must be None.
            packed_seq_params: must be None; packing is told by the documents.

        Returns:
            [s/cp, b, heads/tp * head_dim]

        Raises:
            ValueError: for arguments that this module does not take.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("attention_bias and packed_seq_params are not taken: give the documents [b, s]")
        if attn_mask_type not in (None, *_CAUSAL) or query.size(0) != key.size(0):
            raise ValueError(
                f"mask {attn_mask_type}, {query.size(0)} queries and {key.size(0)} keys: without Transformer "
                "Engine there is no generation, only causal attention of a sequence to itself"
            )
        length = query.size(0) * self.context_group.size()
        if attention_mask is not None and attention_mask.shape != (query.size(1), length):
            raise ValueError(
                f"documents have shape {tuple(attention_mask.shape)}, expected [batch, whole sequence] = "
                f"{(query.size(1), length)}"
            )
        window = None if self.window is None or self.window >= length - 1 else self.window
        if self.context_group.size() == 1:
            output = self._attend_alone(query, key, value, attention_mask, window)
        else:
            attend = {
                "all_gather": self._attend_gathered,
                "p2p": self._attend_ring,
                "a2a": self._attend_heads,
            }
            output = attend[self.context_kind](query, key, value, attention_mask, window)
        return output.flatten(2)

    def _attend_alone(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, window: int | None
    ) -> Tensor:
        plan = plan_tiles(documents, ((0, query.size(0)),), window, query.device)
        dropout = self.dropout if self.training else 0.0
        # As in megatron-core: without sequence parallelism, ranks must drop differently over their own heads.
        own_stream = dropout > 0 and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if own_stream else nullcontext():
            return attend_tiles(query, key, value, plan, scale=self.scale, dropout=dropout)

    def _attend_gathered(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, window: int | None
    ) -> Tensor:
        group = self.context_group
        spans = context_spans(query.size(0) * group.size(), group.rank(), group.size())
        plan = plan_tiles(documents, spans, window, query.device)
        key, value = gather_sequence(torch.stack((key, value), dim=1), group).unbind(1)
        return attend_tiles(query, key, value, plan, scale=self.scale)

    def _attend_ring(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, window: int | None
    ) -> Tensor:
        return ring_attention(
            query, key, value, documents, group=self.context_group, scale=self.scale, window=window
        )

    def _attend_heads(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, window: int | None
    ) -> Tensor:
        group = self.context_group
        key, value = (replicate_key_heads(tensor, group.size()) for tensor in (key, value))
        query, key, value = (sequence_to_heads(tensor, group) for tensor in (query, key, value))
        plan = plan_tiles(documents, ((0, query.size(0)),), window, query.device)
        return heads_to_sequence(attend_tiles(query, key, value, plan, scale=self.scale), group)


def layer_context_kind(config: TransformerConfig, layer_number: int) -> str:
    """The kind for a layer (from 1) whose builder named none; the ring is Transformer Engine's default."""
    kind = config.cp_comm_type or "p2p"
    return kind if isinstance(kind, str) else kind[layer_number - 1]


def layer_window(config: TransformerConfig, layer_number: int) -> int | None:
    """Tokens that a query of this layer (from 1) sees before itself; None is no limit."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    left = config.window_size[0]
    return left if left >= 0 else None
