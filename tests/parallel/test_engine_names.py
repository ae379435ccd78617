"""Transformer Engine's modules call the same parameters otherwise: both must have the same logical names.

Transformer Engine itself needs CUDA. What it names how is read from its modules: LayerNormLinear has
`layer_norm_weight` beside `weight`, GroupedLinear `weight0`, `weight1`, ... and no module for each expert.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from parallel.layout import Layout
from parallel.naming import NamedParameter, name_parameters
from tests.proof.worlds import World, build
from tests.ranks import run_ranks

WORLDS = {
    "LayerNorm and biases": World(model={"linear_bias": True, "normalization": "LayerNorm"}),
    "TP2 SP, norms of q and k": World(
        2, Layout(tensor=2, sequence_parallel=True), model={"qk_norm": True, "qkv_bias": True}
    ),
    "PP2, tied": World(2, Layout(pipeline=2)),
    "EP2": World(2, Layout(expert=2), "tiny-moe"),
    "EP2 TP2 SP": World(4, Layout(tensor=2, expert=2, sequence_parallel=True), "tiny-moe"),
}
Names = list[tuple[Any, ...]]


def both_names(world: World) -> tuple[Names, Names, int]:
    """What the parameters are called with portable modules, and with the same put into other modules."""
    engine = build(world)
    before = _names(engine.named)
    for chunk in engine.chunks:
        for layer in chunk.decoder.layers:
            _fuse_norm(layer, "input_layernorm", layer.self_attention.linear_qkv)
            if world.preset == "tiny-moe":
                layer.mlp.experts = _grouped(layer.mlp.experts)
            else:
                _fuse_norm(layer, "pre_mlp_layernorm", layer.mlp.linear_fc1)
    named = name_parameters(engine.chunks, engine.mesh, vocab_size=engine.vocab_size, tied=engine.tied)
    renamed = {entry.local_name for entry in named} - {entry.local_name for entry in engine.named}
    return before, _names(named), len(renamed)


def _names(named: list[NamedParameter]) -> Names:
    return sorted(
        (block.name, block.shape, block.offset, block.size, block.start, entry.kind)
        for entry in named
        for block in entry.blocks
    )


def _fuse_norm(layer: nn.Module, norm: str, linear: nn.Module) -> None:
    for name, parameter in getattr(layer, norm).named_parameters():
        linear.register_parameter(f"layer_norm_{name}", parameter)
    setattr(layer, norm, nn.Identity())


def _grouped(experts: nn.Module) -> nn.Module:
    grouped = nn.ModuleDict({"linear_fc1": nn.Module(), "linear_fc2": nn.Module()})
    for index, expert in enumerate(experts.local_experts):
        for name, linear in grouped.items():
            linear.register_parameter(f"weight{index}", getattr(expert, name).weight)
    return grouped


@pytest.mark.parametrize("name", WORLDS)
def test_both_kinds_of_modules_hold_the_same_boxes(name: str) -> None:
    world = WORLDS[name]
    for portable, other, renamed in run_ranks(both_names, world.ranks, world):
        assert other == portable
        assert renamed > 0
