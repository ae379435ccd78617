"""A model in GPT's style (LayerNorm, ungated gelu, biases everywhere) against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.families.batches import packed_batch
from tests.families.cases import DENSE_LAYOUTS
from tests.families.compare import difference, run_engine
from tests.families.reference import Outcome, Tensors, run_documents
from trainer.model.architecture import Architecture
from trainer.model.config import ModelConfig
from trainer.model.parameters import logical_parameters

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=4,
    vocab_size=67,
    normalization="LayerNorm",
    activation="gelu",
    linear_bias=True,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_gpt_computes_what_torch_computes(layout, activation):
    model = MODEL.model_copy(update={"activation": activation}).resolve()
    leaves = _random_weights(model)
    batch = packed_batch(model.vocab_size)
    logits, loss = run_documents(lambda tokens: _forward(model, leaves, tokens), batch)
    loss.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    expected = Outcome(logits.detach(), float(loss.detach()), gradients)
    ranks, degrees = DENSE_LAYOUTS[layout]
    weights = {name: leaf.detach() for name, leaf in leaves.items()}
    found = difference(run_engine(model, degrees, ranks, weights, batch), expected)
    assert found.largest <= 1e-5, found  # float32 sums in another order


def _random_weights(model: Architecture) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    leaves = {}
    for name, shape in logical_parameters(model).items():
        draw = 0.2 * torch.randn(shape, generator=generator)
        leaves[name] = (1 + draw if "norm.weight" in name else draw).requires_grad_()
    return leaves


def _forward(model: Architecture, weights: Tensors, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [1, s, vocab] of one document [1, s]."""
    x = F.embedding(tokens, weights["model.embed_tokens.weight"])
    for layer in range(model.num_layers):
        at = f"model.layers.{layer}."
        x = x + _attention(
            model, weights, at + "self_attn.", _norm(model, weights, at + "input_layernorm", x)
        )
        x = x + _mlp(model, weights, at + "mlp.", _norm(model, weights, at + "post_attention_layernorm", x))
    return _norm(model, weights, "model.norm", x) @ weights["model.embed_tokens.weight"].T


def _linear(weights: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(model: Architecture, weights: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    normed = (x - mean) / (variance + model.norm_epsilon).sqrt()
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _mlp(model: Architecture, weights: Tensors, at: str, x: torch.Tensor) -> torch.Tensor:
    up = _linear(weights, at + "up_proj", x)
    inner = up * _gelu(_linear(weights, at + "gate_proj", x)) if model.gated else _gelu(up)
    return _linear(weights, at + "down_proj", inner)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _attention(model: Architecture, weights: Tensors, at: str, x: torch.Tensor) -> torch.Tensor:
    length = x.shape[1]
    heads = (model.num_attention_heads, model.head_dim)
    q, k, v = (_linear(weights, f"{at}{part}_proj", x).unflatten(-1, heads).transpose(1, 2) for part in "qkv")
    scores = _rotate(model, q) @ _rotate(model, k).transpose(2, 3) / math.sqrt(model.head_dim)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    attended = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    return _linear(weights, at + "o_proj", attended.transpose(1, 2).flatten(2))


def _rotate(model: Architecture, x: torch.Tensor) -> torch.Tensor:
    """RoPE (arXiv 2104.09864) on pairs (i, i + head_dim / 2), as complex numbers."""
    half = model.head_dim // 2
    frequency = model.rope_theta ** (-torch.arange(half) / half)
    angle = torch.arange(x.shape[2])[:, None] * frequency
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)
