"""Checkpoints from before megatron-core: nested dictionaries, other names, another order of q, k and v.

No library writes them any more, so that torch saves what Megatron-LM 1 and 2 did, of two tensor ranks.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.opening import open_checkpoint
from checkpoint.readers.megatron_torch import read
from checkpoint.whole import read_whole

HIDDEN, HEADS, HEAD, FFN, VOCAB, LAYERS = 24, 4, 6, 40, 64, 2
RANKS = 2

Tensors = dict[str, torch.Tensor]


def logical() -> Tensors:
    """What the model is, in logical names: a GPT with biases and learned positions."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.embed_positions.weight": (16, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "model.norm.bias": (HIDDEN,),
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{at}.{norm}.{kind}": (HIDDEN,) for kind in ("weight", "bias")}
        matrices = {f"self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"}
        matrices |= {"mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN)}
        for name, shape in matrices.items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fused(model: Tensors, layer: str, kind: str, version: float, rank: int) -> torch.Tensor:
    """A rank's query_key_value in the order of a version."""
    local = HEADS // RANKS
    parts = [model[f"{layer}.self_attn.{part}_proj.{kind}"].chunk(RANKS)[rank] for part in "qkv"]
    rest = parts[0].shape[1:]
    stacked = torch.stack([part.view(local, HEAD, *rest) for part in parts])  # [3, heads, head, ...]
    if version == 1:
        stacked = stacked.permute(1, 2, 0, *range(3, stacked.dim()))
    elif version >= 2:
        stacked = stacked.transpose(0, 1)
    return stacked.reshape(-1, *rest).clone()


def stack_of(model: Tensors, version: float, rank: int) -> Tensors:
    """The dictionary of the transformer of one rank."""
    held = {}
    for i in range(LAYERS):
        source, here = f"model.layers.{i}", f"layers.{i}"
        for kind in ("weight", "bias"):
            held[f"{here}.input_layernorm.{kind}"] = model[f"{source}.input_layernorm.{kind}"]
            held[f"{here}.attention.query_key_value.{kind}"] = fused(model, source, kind, version, rank)
            held[f"{here}.post_attention_layernorm.{kind}"] = model[
                f"{source}.post_attention_layernorm.{kind}"
            ]
            held[f"{here}.mlp.dense_h_to_4h.{kind}"] = model[f"{source}.mlp.up_proj.{kind}"].chunk(RANKS)[
                rank
            ]
        for old, name in (("attention.dense", "self_attn.o_proj"), ("mlp.dense_4h_to_h", "mlp.down_proj")):
            held[f"{here}.{old}.weight"] = model[f"{source}.{name}.weight"].chunk(RANKS, dim=1)[rank].clone()
            held[f"{here}.{old}.bias"] = model[f"{source}.{name}.bias"]
    return held | {f"final_layernorm.{kind}": model[f"model.norm.{kind}"] for kind in ("weight", "bias")}


def content(model: Tensors, version: float, rank: int, stack: str) -> dict[str, Any]:
    words = model["model.embed_tokens.weight"].chunk(RANKS)[rank]
    embedding = {
        "word_embeddings": {"weight": words},
        "position_embeddings": {"weight": model["model.embed_positions.weight"]},
    }
    args = Namespace(
        model_parallel_size=RANKS,
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        vocab_size=VOCAB,
        swiglu=False,
        untie_embeddings_and_output_weights=False,
    )
    found = {
        "args": args,
        "iteration": 40,
        "model": {"language_model": {"embedding": embedding, stack: stack_of(model, version, rank)}},
    }
    return found | ({"checkpoint_version": version} if version else {})


def save(folder: Path, model: Tensors, version: float, stack: str = "transformer") -> Path:
    for rank in range(RANKS):
        path = folder / "iter_0000040" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save(content(model, version, rank, stack), path)
    return folder


@pytest.mark.parametrize(("version", "stack"), [(0, "transformer"), (1.0, "transformer"), (2.0, "encoder")])
def test_old_models_are_read(version: float, stack: str, tmp_path: Path) -> None:
    model = logical()
    opened = open_checkpoint(save(tmp_path, model, version, stack))
    assert opened.problems == ()
    tensors = opened.manifest.by_key()
    assert set(tensors) == {(name, "weight") for name in model}
    for (name, _), tensor in tensors.items():
        assert torch.equal(read_whole(opened.folder, tensor), model[name]), name


def test_an_order_of_heads_that_nothing_tells_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, logical(), 0)
    for path in folder.glob("*/*/model_optim_rng.pt"):
        saved = torch.load(path, weights_only=False)
        del saved["args"]
        torch.save(saved, path)
    problems = read(folder).problems
    assert any("linear_qkv.weight" in problem and "checkpoint version 0" in problem for problem in problems)
