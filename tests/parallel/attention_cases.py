"""A dense attention to compare with, and batches to compare on."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from parallel.attention import PortableAttention
from parallel.context import context_slice

LENGTH, BATCH, HEAD_DIM = 96, 3, 8


@dataclass(frozen=True)
class Case:
    """One mask over one arrangement of heads."""

    documents: bool = False
    window: int | None = None
    heads: int = 8
    kv_heads: int = 2


MASKS = {
    "causal": Case(),
    "documents": Case(documents=True),
    "window": Case(window=10),
    "documents and window": Case(documents=True, window=10),
}


def oracle(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, window: int | None) -> Tensor:
    """Softmax over the whole score matrix with the mask written out."""
    groups = query.size(2) // key.size(2)
    key, value = (tensor.repeat_interleave(groups, 2) for tensor in (key, value))
    scores = torch.einsum("ibhd,jbhd->bhij", query, key) / query.size(3) ** 0.5
    i, j = torch.arange(query.size(0))[:, None], torch.arange(query.size(0))
    hidden = (j > i) | (i - j > (query.size(0) if window is None else window))
    if documents is not None:
        hidden = hidden | (documents[:, :, None] != documents[:, None, :])[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhij,jbhd->ibhd", weights, value).flatten(2)


def ragged_documents() -> Tensor:
    """Rows with documents of very different lengths: one token, across chunks, the whole row."""
    runs = [[1, 40, 7, 2, 46], [30, 30, 30, 6], [LENGTH]]
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in runs]
    return torch.stack(rows).int()


def inputs(case: Case, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Query, key and value of the whole sequence; the gradient of the output; the documents."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(LENGTH, BATCH, heads, HEAD_DIM) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    grad = torch.randn(LENGTH, BATCH, case.heads * HEAD_DIM, generator=generator).to(dtype)
    return drawn, grad, ragged_documents() if case.documents else None


def build(case: Case, kind: str = "all_gather", layer: int = 1, **changes: object) -> PortableAttention:
    """The module of this rank, all ranks being context-parallel."""
    ranks = range(dist.get_world_size())
    alone = [dist.new_group([rank]) for rank in ranks][dist.get_rank()]
    fields = {
        "num_layers": 1,
        "hidden_size": case.heads * HEAD_DIM,
        "num_attention_heads": case.heads,
        "num_query_groups": case.kv_heads,
        "attention_dropout": 0.0,
        "window_size": None if case.window is None else (case.window, 0),
    }
    config = TransformerConfig(**{**fields, **changes})
    groups = SimpleNamespace(tp=alone, cp=dist.group.WORLD)
    return PortableAttention(
        config, layer, AttnMaskType.causal, "self", cp_comm_type=kind, pg_collection=groups
    )


def errors(case: Case, kind: str, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Largest errors of this rank's output and gradients, relative to the largest value of each."""
    whole, grad, documents = inputs(case, dtype)
    exact = [tensor.double().clone().requires_grad_() for tensor in whole]
    expected = oracle(*exact, documents, case.window)
    expected.backward(grad.double())
    rank, size = dist.get_rank(), dist.get_world_size()
    local = [context_slice(tensor, 0, rank, size).clone().requires_grad_() for tensor in whole]
    output = build(case, kind)(*local, documents, attn_mask_type=AttnMaskType.causal)
    output.backward(context_slice(grad, 0, rank, size))
    found = [output, *(tensor.grad for tensor in local)]
    wanted = [expected, *(tensor.grad for tensor in exact)]
    return {
        name: float((a - context_slice(b, 0, rank, size)).abs().max() / b.abs().max())
        for name, a, b in zip(("output", "dq", "dk", "dv"), found, wanted, strict=True)
    }
