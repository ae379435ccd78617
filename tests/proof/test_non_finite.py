"""A number that is not finite stops every rank before the update, and the message says where it came from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from parallel.engine import Engine
from parallel.layout import Layout
from tests.proof.gather import copy_slices, same_bits
from tests.proof.worlds import SOURCES, World, batches, build, step
from tests.ranks import run_ranks
from tools.layouts import VOCABULARY, RandomBatch
from trainer.step import NonFiniteError, train_step

UNTIED = {"tie_word_embeddings": False}
WORLDS = {
    "one rank": World(model=UNTIED),
    "PP2 DP2": World(4, Layout(pipeline=2), model=UNTIED),
    "TP2 DP2, plain": World(4, Layout(tensor=2, distributed_optimizer=False), model=UNTIED),
    "CP2 VPP2 PP2, bf16": World(
        4, Layout(context=2, pipeline=2, virtual_pipeline=2), model=UNTIED, precision="bf16"
    ),
}
BAD = 3  # the sequence with the fault; its source is "odd"
RARE = VOCABULARY - 1  # a token that only this sequence has


@dataclass(frozen=True)
class Stopped:
    """What a rank heard, whether its state is as it was, and the loss of a sound step afterwards."""

    error: str
    message: str
    unchanged: bool
    next_loss: float


def attempt(engine: Engine, parts: list[RandomBatch]) -> tuple[str, str, bool]:
    """Name and message of the error that a step ends with, and whether weights and moments are as before."""
    before, updates = copy_slices(engine), engine.updates
    error: Exception | None = None
    try:
        train_step(engine, parts, lr=1e-3, source_names=SOURCES)
    except (NonFiniteError, ValueError) as caught:
        error = caught
    same = all(same_bits(a.data, b.data) for a, b in zip(before, copy_slices(engine), strict=True))
    return type(error).__name__, str(error), same and engine.updates == updates


def infinite_loss(world: World) -> Stopped:
    """The embedding of a token that one sequence has is infinite."""
    engine = build(world)
    step(engine, 0)
    rows = [
        block.view(entry.parameter.data)[-1]
        for entry in engine.named
        for block in entry.blocks
        if block.name == "model.embed_tokens.weight" and block.offset[0] + block.size[0] == VOCABULARY
    ]
    sound = [row.clone() for row in rows]
    for row in rows:
        row.fill_(torch.inf)
    found = attempt(engine, [without_rare(engine, part, n) for n, part in enumerate(batches(engine, 1))])
    for row, old in zip(rows, sound, strict=True):
        row.copy_(old)
    return Stopped(*found, next_loss=step(engine, 1).loss)


def without_rare(engine: Engine, part: RandomBatch, number: int) -> RandomBatch:
    tokens = part.tokens.clamp(max=RARE - 1)
    if engine.mesh.data_rank + number * engine.mesh.data == BAD:
        tokens[0, 5] = RARE
    return dataclasses.replace(part, tokens=tokens)


@pytest.mark.parametrize("name", WORLDS)
def test_a_loss_names_rank_micro_batch_and_source(name: str) -> None:
    world = WORLDS[name]
    data = world.layout.data(world.ranks)
    ranks = run_ranks(infinite_loss, world.ranks, world)
    for stopped in ranks:
        assert stopped.error == "NonFiniteError"
        assert stopped.unchanged
        assert stopped.message == ranks[0].message, "every rank hears the same"
        assert torch.isfinite(torch.tensor(stopped.next_loss)), "the run could go on"
    place = f"(data rank {BAD % data}), micro-batch {BAD // data}, source 'odd'"
    assert place in ranks[0].message
    assert ranks[0].message.count("micro-batch") == ranks[0].message.count(place), "and no other place"
    assert "Nothing was updated" in ranks[0].message


PLANTED = "model.layers.2.self_attn.k_proj.weight"


def bad_gradient(world: World) -> tuple[Stopped, bool]:
    """One element of one gradient is NaN on the last rank that has it; also whether this is that rank."""
    engine = build(world)
    step(engine, 0)
    mine = [(entry, block) for entry in engine.named for block in entry.blocks if block.name == PLANTED]
    planted = torch.tensor(engine.mesh.rank if mine else -1)
    torch.distributed.all_reduce(planted, torch.distributed.ReduceOp.MAX)
    here = int(planted) == engine.mesh.rank

    def plant(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        mine[0][1].view(gradient)[0, 0] = torch.nan
        return gradient

    handle = mine[0][0].parameter.register_hook(plant) if here else None
    found = attempt(engine, batches(engine, 1))
    if handle is not None:
        handle.remove()
    return Stopped(*found, next_loss=step(engine, 1).loss), here


@pytest.mark.parametrize("name", WORLDS)
def test_a_gradient_names_rank_and_parameter(name: str) -> None:
    world = WORLDS[name]
    ranks = run_ranks(bad_gradient, world.ranks, world)
    for stopped, _ in ranks:
        assert stopped.error == "NonFiniteError"
        assert stopped.unchanged
        assert stopped.message == ranks[0][0].message
        assert torch.isfinite(torch.tensor(stopped.next_loss))
    message = ranks[0][0].message
    culprit = [rank for rank, (_, here) in enumerate(ranks) if here]
    assert f"rank {culprit[0]}: {PLANTED}" in message
    assert message.count("model.layers.") == message.count(PLANTED)


def gradient_of_one_sequence(world: World) -> Stopped:
    """The loss is finite, but the backward pass of the one sequence that has a rare token makes a NaN."""
    engine = build(world)
    step(engine, 0)

    def spoil(_module: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if (inputs[0] == RARE).any() and output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.nan)

    handles = [
        chunk.embedding.word_embeddings.register_forward_hook(spoil)
        for chunk in engine.chunks
        if chunk.pre_process
    ]
    found = attempt(engine, [without_rare(engine, part, n) for n, part in enumerate(batches(engine, 1))])
    for handle in handles:
        handle.remove()
    return Stopped(*found, next_loss=step(engine, 1).loss)


@pytest.mark.parametrize(
    "name", [name for name, world in WORLDS.items() if not world.layout.virtual_pipeline]
)
def test_a_gradient_names_the_micro_batch_that_makes_it(name: str) -> None:
    world = WORLDS[name]
    data = world.layout.data(world.ranks)
    for stopped in run_ranks(gradient_of_one_sequence, world.ranks, world):
        assert stopped.error == "NonFiniteError"
        assert stopped.unchanged
        assert torch.isfinite(torch.tensor(stopped.next_loss)), "looking for the cause left nothing behind"
        place = f"(data rank {BAD % data}), micro-batch {BAD // data}, source 'odd'"
        assert place in stopped.message
        assert stopped.message.count("micro-batch") == stopped.message.count(place), "and no other place"


def no_valid_token(world: World) -> tuple[str, str, bool]:
    engine = build(world)
    parts = [
        dataclasses.replace(part, loss_weights=torch.zeros_like(part.loss_weights))
        for part in batches(engine, 0)
    ]
    return attempt(engine, parts)


def test_a_step_without_valid_tokens_is_refused() -> None:
    for error, message, unchanged in run_ranks(no_valid_token, 2, World(2)):
        assert error == "ValueError"
        assert "no token that counts in the loss" in message
        assert unchanged


def repeated_name() -> list[str]:
    """Of a fused parameter that is NaN as a whole: q, k and v of four query groups."""
    engine = build(World())
    step(engine, 0)
    for entry in engine.named:
        if entry.local_name.endswith("layers.1.self_attention.linear_qkv.weight"):
            entry.parameter.main_grad.fill_(torch.nan)
    return engine.non_finite_gradients()


def test_a_parameter_is_named_once() -> None:
    names = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    assert sorted(run_ranks(repeated_name, 1)[0]) == sorted(names)
