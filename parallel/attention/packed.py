"""Transformer Engine's attention, told the documents of a packed batch.

Transformer Engine knows documents only as one long row of tokens with the places where they begin ("thd").
This module takes the documents as PortableAttention does, rearranges for Transformer Engine and back, and
leaves to the portable module what Transformer Engine cannot do under context parallelism: documents, of which
it wants every single one padded to a multiple of 2 CP, a sliding window round the ring, and the heads of keys
dealt out to more ranks than there are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from parallel.attention.mask import PlanCache, document_runs
from parallel.attention.portable import PortableAttention, layer_context_kind, layer_window

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

_packings: PlanCache[PackedSeqParams] = PlanCache()


def pack(documents: Tensor, device: torch.device) -> PackedSeqParams:
    """Where the documents of a batch begin when its rows lie one after the other.

    Args:
        documents: int [b, s], each document one run of equal numbers; best on the host.
        device: where attention is computed.
    """

    def build() -> PackedSeqParams:
        length = documents.size(1)
        ends = [row * length + end for row, runs in enumerate(document_runs(documents)) for _, end in runs]
        bounds = [0, *ends]
        starts = torch.tensor(bounds, dtype=torch.int32, device=device)
        longest = max(end - start for start, end in itertools.pairwise(bounds))
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    return _packings.get(documents, device, build)


def attend_packed(
    attend: Callable[[Tensor, Tensor, Tensor, PackedSeqParams], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Tensor,
) -> Tensor:
    """Give `attend` the batch as one row of tokens, [b s, heads, head_dim], and put its result back.

    Args:
        query, key, value: [s, b, heads, head_dim].

    Returns:
        [s, b, heads x head_dim]
    """
    length, rows = query.shape[:2]
    q, k, v = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
    output = attend(q, k, v, pack(documents, query.device))
    return output.reshape(rows, length, -1).transpose(0, 1).contiguous()


def engine_lacks(config: TransformerConfig, kind: str, window: int | None) -> bool:
    """Whether Transformer Engine cannot run a layer under context parallelism, even without documents.

    Args:
        config: of the model.
        kind: of context parallelism in this layer.
        window: tokens a query of this layer sees before itself; None is no limit.
    """
    if config.context_parallel_size == 1:
        return False
    if kind == "a2a":
        key_heads = (
            config.num_query_groups or config.num_attention_heads
        ) // config.tensor_model_parallel_size
        return key_heads % config.context_parallel_size != 0
    return kind == "p2p" and window is not None


def packed_attention() -> type:
    """The class for the core_attention slot; imports Transformer Engine."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class PackedAttention(TEDotProductAttention):  # type: ignore[misc]
        """TEDotProductAttention whose `attention_mask` is the documents, int [b, s], of whole sequences."""

        def __init__(
            self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, **kwargs: Any
        ) -> None:
            super().__init__(config, layer_number, attn_mask_type, **kwargs)
            self._context_parallel = config.context_parallel_size > 1
            kind = kwargs.get("cp_comm_type") or layer_context_kind(config, layer_number)
            self._always_portable = engine_lacks(config, kind, layer_window(config, layer_number))
            self._build_portable = functools.partial(
                PortableAttention, config, layer_number, attn_mask_type, **kwargs
            )
            # Not before it is needed: it refuses what Transformer Engine can do alone, such as dropout.
            self._portable = self._build_portable() if self._always_portable else None

        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            attn_mask_type: AttnMaskType,
            **kwargs: Any,
        ) -> Tensor:
            documents = attention_mask
            if self._always_portable or (self._context_parallel and documents is not None):
                self._portable = self._portable or self._build_portable()
                return self._portable(query, key, value, documents, attn_mask_type)
            if documents is None:
                return super().forward(query, key, value, None, attn_mask_type, **kwargs)
            engine = super().forward

            def attend(q: Tensor, k: Tensor, v: Tensor, packing: PackedSeqParams) -> Tensor:
                return engine(q, k, v, None, attn_mask_type, packed_seq_params=packing)

            return attend_packed(attend, query, key, value, documents)

    return PackedAttention
