"""Transformer Engine's attention, told the documents of a packed batch.

Transformer Engine knows documents only as one long row of tokens with the places where they begin ("thd").
This module takes the documents as PortableAttention does, rearranges for Transformer Engine and back, and
leaves to the portable module what Transformer Engine cannot do under context parallelism: documents, of which
it wants every single one padded to a multiple of 2 CP, and a sliding window round the ring.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from parallel.attention.mask import PlanCache, document_runs
from parallel.attention.portable import PortableAttention

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


def packed_attention() -> type:
    """The class for the core_attention slot; imports Transformer Engine."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class PackedAttention(TEDotProductAttention):  # type: ignore[misc]
        """TEDotProductAttention whose `attention_mask` is the documents, int [b, s], of whole sequences."""

        def __init__(
            self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, **kwargs: Any
        ) -> None:
            super().__init__(config, layer_number, attn_mask_type, **kwargs)
            self._portable: PortableAttention | None = None
            self._always_portable = False
            if config.context_parallel_size > 1:
                self._portable = PortableAttention(config, layer_number, attn_mask_type, **kwargs)
                ring = self._portable.context_kind == "p2p"
                self._always_portable = ring and self._portable.window is not None

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
            if self._portable is not None and (documents is not None or self._always_portable):
                return self._portable(query, key, value, documents, attn_mask_type)
            if documents is None:
                return super().forward(query, key, value, None, attn_mask_type, **kwargs)
            engine = super().forward

            def attend(q: Tensor, k: Tensor, v: Tensor, packing: PackedSeqParams) -> Tensor:
                return engine(q, k, v, None, attn_mask_type, packed_seq_params=packing)

            return attend_packed(attend, query, key, value, documents)

    return PackedAttention
