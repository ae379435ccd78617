"""Boxes of logical tensors: of every kind of model, under every kind of split, each element exactly once."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch

from parallel.layout import Layout
from parallel.mesh import destroy_mesh
from parallel.naming import name_parameters
from parallel.slices import TensorSlice
from tests.proof.gather import copy_slices, whole_tensors
from tests.proof.worlds import World, build
from tests.ranks import run_ranks
from trainer.model.parameters import logical_parameters

DENSE = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "bias of q, k and v": {"qkv_bias": True, "tie_word_embeddings": False},
    "norms of q and k": {"qk_norm": True},
    "all biases, LayerNorm, no gate": {
        "linear_bias": True,
        "normalization": "LayerNorm",
        "activation": "gelu",
    },
    "odd sizes, long heads": {"hidden_size": 48, "ffn_hidden_size": 80, "head_dim": 16},
}
EXPERTS = {"experts": {}, "experts, tied, norms of q and k": {"tie_word_embeddings": True, "qk_norm": True}}
LAYOUTS = {
    "one": (1, Layout()),
    "TP4": (4, Layout(tensor=4)),
    "TP2 SP PP2": (4, Layout(tensor=2, pipeline=2, sequence_parallel=True)),
    "PP2 VPP2 DP2": (4, Layout(pipeline=2, virtual_pipeline=2)),
    "CP2 DP2, plain": (4, Layout(context=2, distributed_optimizer=False)),
    "EP2 TP2 SP": (4, Layout(tensor=2, expert=2, sequence_parallel=True)),
    "EP2 PP2 VPP2": (4, Layout(expert=2, pipeline=2, virtual_pipeline=2)),
    "EP4, plain": (4, Layout(expert=4, distributed_optimizer=False)),
}


@dataclass(frozen=True)
class Here:
    """One rank's share of one model."""

    slices: list[TensorSlice]
    padding: int  # elements of parameters that belong to nothing
    runs: list[list[tuple[int, int]]]  # of each parameter: first element and number of elements of its blocks
    sizes: list[int]


def shares(layout: Layout, ranks: int) -> dict[str, Here]:
    """This rank's share of every model that the layout can split."""
    found = {}
    for name, model in models(layout).items():
        engine = build(World(ranks, layout, "tiny-moe" if name in EXPERTS else "tiny", model))
        runs = [[(block.start, block.numel) for block in entry.blocks] for entry in engine.named]
        sizes = [entry.parameter.numel() for entry in engine.named]
        held = sum(numel for parameter in runs for _, numel in parameter)
        found[name] = Here(copy_slices(engine), sum(sizes) - held, runs, sizes)
        destroy_mesh()
    return found


def models(layout: Layout) -> dict[str, dict[str, object]]:
    fits_experts = layout.tensor == 1 or layout.sequence_parallel
    return (DENSE if layout.expert == 1 else {}) | (EXPERTS if fits_experts else {})


@functools.cache
def split(layout: str) -> list[dict[str, Here]]:
    ranks, degrees = LAYOUTS[layout]
    return run_ranks(shares, ranks, degrees, ranks)


CASES = [(layout, model) for layout, (_, degrees) in LAYOUTS.items() for model in models(degrees)]


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_boxes_make_up_every_logical_tensor_exactly_once(layout: str, model: str) -> None:
    """`whole_tensors` finds gaps, overlaps and wrong lists of holders."""
    ranks, degrees = LAYOUTS[layout]
    world = World(ranks, degrees, "tiny-moe" if model in EXPERTS else "tiny", {**DENSE, **EXPERTS}[model])
    wholes = whole_tensors([share[model].slices for share in split(layout)])
    expected = logical_parameters(world.architecture)
    for state in ("weight", "exp_avg", "exp_avg_sq"):
        assert {name: tuple(whole.shape) for (name, s), whole in wholes.items() if s == state} == expected
    assert {state for _, state in wholes} == {"weight", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_runs_lie_one_after_the_other_in_their_parameter(layout: str, model: str) -> None:
    for share in split(layout):
        for runs, size in zip(share[model].runs, share[model].sizes, strict=True):
            ends = [start + numel for start, numel in runs]
            assert [start for start, _ in runs] == [0, *ends][: len(runs)]
            assert (ends[-1] if ends else 0) <= size


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_only_rows_past_the_vocabulary_belong_to_nothing(layout: str, model: str) -> None:
    """259 tokens on 4 tensor ranks are 65 rows each: the last of the last rank is padding."""
    ranks, degrees = LAYOUTS[layout]
    architecture = World(ranks, degrees, model=DENSE.get(model, {})).architecture
    rows = math.ceil(architecture.vocab_size / degrees.tensor)
    for rank, share in enumerate(split(layout)):
        tensor_rank = rank % degrees.tensor
        absent = max(0, (tensor_rank + 1) * rows - architecture.vocab_size)
        copies = sum(size == rows * architecture.hidden_size for size in share[model].sizes)
        assert share[model].padding == copies * absent * architecture.hidden_size


def rename_and_name() -> str:
    engine = build(World())
    layer = engine.chunks[0].decoder.layers[1]
    layer.mlp.adapter, layer.mlp.linear_fc1 = layer.mlp.linear_fc1, None
    engine.chunks[0].extra_scale = torch.nn.Parameter(torch.ones(1))
    try:
        name_parameters(engine.chunks, engine.mesh, vocab_size=engine.vocab_size, tied=engine.tied)
    except RuntimeError as error:
        return str(error)
    return ""


def test_parameters_that_no_rule_knows_are_all_named() -> None:
    text = run_ranks(rename_and_name, 1)[0]
    assert "without a logical name" in text
    assert "decoder.layers.1.mlp.adapter.weight" in text
    assert "extra_scale" in text
