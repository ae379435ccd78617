"""The numbers planted in the checkpoint of this folder, by logical names, as an oracle of its own."""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.foreign.model_space.values import FFN, GROUPS, HEADS, HIDDEN, LAYERS, PADDED_VOCAB, STEP, value
from tests.foreign.oracle import Oracle
from trainer.model.architecture import Architecture

HEAD_DIM = 3
SETTINGS = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1, "step": STEP}
SETTINGS["decays_vectors"] = True
"""Of megatron-core 0.13's OptimizerConfig, of which `make` gives lr and weight decay. Without Megatron-LM's
scheduler nobody multiplies the decay of a group by its `wd_mult`."""
_KEYS = {
    "model.embed_tokens": "embedding.word_embeddings",
    "model.norm": "decoder.final_layernorm",
    "lm_head": "output_layer",
}
_LAYER_KEYS = {
    "input_layernorm": "self_attention.linear_qkv.layer_norm_",
    "post_attention_layernorm": "mlp.linear_fc1.layer_norm_",
    "self_attn.o_proj": "self_attention.linear_proj.",
    "mlp.down_proj": "mlp.linear_fc2.",
}


@dataclass(frozen=True)
class ModelSpaceOracle(Oracle):
    """Sizes and values of `make`, which has no padding rows: the vocabulary is the padded one."""

    hidden: int = HIDDEN
    precision: str = "bf16"
    layers: int = LAYERS
    vocab: int = PADDED_VOCAB

    def architecture(self) -> Architecture:
        sizes = {"ffn_hidden_size": FFN, "num_attention_heads": HEADS, "num_query_groups": GROUPS}
        return super().architecture().model_copy(update={**sizes, "head_dim": HEAD_DIM})

    def value(self, name: str, state: str) -> torch.Tensor:
        if state == "weight":
            return self.value(name, "master").bfloat16()
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
        if match is None:
            return torch.from_numpy(value(_KEYS[name.removesuffix(".weight")] + ".weight", state))
        return _of_layer(int(match[1]), match[2], state).contiguous()


def unpack(folder: Path) -> Path:
    """The checkpoint itself; returns `folder`."""
    with tarfile.open(Path(__file__).parent / "checkpoint.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def _of_layer(layer: int, word: str, state: str) -> torch.Tensor:
    """megatron-core has [queries of a group, its key, its value] for each group, and gate above up."""
    if word in _LAYER_KEYS:
        return torch.from_numpy(value(f"decoder.layers.{_LAYER_KEYS[word]}weight", state))[layer]
    if word.startswith("mlp."):
        both = torch.from_numpy(value("decoder.layers.mlp.linear_fc1.weight", state))[layer]
        return both.chunk(2)[word == "mlp.up_proj"]
    fused = torch.from_numpy(value("decoder.layers.self_attention.linear_qkv.weight", state))[layer]
    queries = HEADS // GROUPS * HEAD_DIM
    widths = [queries, HEAD_DIM, HEAD_DIM]
    parts = fused.view(GROUPS, -1, HIDDEN).split(widths, dim=1)
    which = ("q_proj", "k_proj", "v_proj").index(word.removeprefix("self_attn."))
    return parts[which].reshape(-1, HIDDEN)
