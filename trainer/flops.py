"""Training FLOPs in three honest counts, the formula in words, and the peak that MFU divides by.

Only matrix products count, a multiply-add as two: six FLOPs per token and matrix parameter (two forward, four
backward), and per layer twelve per query-key pair and number in the query heads (scores and weighted sum,
forward and backward). So Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, appendix B) have it, and Narayanan et
al. 2021 (arXiv 2104.04473, appendix), who add the activations computed again, which here are no progress.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.model.architecture import Architecture
from trainer.model.parameters import EMBEDDING, is_expert, logical_parameters

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Flops:
    """Training FLOPs of the same tokens, counted three ways; they differ in the query-key pairs alone.

    Attributes:
        causal: each token sees itself and what precedes it in its sequence.
        full: each token sees its whole sequence, as PaLM's MFU and most published ones count.
        packed: each token sees itself and what precedes it in its own document: what is really needed.
    """

    causal: float
    full: float
    packed: float


@functools.cache
def matrix_parameters(model: Architecture) -> int:
    """Elements of the matrices that a token is multiplied by: its experts, the output layer, no embedding."""
    total = 0.0
    for name, shape in logical_parameters(model).items():
        if len(shape) == 2 and name != EMBEDDING:
            share = model.experts_per_token / model.num_experts if is_expert(name) else 1
            total += math.prod(shape) * share
    tied = model.tie_word_embeddings
    return round(total) + (model.vocab_size * model.hidden_size if tied else 0)


def training_flops(
    model: Architecture, sequence_length: int, sequences: int, *, positions: torch.Tensor | None = None
) -> Flops:
    """FLOPs of one forward and backward over `sequences` sequences, by the whole mesh together.

    Args:
        positions: integer [sequences, sequence_length], of each token in its document, from 0; without it
            every sequence is one document.
    """
    tokens = sequences * sequence_length
    linear = 6.0 * matrix_parameters(model) * tokens
    per_pair = 12.0 * model.query_size
    windows = _windows(model)
    causal = sum(layers * sequences * causal_pairs(sequence_length, window) for window, layers in windows)
    full = sum(layers * tokens * min(sequence_length, window or tokens) for window, layers in windows)
    packed = causal
    if positions is not None:
        packed = sum(layers * packed_pairs(positions, window) for window, layers in windows)
    return Flops(linear + per_pair * causal, linear + per_pair * full, linear + per_pair * packed)


def causal_pairs(length: int, window: int = 0) -> int:
    """Query-key pairs of one document under a causal mask: the sum of min(i + 1, window) over its tokens."""
    seen = min(length, window) if window else length
    return seen * (seen + 1) // 2 + (length - seen) * seen


def packed_pairs(positions: torch.Tensor, window: int = 0) -> int:
    """Query-key pairs of packed documents: of every document about half of its length squared."""
    seen = positions.long() + 1
    return int((seen.clamp(max=window) if window else seen).sum())


def describe_flops(model: Architecture, sequence_length: int) -> str:
    """The formula with this model's numbers, in two lines for the log."""
    one = training_flops(model, sequence_length, 1)
    window = f", at most {model.sliding_window:,} keys a query" if model.sliding_window else ""
    return (
        f"training FLOPs = 6 x {matrix_parameters(model):,} matrix parameters x tokens + 12 x "
        f"{model.query_size:,} x query-key pairs x {model.num_layers} layers (arXiv 2204.02311, 2104.04473)\n"
        f"a sequence of s = {sequence_length:,}: causal {one.causal:.4g} (pairs s(s+1)/2), full "
        f"{one.full:.4g} (s^2), packed: sum of len(len+1)/2 over its documents{window}"
    )


def _windows(model: Architecture) -> list[tuple[int, int]]:
    """(window, number of layers that have it); 0 is no window."""
    windowed = len(model.sliding_window_layers)
    return [(model.sliding_window, windowed), (0, model.num_layers - windowed)]
