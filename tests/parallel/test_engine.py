"""The engine: rounded masters, clipping, weight decay, padding of the vocabulary."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from parallel.engine import Engine
from parallel.forward import run_micro_batches
from parallel.layout import Layout
from parallel.mesh import destroy_mesh
from parallel.slices import TensorSlice
from tests.proof.gather import copy_slices, whole_tensors
from tests.proof.worlds import SOURCES, World, batches, build, step
from tests.ranks import run_ranks
from tools.layouts import VOCABULARY
from trainer.loss import token_loss
from trainer.optimizer import OptimizerConfig, parameter_group
from trainer.step import train_step

CLIP = 0.05


def clipped_step(worlds: list[World]) -> list[tuple[float, list[TensorSlice]]]:
    """Gradient norm of the first step, and the state after it, of one world after another."""
    found = []
    for world in worlds:
        engine = build(world)
        norm = step(engine, 0).grad_norm
        found.append((norm, copy_slices(engine)))
        destroy_mesh()
    return found


CLIPPED = {
    "one rank": World(),
    "TP2 PP2, tied": World(4, Layout(tensor=2, pipeline=2)),
    "DP2 CP2": World(4, Layout(context=2)),
    "DP4, plain": World(4, Layout(distributed_optimizer=False)),
    "EP2 PP2": World(4, Layout(expert=2, pipeline=2), "tiny-moe"),
}


@pytest.fixture(scope="module")
def clipped() -> dict[str, tuple[float, list[list[TensorSlice]]]]:
    found = {}
    for ranks in (1, 4):
        worlds = {
            name: replace(world, optimizer=OptimizerConfig(clip=CLIP))
            for name, world in CLIPPED.items()
            if world.ranks == ranks
        }
        results = run_ranks(clipped_step, ranks, list(worlds.values()))
        for number, name in enumerate(worlds):
            assert len({result[number][0] for result in results}) == 1, "all ranks know the same norm"
            found[name] = results[0][number][0], [result[number][1] for result in results]
    return found


@pytest.mark.parametrize("name", CLIPPED)
def test_gradients_are_clipped_by_the_norm_of_the_whole_mesh(
    clipped: dict[str, tuple[float, list[list[TensorSlice]]]], name: str
) -> None:
    """After the first update exp_avg is (1 - beta_1) x the clipped gradient, whose norm is the limit."""
    norm, ranks = clipped[name]
    assert norm > 2 * CLIP
    wholes = whole_tensors(ranks)
    squares = sum(
        float((whole.double() ** 2).sum()) for (_, state), whole in wholes.items() if state == "exp_avg"
    )
    # fp32, and 1e-6 that megatron-core adds to the norm it divides by: 5e-6 of a norm of 0.2 or more
    assert squares**0.5 / 0.1 == pytest.approx(CLIP, rel=1e-5)


def test_a_gradient_below_the_limit_stays() -> None:
    world = World(optimizer=OptimizerConfig(clip=1e3))
    free = World(optimizer=OptimizerConfig(clip=None))
    (norm, kept), (same_norm, expected) = run_ranks(clipped_step, 1, [world, free])[0]
    assert norm == same_norm
    for a, b in zip(kept, expected, strict=True):
        assert torch.equal(a.data, b.data)


DECAYING = {
    "one rank, biased": World(model={"linear_bias": True, "normalization": "LayerNorm"}),
    "norms of q and k, bf16": World(2, model={"qk_norm": True}, precision="bf16"),
    "TP2 PP2": World(4, Layout(tensor=2, pipeline=2), model={"qkv_bias": True}),
    "EP2, plain": World(2, Layout(expert=2, distributed_optimizer=False), "tiny-moe"),
}
DECAY = OptimizerConfig(weight_decay=0.5, decay_embeddings=False)


def update_without_gradient(world: World) -> tuple[list[TensorSlice], list[TensorSlice], Counter[int]]:
    """State before and after an update at lr 0.1 whose gradient is zero, and how often a group lists what."""
    engine = build(replace(world, optimizer=DECAY))
    for piece in engine.slices():
        if piece.state in ("weight", "master"):
            piece.data.copy_(torch.linspace(0.5, 1.5, piece.data.numel()))
    before = copy_slices(engine)
    engine.zero_grad()
    engine.update(0.1, engine.gradient_norm())
    listed = Counter(
        id(parameter)
        for part in engine.optimizer.chained_optimizers
        for group in part.param_groups
        for parameter in group["params"]
    )
    return before, copy_slices(engine), Counter(listed.values())


@pytest.mark.parametrize("name", DECAYING)
def test_matrices_decay_and_nothing_else_and_each_once(name: str) -> None:
    world = DECAYING[name]
    ranks = run_ranks(update_without_gradient, world.ranks, world)
    assert all(set(counts) == {1} for _, _, counts in ranks)
    state = "master" if world.precision == "bf16" else "weight"
    decayed = Counter()
    for before, after, _ in ranks:
        for old, new in zip(before, after, strict=True):
            if old.state != state:
                continue
            factor = 1 - 0.1 * DECAY.weight_decay if parameter_group(old.name) == "matrix" else 1.0
            decayed[factor] += 1
            torch.testing.assert_close(new.data, old.data * factor, rtol=1e-6, atol=0)  # one rounding
    assert len(decayed) == 2, "there are both kinds"


ROUNDED = {
    "DP2, distributed": World(2, precision="bf16"),
    "DP2, plain": World(2, Layout(distributed_optimizer=False), precision="bf16"),
    "TP2 SP PP2, distributed": World(4, Layout(2, 2, sequence_parallel=True), precision="bf16"),
    "DP3, uneven shards": World(3, precision="bf16"),
    "EP2": World(2, Layout(expert=2), "tiny-moe", precision="bf16"),
}


def three_steps(world: World) -> tuple[list[float], list[TensorSlice]]:
    engine = build(world)
    return [step(engine, number).loss for number in range(3)], copy_slices(engine)


@pytest.mark.parametrize("name", ROUNDED)
def test_a_bf16_weight_is_its_rounded_master(name: str) -> None:
    world = ROUNDED[name]
    ranks = run_ranks(three_steps, world.ranks, world)
    wholes = whole_tensors([slices for _, slices in ranks])
    masters = {logical: whole for (logical, state), whole in wholes.items() if state == "master"}
    assert len(masters) == sum(state == "weight" for _, state in wholes)
    for logical, master in masters.items():
        assert torch.equal(wholes[logical, "weight"], master.to(torch.bfloat16)), logical
    moved = sum(float((m != m.to(torch.bfloat16).float()).sum()) for m in masters.values())
    assert moved > 0.9 * sum(m.numel() for m in masters.values()), "masters hold what bf16 cannot"


def padded(world: World) -> tuple[float, float, float]:
    """Loss of a model whose vocabulary is padded; largest weight and gradient in rows that are padding."""
    engine = build(world)
    parts = batches(engine, 0)[:2]
    loss = train_step(engine, parts, lr=1e-3, source_names=SOURCES).loss
    engine.zero_grad()
    engine.scale_loss(1.0)
    run_micro_batches(engine, parts, token_loss(len(SOURCES)))
    rows, gradients = [0.0], [0.0]
    for parameter in _vocabulary(engine):
        first = engine.mesh.tensor_rank * len(parameter)
        absent = max(0, first + len(parameter) - VOCABULARY)
        if absent:
            rows.append(float(parameter.data[-absent:].abs().max()))
            gradients.append(float(parameter.main_grad[-absent:].abs().max()))
    return loss, max(rows), max(gradients)


def _vocabulary(engine: Engine) -> list[Any]:
    return [
        entry.parameter
        for entry in engine.named
        if entry.local_name.startswith(("embedding.word_embeddings", "output_layer"))
    ]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tensor", [2, 4])
def test_padded_logits_have_no_probability(tensor: int, tied: bool) -> None:
    """A probability would show as another loss, and as a gradient of the padded rows."""
    model = {"tie_word_embeddings": tied}
    alone = run_ranks(padded, 1, World(model=model))[0][0]
    ranks = run_ranks(padded, tensor, World(tensor, Layout(tensor=tensor), model=model))
    # fp32 sums in another order. Rows of zeros would add tensor / 259 of a token: 4e-3 of the loss or more.
    assert [loss for loss, _, _ in ranks] == pytest.approx([alone] * tensor, rel=1e-6)
    assert [(weight, gradient) for _, weight, gradient in ranks] == [(0.0, 0.0)] * tensor


def poisoned_and_loaded(world: World) -> tuple[list[float], list[float]]:
    """Two steps from new weights, and two from the same weights loaded over memory full of NaN."""

    def two_steps() -> list[float]:
        steps = (batches(engine, number)[:1] for number in range(2))
        return [train_step(engine, parts, lr=1e-3, source_names=SOURCES).loss for parts in steps]

    engine = build(world)
    saved = copy_slices(engine)
    fresh = two_steps()
    for entry in engine.named:
        entry.parameter.data.fill_(torch.nan)
    engine.weights_changed()
    engine.blank()
    for piece, old in zip(engine.slices(), saved, strict=True):
        piece.data.copy_(old.data)
    engine.updates = 0
    return fresh, two_steps()


@pytest.mark.parametrize("optimizer", ["distributed", "plain"])
def test_padding_that_no_checkpoint_fills_is_zero_in_masters_too(optimizer: str) -> None:
    layout = Layout(tensor=4, distributed_optimizer=optimizer == "distributed")
    for fresh, loaded in run_ranks(poisoned_and_loaded, 4, World(4, layout, precision="bf16")):
        assert loaded == fresh
