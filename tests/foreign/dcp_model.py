"""The oracle's model as users of FSDP have it: transformers' Llama, or a module with torchtitan's names."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from tests.foreign.oracle import Oracle
from tests.foreign.parameters import Parameters

_TITAN = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
"""Logical name, or what follows the layer's number in it -> torchtitan's word."""


@dataclass(frozen=True)
class Names:
    """How a model's parameters are called, and how they lie, against the logical ones."""

    oracle: Oracle
    titan: bool = False

    def of(self, logical: str) -> str:
        if not self.titan:
            return logical
        if logical in _TITAN:
            return _TITAN[logical]
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", logical)
        assert match, logical
        return f"layers.{match[1]}.{_TITAN[match[2]]}.weight"

    def logical(self) -> dict[str, str]:
        """The model's name -> the logical one."""
        return {self.of(logical): logical for logical in self.oracle.shapes()}

    def stored(self, logical: str, tensor: torch.Tensor) -> torch.Tensor:
        """A logical tensor as the model holds it: torchtitan has rotary pairs side by side."""
        if not self._rotary(logical):
            return tensor
        dim = self.oracle.architecture().head_dim
        halves = tensor.reshape(-1, 2, dim // 2, tensor.shape[1])
        return halves.transpose(1, 2).reshape(tensor.shape).contiguous()

    def from_stored(self, logical: str, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of `stored`."""
        if not self._rotary(logical):
            return tensor
        dim = self.oracle.architecture().head_dim
        pairs = tensor.reshape(-1, dim // 2, 2, tensor.shape[1])
        return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()

    def value(self, name: str, state: str) -> torch.Tensor:
        """What the model's parameter `name` holds."""
        logical = self.logical()[name]
        return self.stored(logical, self.oracle.value(logical, state))

    def _rotary(self, logical: str) -> bool:
        return self.titan and bool(re.search(r"\.[qk]_proj\.", logical))


def build_model(oracle: Oracle, titan: bool) -> nn.Module:
    """A model of the oracle's sizes in fp32, which is the precision of FSDP's sharded parameters."""
    torch.manual_seed(1)
    if titan:
        return TitanLlama(oracle)
    if oracle.experts:  # of which transformers makes one tensor, and names it otherwise
        return Parameters({name: torch.zeros(shape) for name, shape in oracle.shapes().items()})
    config = transformers.LlamaConfig(**oracle.huggingface_config(), attn_implementation="eager")
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


class TitanLlama(nn.Module):
    """Parameters with torchtitan's names and places; it is never run, only wrapped, saved and stepped."""

    def __init__(self, oracle: Oracle) -> None:
        super().__init__()
        model = oracle.architecture()
        self.tok_embeddings = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleDict({str(n): TitanLayer(oracle) for n in range(model.num_layers)})
        self.norm = nn.RMSNorm(model.hidden_size)
        self.output = nn.Linear(model.hidden_size, model.vocab_size, bias=False)


class TitanLayer(nn.Module):
    def __init__(self, oracle: Oracle) -> None:
        super().__init__()
        model = oracle.architecture()
        hidden, ffn = model.hidden_size, model.ffn_hidden_size
        queries, keys = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
        self.attention = nn.ModuleDict(
            {
                "wq": nn.Linear(hidden, queries, bias=False),
                "wk": nn.Linear(hidden, keys, bias=False),
                "wv": nn.Linear(hidden, keys, bias=False),
                "wo": nn.Linear(queries, hidden, bias=False),
            }
        )
        self.feed_forward = nn.ModuleDict(
            {
                "w1": nn.Linear(hidden, ffn, bias=False),
                "w2": nn.Linear(ffn, hidden, bias=False),
                "w3": nn.Linear(hidden, ffn, bias=False),
            }
        )
        self.attention_norm = nn.RMSNorm(hidden)
        self.ffn_norm = nn.RMSNorm(hidden)
