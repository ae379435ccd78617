"""The numbers planted in the checkpoint of this folder: whole tensors by their key, without any generator."""

from __future__ import annotations

import math
import zlib

import numpy as np
import numpy.typing as npt

HIDDEN, FFN, HEADS, GROUPS, PADDED_VOCAB, LAYERS = 12, 38, 4, 2, 40, 2
SHAPES = {
    "embedding.word_embeddings.weight": (PADDED_VOCAB, HIDDEN),
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (LAYERS, HIDDEN),
    "decoder.layers.self_attention.linear_qkv.weight": (LAYERS, (HEADS + 2 * GROUPS) * 3, HIDDEN),
    "decoder.layers.self_attention.linear_proj.weight": (LAYERS, HIDDEN, HEADS * 3),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": (LAYERS, HIDDEN),
    "decoder.layers.mlp.linear_fc1.weight": (LAYERS, 2 * FFN, HIDDEN),
    "decoder.layers.mlp.linear_fc2.weight": (LAYERS, HIDDEN, FFN),
    "decoder.final_layernorm.weight": (HIDDEN,),
    "output_layer.weight": (PADDED_VOCAB, HIDDEN),
}
"""Key -> shape of the whole tensor, layers stacked."""
STEP = 5


def value(key: str, state: str) -> npt.NDArray[np.float32]:
    """The whole tensor of "master", "exp_avg" or "exp_avg_sq"; weights are masters in bfloat16."""
    shape = SHAPES[key]
    seed = zlib.crc32(f"{key}/{state}".encode())
    index = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(seed)
    drawn = ((index * np.uint64(2654435761)) % np.uint64(1 << 20)).astype(np.float64) / (1 << 20)
    if state == "master":
        drawn -= 0.5
    return drawn.astype(np.float32).reshape(shape)
