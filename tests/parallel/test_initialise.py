"""Initial weights: the same in every layout, bit for bit, and drawn as they should be."""

from __future__ import annotations

import functools

import pytest
import torch

from parallel.initialise import PANEL_ROWS, generator_for, initialise, normal_draw
from parallel.layout import Layout
from parallel.naming import Block, NamedParameter
from parallel.slices import TensorSlice
from tests.proof.gather import Wholes, copy_slices, different, whole_tensors
from tests.proof.worlds import World, build
from tests.ranks import run_ranks

WORLDS = {
    "TP4 PP2": World(8, Layout(tensor=4, pipeline=2)),
    "PP2 VPP2": World(2, Layout(pipeline=2, virtual_pipeline=2)),
    "DP3, bf16": World(3, precision="bf16"),
    "untied TP2 DP2": World(4, Layout(tensor=2), model={"tie_word_embeddings": False}),
    "biased TP2": World(2, Layout(tensor=2), model={"linear_bias": True, "normalization": "LayerNorm"}),
    "EP2": World(2, Layout(expert=2), "tiny-moe"),
    "EP2 TP2 SP PP2": World(8, Layout(2, 2, expert=2, sequence_parallel=True), "tiny-moe"),
}


def initial(world: World, seed: int) -> list[TensorSlice]:
    return copy_slices(build(world, seed=seed))


@functools.cache
def weights(name: str, seed: int = 1) -> Wholes:
    return whole_tensors(run_ranks(initial, WORLDS[name].ranks, WORLDS[name], seed))


@pytest.mark.parametrize("name", WORLDS)
def test_every_layout_starts_as_the_same_model_bit_for_bit(name: str) -> None:
    world = WORLDS[name]
    alone = World(preset=world.preset, model=world.model, precision=world.precision)
    assert not different(weights(name), whole_tensors(run_ranks(initial, 1, alone, 1)))


@pytest.mark.parametrize("name", WORLDS)
def test_a_weight_is_its_draw_by_name(name: str) -> None:
    architecture = WORLDS[name].architecture
    draw = normal_draw(architecture.init_std, architecture.num_layers)
    for (logical, state), whole in weights(name).items():
        if state == "weight":
            drawn = draw(logical, tuple(whole.shape), generator_for(1, logical, 0))
            assert torch.equal(whole, drawn.to(whole.dtype)), logical


def test_a_master_is_its_weight() -> None:
    wholes = weights("DP3, bf16")
    masters = {name: whole for (name, state), whole in wholes.items() if state == "master"}
    assert masters
    for name, master in masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(master, wholes[name, "weight"].float())


def test_another_seed_is_another_model() -> None:
    drawn = {
        key
        for key, whole in weights("PP2 VPP2").items()
        if key[1] == "weight" and "norm" not in key[0] and whole.any()
    }
    assert drawn <= set(different(weights("PP2 VPP2"), weights("PP2 VPP2", seed=2)))


def test_no_two_tensors_are_alike() -> None:
    first = {float(whole.flatten()[0]) for (name, s), whole in weights("EP2").items() if s == "weight"}
    drawn = [key for key in weights("EP2") if key[1] == "weight" and "norm" not in key[0]]
    assert len(first) == len(drawn) + 1  # all norms begin with the same one


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("model.embed_tokens.weight", 0.02),
        ("model.layers.0.self_attn.q_proj.weight", 0.02),
        ("model.layers.3.mlp.gate.weight", 0.02),
        ("model.layers.3.self_attn.o_proj.weight", 0.02 / 128**0.5),
        ("model.layers.3.mlp.experts.7.down_proj.weight", 0.02 / 128**0.5),
        ("lm_head.weight", 0.02),
    ],
)
def test_output_projections_start_smaller(name: str, deviation: float) -> None:
    drawn = normal_draw(0.02, 64)(name, (400, 300), generator_for(0, name, 0))
    # The deviation of n samples has a relative error of 1 / sqrt(2 n) = 0.2 %; five of them.
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.01)
    assert abs(float(drawn.mean())) < 5 * deviation / 120_000**0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.norm.weight", 1.0),
        ("model.layers.0.input_layernorm.weight", 1.0),
        ("model.layers.0.self_attn.q_norm.weight", 1.0),
        ("model.layers.0.input_layernorm.bias", 0.0),
        ("model.layers.0.self_attn.k_proj.bias", 0.0),
    ],
)
def test_norms_start_at_one_and_biases_at_zero(name: str, value: float) -> None:
    drawn = normal_draw(0.02, 4)(name, (5,), generator_for(0, name, 0))
    assert torch.equal(drawn, torch.full((5,), value))


def test_panels_do_not_show_in_the_shares_of_ranks() -> None:
    shape = (2 * PANEL_ROWS + 300, 6)

    def share(offset: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.empty(size))
        block = Block("model.embed_tokens.weight", shape, offset, size, 0)
        initialise([NamedParameter("x", parameter, (block,), "tensor")], 7, normal_draw(0.02, 2))
        return parameter.data

    whole = share((0, 0), shape)
    assert whole.std() == pytest.approx(0.02, rel=0.05)
    assert len({float(x) for x in whole[::PANEL_ROWS, 0]}) == 3, "panels draw different numbers"
    half = PANEL_ROWS + 150
    for rows in (slice(0, half), slice(half, 2 * half)):
        for columns in (slice(0, 2), slice(2, 6)):
            size = (half, columns.stop - columns.start)
            assert torch.equal(share((rows.start, columns.start), size), whole[rows, columns])
