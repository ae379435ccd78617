"""Evaluating with the average of the weights: the model computes with it, and trains on as if it had not."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

from parallel.layout import Layout
from parallel.mesh import build_mesh, destroy_mesh
from parallel.slices import TensorSlice
from tests.proof.gather import copy_slices, different, whole_tensors
from tests.proof.worlds import World, batches, build, step
from tests.ranks import run_ranks
from tests.trainer.updates.worlds import Setup, start
from tools.layouts import SEQUENCE
from trainer.build import build_engine, execution_here
from trainer.step import evaluate

WORLDS = {
    "one rank": World(),
    "DP2, bf16": World(2, precision="bf16"),
    "DP2, plain, bf16": World(2, Layout(distributed_optimizer=False), precision="bf16"),
    "PP2 VPP2": World(2, Layout(pipeline=2, virtual_pipeline=2)),
}


CASES = [
    pytest.param(name, overlap, marks=() if quick else pytest.mark.long)
    for name in WORLDS
    for overlap in (False, True)
    for quick in [(name, overlap) in {("DP2, bf16", True), ("DP2, plain, bf16", False), ("PP2 VPP2", True)}]
]


@dataclass(frozen=True)
class Seen:
    """Losses of the training and of evaluations, and slices inside the average and at the end."""

    losses: list[float]
    evaluated: list[float]
    inside: list[TensorSlice]
    ended: list[TensorSlice]


def train(world: World, swaps: bool, overlap: bool) -> Seen:
    """Four steps; after the second, the same evaluation with the weights, the average, the weights."""
    engine = build_engine(
        build_mesh(world.layout),
        world.architecture,
        world.optimizer,
        execution_here(precision=world.precision),
        sequence_length=SEQUENCE,
        seed=1,
        overlap=overlap,
    )
    updates = Setup(world, slow={"kind": "ema", "decay": 0.5}).open(engine)
    start(updates)

    def evaluation() -> float:
        return evaluate(engine, batches(engine, 9), num_sources=2).loss

    losses, evaluated, inside = [], [], []
    for number in range(4):
        losses.append(step(engine, number).loss)
        if swaps and number == 1:
            evaluated.append(evaluation())
            with updates.averaged():
                evaluated.append(evaluation())
                inside = copy_slices(engine)
            evaluated.append(evaluation())
    seen = Seen(losses, evaluated, inside, copy_slices(engine))
    destroy_mesh()
    return seen


@functools.cache
def ranks(name: str, *, swaps: bool, overlap: bool) -> list[Seen]:
    world = WORLDS[name]
    return run_ranks(train, world.ranks, world, swaps, overlap)


@pytest.mark.parametrize(("name", "overlap"), CASES)
def test_training_goes_on_bit_for_bit(name: str, overlap: bool) -> None:
    swapping, plain = (ranks(name, swaps=swaps, overlap=overlap) for swaps in (True, False))
    assert [seen.losses for seen in swapping] == [seen.losses for seen in plain]
    assert different(*(whole_tensors([seen.ended for seen in runs]) for runs in (swapping, plain))) == []


@pytest.mark.parametrize(("name", "overlap"), CASES)
def test_the_model_computes_with_the_average_and_then_with_its_weights(name: str, overlap: bool) -> None:
    for seen in ranks(name, swaps=True, overlap=overlap):
        before, average, after = seen.evaluated
        assert before == after
        assert average > before, "the average lags behind"


@pytest.mark.parametrize(("name", "overlap"), CASES)
def test_inside_the_weights_are_the_average(name: str, overlap: bool) -> None:
    """What a second run, without the swap, has as the average after the same two steps."""
    world = WORLDS[name]
    inside = whole_tensors([seen.inside for seen in ranks(name, swaps=True, overlap=overlap)])
    after_two = whole_tensors(run_ranks(two_steps, world.ranks, world))
    for (tensor, state), value in inside.items():
        if state == "weight":
            assert torch.equal(value, after_two[tensor, "ema"].to(value.dtype))


def two_steps(world: World) -> list[TensorSlice]:
    engine = build(world)
    start(Setup(world, slow={"kind": "ema", "decay": 0.5}).open(engine))
    for number in range(2):
        step(engine, number)
    return copy_slices(engine)
