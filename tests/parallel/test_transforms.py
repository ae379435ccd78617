"""Transforms run between Adam and the weights of the model, on all that a rank updates and no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from parallel.engine import Engine
from parallel.layout import Layout
from parallel.mesh import build_mesh, destroy_mesh
from parallel.slices import TensorSlice
from parallel.transforms import Phase
from tests.proof.gather import copy_slices, different, whole_tensors
from tests.proof.worlds import World, step
from tests.ranks import run_ranks
from tools.layouts import SEQUENCE
from trainer.build import build_engine, execution_here

PLAIN = Layout(distributed_optimizer=False)
WORLDS = {
    "one rank": World(),
    "DP2, bf16": World(2, precision="bf16"),
    "DP2, plain": World(2, PLAIN),
    "DP2, plain, bf16": World(2, PLAIN, precision="bf16"),
    "PP2 TP2, tied": World(4, Layout(pipeline=2, tensor=2, sequence_parallel=True), precision="bf16"),
    "EP2 PP2": World(4, Layout(pipeline=2, expert=2), "tiny-moe"),
}


@dataclass
class Calls:
    """Writes down when it was called, and does something then."""

    phase: Phase
    log: list[str] = field(default_factory=list)
    act: Callable[[float], Any] = lambda _: None

    def before(self, lr: float) -> None:
        self.log.append(f"before {self.phase.name}")

    def after(self, lr: float | None = None) -> None:
        self.log.append(f"after {self.phase.name}")
        self.act(lr or 0.0)


def build(world: World, *, overlap: bool = False) -> Engine:
    execution = execution_here(precision=world.precision)
    mesh = build_mesh(world.layout)
    return build_engine(
        mesh,
        world.architecture,
        world.optimizer,
        execution,
        sequence_length=SEQUENCE,
        seed=1,
        overlap=overlap,
    )


def stepped(cases: list[tuple[World, bool, bool]]) -> list[list[TensorSlice]]:
    """State after two steps of each world, with or without overlap and a transform that does nothing."""
    found = []
    for world, overlap, transformed in cases:
        engine = build(world, overlap=overlap)
        if transformed:
            engine.transforms.append(Calls(Phase.MASK))
        for number in range(2):
            step(engine, number)
        found.append(copy_slices(engine))
        destroy_mesh()
    return found


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", WORLDS)
def test_a_transform_that_does_nothing_changes_no_bit(name: str, overlap: bool) -> None:
    world = WORLDS[name]
    ranks = run_ranks(stepped, world.ranks, [(world, overlap, False), (world, overlap, True)])
    off, on = (whole_tensors([rank[number] for rank in ranks]) for number in range(2))
    assert different(off, on) == []


def order() -> list[str]:
    engine = build(World())
    log: list[str] = []
    for phase in (Phase.PROJECTION, Phase.PULL, Phase.MASK):
        engine.transforms.append(Calls(phase, log))
    engine.slow_weights = Calls(Phase.MASK, act=lambda _: log.append("slow weights"))
    step(engine, 0)
    return log


def test_the_phases_come_in_their_order_and_slow_weights_last() -> None:
    (log,) = run_ranks(order, 1)
    phases = ["MASK", "PULL", "PROJECTION"]
    assert log == [f"before {p}" for p in phases] + [f"after {p}" for p in phases] + ["slow weights"]


def negated(world: World, overlap: bool) -> list[list[TensorSlice]]:
    """State after a step: as it is, negated by a transform, and negated again from outside."""
    found = []
    for act in (None, True):
        engine = build(world, overlap=overlap)
        if act:
            engine.transforms.append(Calls(Phase.MASK, act=partial(negate, engine)))
        step(engine, 0)
        found.append(copy_slices(engine))
        if act:
            engine.settle()
            negate(engine, 0.0)
            engine.main_changed()
            found.append(copy_slices(engine))
        destroy_mesh()
    return found


@torch.no_grad()
def negate(engine: Engine, _lr: float) -> None:
    for piece in engine.pieces:
        piece.value.neg_()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", WORLDS)
def test_the_model_has_what_was_written_into_the_main_copies(name: str, overlap: bool) -> None:
    world = WORLDS[name]
    ranks = run_ranks(negated, world.ranks, world, overlap)
    plain, inside, outside = (whole_tensors([rank[number] for rank in ranks]) for number in range(3))
    opposite = {key: -w if key[1] in ("weight", "master") else w for key, w in plain.items()}
    assert different(inside, opposite) == []
    assert different(outside, plain) == []
