"""The rearrangement for Transformer Engine's packed attention, with a plain attention in its place."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from parallel.attention.packed import attend_packed, engine_lacks, pack

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]], dtype=torch.int32)


def test_pack_counts_tokens_over_all_rows() -> None:
    packing = pack(DOCUMENTS, DOCUMENTS.device)
    assert packing.cu_seqlens_q.tolist() == [0, 3, 5, 6, 7, 12]
    assert packing.max_seqlen_q == 5
    assert packing.cu_seqlens_q.dtype == torch.int32


def test_documents_attend_to_themselves_only() -> None:
    query, key, value = torch.randn(3, 6, 2, 4, 8, dtype=torch.float64).unbind(0)

    def attend(q: Tensor, k: Tensor, v: Tensor, packing: PackedSeqParams) -> Tensor:
        bounds = packing.cu_seqlens_q.tolist()
        runs = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        parts = [[x[run].transpose(0, 1) for x in (q, k, v)] for run in runs]
        out = [F.scaled_dot_product_attention(*part, is_causal=True) for part in parts]
        return torch.cat([part.transpose(0, 1) for part in out]).flatten(1)

    got = attend_packed(attend, query, key, value, DOCUMENTS)
    mask = (DOCUMENTS[:, :, None] == DOCUMENTS[:, None, :]).tril()[:, None]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).permute(2, 0, 1, 3).flatten(2)
    torch.testing.assert_close(got, want)  # float64: only the order of sums differs


@pytest.mark.parametrize(
    ("tensor", "context", "kind", "window", "lacks"),
    [
        (1, 1, "p2p", 16, False),
        (1, 2, "p2p", None, False),
        (1, 2, "p2p", 16, True),
        (1, 2, "all_gather", 16, False),
        (1, 4, "a2a", None, False),
        (2, 4, "a2a", None, True),  # 2 key heads on a tensor rank
        (2, 2, "a2a", 16, False),
    ],
)
def test_what_transformer_engine_lacks(
    tensor: int, context: int, kind: str, window: int | None, lacks: bool
) -> None:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=4,
        tensor_model_parallel_size=tensor,
        context_parallel_size=context,
    )
    assert engine_lacks(config, kind, window) == lacks
