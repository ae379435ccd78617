"""The portable norms and attention against Transformer Engine's, and both against plain fp32 arithmetic."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from parallel.attention import PortableAttention
from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh
from parallel.norms import LayerNorm, RMSNorm
from parallel.specs import choose_backend
from tools.gpu.report import Table

# Numbers of 8 bits: inputs and results are rounded once, weights of the softmax in between, each by at most
# 2^-9. A norm adds hardly more; flash attention's gradients are products of several such numbers.
NORM_BOUND, ATTENTION_BOUND = 1e-2, 2e-2


@dataclass(frozen=True)
class Shape:
    """Sizes of the tensors compared."""

    length: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int


FULL = Shape(length=2048, batch=2, heads=32, kv_heads=8, head_dim=128, window=256)
SMALL = Shape(length=96, batch=2, heads=4, kv_heads=2, head_dim=16, window=10)

Results = list[Tensor]  # output, then gradients
Run = Callable[[], dict[str, Results]]  # "portable", "fp32" and, where it is, "Transformer Engine"


def compare_modules(rehearse: bool) -> Table:
    """A row for every module and mask; the largest relative difference of the output and all gradients."""
    mesh = build_mesh(Layout())
    shape = SMALL if rehearse else FULL
    table = Table(
        "Portable modules in bf16: largest relative difference (2-norm) of output and gradients",
        ("module", "found", "allowed", "verdict", "against"),
    )
    for name, bound, run in _cases(mesh, shape):
        try:
            results = run()
        except Exception:
            table.fail(name, traceback.format_exc())
            continue
        for key, other in results.items():
            if key != "portable":
                found = _distance(results["portable"], other)
                table.compare(name, found, bound, key)
        if "Transformer Engine" in results:
            found = _distance(results["Transformer Engine"], results["fp32"])
            table.compare(f"{name}, Transformer Engine's", found, bound, "fp32")
    return table


def _cases(mesh: Mesh, shape: Shape) -> list[tuple[str, float, Run]]:
    masks = {
        "causal": (False, None),
        "documents": (True, None),
        "window": (False, shape.window),
        "documents and window": (True, shape.window),
    }
    norms: list[tuple[str, float, Run]] = [
        (kind, NORM_BOUND, partial(_norms, mesh, shape, kind)) for kind in ("RMSNorm", "LayerNorm")
    ]
    attentions: list[tuple[str, float, Run]] = [
        (f"attention, {name}", ATTENTION_BOUND, partial(_attention, mesh, shape, documents, window))
        for name, (documents, window) in masks.items()
    ]
    return norms + attentions


def _config(shape: Shape, window: int | None = None, **changes: Any) -> TransformerConfig:
    fields: dict[str, Any] = dict(
        num_layers=1,
        hidden_size=shape.heads * shape.head_dim,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        window_size=None if window is None else (window, 0),
    )
    return TransformerConfig(**(fields | changes))


def _norms(mesh: Mesh, shape: Shape, kind: str) -> dict[str, Results]:
    config = _config(shape, normalization=kind)
    x, grad = _random(mesh, [(shape.length, shape.batch, config.hidden_size)] * 2, seed=1)
    weight, bias = _random(mesh, [(config.hidden_size,)] * 2, seed=2)

    def of(norm: Any, dtype: torch.dtype) -> Results:
        parameters = dict(norm.named_parameters())
        for name, value in {"weight": weight, "bias": bias}.items():
            if name in parameters:
                parameters[name].data = value.to(dtype)
        return _differentiate(norm, [x.to(dtype)], grad.to(dtype), list(parameters.values()))

    portable = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[kind]
    results = {
        "portable": of(portable(config, config.hidden_size), torch.bfloat16),
        "fp32": of(_PlainNorm(config.hidden_size, kind).to(mesh.device), torch.float32),
    }
    if choose_backend().kind == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        results["Transformer Engine"] = of(TENorm(config, config.hidden_size), torch.bfloat16)
    return results


class _PlainNorm(torch.nn.Module):
    """Both norms as their papers write them."""

    def __init__(self, size: int, kind: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))
        self.bias = torch.nn.Parameter(torch.zeros(size)) if kind == "LayerNorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return centred * scale * self.weight + self.bias


def _attention(mesh: Mesh, shape: Shape, packed: bool, window: int | None) -> dict[str, Results]:
    config = _config(shape, window)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    shapes = [(shape.length, shape.batch, count, shape.head_dim) for count in heads]
    *qkv, grad = _random(mesh, [*shapes, (shape.length, shape.batch, shape.heads * shape.head_dim)], seed=3)
    documents = _documents(shape) if packed else None
    common: dict[str, Any] = dict(attention_type="self", cp_comm_type="p2p", pg_collection=mesh.groups)

    def of(module: torch.nn.Module) -> Results:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            output: Tensor = module(q, k, v, documents, AttnMaskType.causal)
            return output

        return _differentiate(call, [x.bfloat16() for x in qkv], grad.bfloat16(), [])

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _plain_attention(q, k, v, documents, window)

    results = {
        "portable": of(PortableAttention(config, 1, AttnMaskType.causal, **common)),
        "fp32": _differentiate(plain, qkv, grad, []),
    }
    if choose_backend().kind == "transformer_engine":
        from parallel.attention.packed import packed_attention

        engine = packed_attention()(config, 1, AttnMaskType.causal, **common)
        results["Transformer Engine"] = of(engine.to(mesh.device))
    return results


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, window: int | None
) -> Tensor:
    """Softmax over the whole score matrix of one row after the other, the mask written out."""
    positions = torch.arange(query.size(0), device=query.device)
    distance = positions[:, None] - positions
    seen = (distance >= 0) & (distance <= (query.size(0) if window is None else window))
    rows = []
    for row in range(query.size(1)):
        mask = seen
        if documents is not None:
            document = documents[row].to(query.device)
            mask = seen & (document[:, None] == document)
        q, k, v = (tensor[:, row].transpose(0, 1) for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(q.size(0) // k.size(0), 0) for tensor in (k, v))
        scores = (q @ k.transpose(1, 2) / q.size(-1) ** 0.5).masked_fill(~mask, -torch.inf)
        rows.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.stack(rows, 1)


def _documents(shape: Shape) -> Tensor:
    """Rows of documents with very different lengths, int32 [b, s], on the host."""
    starts = torch.rand(shape.batch, shape.length, generator=torch.Generator().manual_seed(4))
    return (starts < 8 / shape.length).int().cumsum(1).int()


def _random(mesh: Mesh, shapes: Sequence[tuple[int, ...]], *, seed: int) -> list[Tensor]:
    """fp32 numbers that bf16 can hold, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [tensor.bfloat16().float().to(mesh.device) for tensor in drawn]


def _differentiate(
    call: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, parameters: list[Tensor]
) -> Results:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = call(*leaves)
    gradients = torch.autograd.grad(output, [*leaves, *parameters], grad)
    return [output.detach().float(), *(gradient.float() for gradient in gradients)]


def _distance(found: Results, wanted: Results) -> float:
    assert len(found) == len(wanted)
    pairs = zip(found, wanted, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)
