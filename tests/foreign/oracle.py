"""The model whose every number is known: what each trainer's genuine checkpoint of it must hold.

Sizes are awkward on purpose: the vocabulary is odd and gets padded, GQA has half as many key heads, a
hidden size of 192 makes megatron-core pad its buckets, and no dimension divides by 3 data ranks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from trainer.model.architecture import Architecture
from trainer.model.parameters import logical_parameters

STATES = ("weight", "master", "exp_avg", "exp_avg_sq")
STEP = 7
"""Optimizer updates that every checkpoint of the oracle says were made."""
LR = 1.25e-3
BETAS = (0.9, 0.95)
EPS = 1e-8
WEIGHT_DECAY = 0.1
"""Of matrices and embeddings; vectors (norms, biases) have none: two parameter groups."""


@dataclass(frozen=True)
class Oracle:
    """A model with planted weights, masters and moments.

    Attributes:
        precision: "fp32", where the weight is the master, or "bf16".
    """

    hidden: int = 192
    tied: bool = False
    experts: int = 0
    precision: str = "fp32"
    layers: int = 4
    vocab: int = 4099

    def architecture(self) -> Architecture:
        """As `[model]` resolves to it. Dense: Llama's names; with experts: Qwen3-MoE's, QK norms included."""
        return Architecture(
            num_layers=self.layers,
            hidden_size=self.hidden,
            ffn_hidden_size=328,
            num_attention_heads=8,
            num_query_groups=4,
            head_dim=self.hidden // 8,
            vocab_size=self.vocab,
            max_position_embeddings=256,
            normalization="RMSNorm",
            norm_epsilon=1e-5,
            activation="swiglu",
            qkv_bias=False,
            linear_bias=False,
            qk_norm=bool(self.experts),
            tie_word_embeddings=self.tied,
            rope_theta=10000.0,
            rope_scaling="none",
            rope_scaling_factor=8.0,
            sliding_window=0,
            sliding_window_layers=(),
            hidden_dropout=0.0,
            attention_dropout=0.0,
            num_experts=self.experts,
            experts_per_token=2 if self.experts else 0,
            moe_ffn_hidden_size=72 if self.experts else 0,
            norm_topk_prob=True,
            router_aux_loss_coefficient=0.0,
            router_aux_loss_type="seq_aux_loss",
            init_std=0.02,
        )

    def huggingface_config(self) -> dict[str, Any]:
        """Keyword arguments of transformers' LlamaConfig, or of Qwen3MoeConfig with experts."""
        model = self.architecture()
        config: dict[str, Any] = {
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_query_groups,
            "head_dim": model.head_dim,
            "vocab_size": model.vocab_size,
            "max_position_embeddings": model.max_position_embeddings,
            "rms_norm_eps": model.norm_epsilon,
            "tie_word_embeddings": model.tie_word_embeddings,
        }
        if self.experts:
            config |= {
                "num_experts": model.num_experts,
                "num_experts_per_tok": model.experts_per_token,
                "moe_intermediate_size": model.moe_ffn_hidden_size,
                "norm_topk_prob": True,
            }
        return config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical name -> shape."""
        return logical_parameters(self.architecture())

    def value(self, name: str, state: str) -> torch.Tensor:
        """The whole tensor, row-major; fp32, except that a weight has the oracle's precision."""
        shape = self.shapes()[name]
        if state == "weight":
            master = self.value(name, "master")
            return master.bfloat16() if self.precision == "bf16" else master
        digest = hashlib.blake2b(f"{name}/{state}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        drawn = torch.randn(shape, generator=generator)
        if state == "master":
            return 1 + 0.1 * drawn if len(shape) == 1 else 0.05 * drawn
        if state == "exp_avg":
            return 1e-3 * drawn
        if state == "exp_avg_sq":
            return 1e-6 * drawn.square() + 1e-9
        if state == "grad":
            return 1e-2 * drawn
        raise KeyError(state)

    def weight_decay(self, name: str) -> float:
        return WEIGHT_DECAY if len(self.shapes()[name]) > 1 else 0.0

    def stepped(self, name: str) -> dict[str, torch.Tensor]:
        """Master and moments after one more AdamW update (arXiv 1711.05101) with the `grad` value."""
        master, grad = self.value(name, "master"), self.value(name, "grad")
        parameter = torch.nn.Parameter(master.clone())
        parameter.grad = grad
        optimizer = torch.optim.AdamW(
            [parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=self.weight_decay(name), foreach=False
        )
        optimizer.state[parameter] = {
            "step": torch.tensor(float(STEP)),
            "exp_avg": self.value(name, "exp_avg"),
            "exp_avg_sq": self.value(name, "exp_avg_sq"),
        }
        optimizer.step()
        state = optimizer.state[parameter]
        return {"master": parameter.data, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
