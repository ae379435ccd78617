"""The state of megatron-core's optimizers as slices: what there is, who holds it, that it is the state."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import pytest
import torch

from parallel.layout import Layout
from parallel.mesh import destroy_mesh
from parallel.slices import TensorSlice
from tests.proof.gather import Wholes, copy_slices, same_bits, whole_tensors
from tests.proof.worlds import World, build, step
from tests.ranks import run_ranks

RANKS = 3
ODD = {"hidden_size": 48, "ffn_hidden_size": 80}  # so that shards begin and end in the middle of rows
PLAIN = Layout(distributed_optimizer=False)
WORLDS = {
    "fp32, distributed": World(RANKS, model=ODD),
    "fp32, plain": World(RANKS, PLAIN, model=ODD),
    "bf16, distributed": World(RANKS, model=ODD, precision="bf16"),
    "bf16, plain": World(RANKS, PLAIN, model=ODD, precision="bf16"),
}


@dataclass(frozen=True)
class Here:
    """One rank before and after three steps, and after its slices and count were written from outside."""

    updates: list[int]
    before: list[TensorSlice]
    after: list[TensorSlice]
    restored: list[TensorSlice]
    again: list[TensorSlice]
    losses: list[float]


def train_and_write() -> dict[str, Here]:
    """Two steps, a third, then back to after the second by writing into the slices, and the third again."""
    found = {}
    for name, world in WORLDS.items():
        engine = build(world)
        updates, before = [engine.updates], copy_slices(engine)
        step(engine, 0)
        step(engine, 1)
        updates.append(engine.updates)
        saved = copy_slices(engine)
        losses = [step(engine, 2).loss]
        after = copy_slices(engine)
        for piece, old in zip(engine.slices(), saved, strict=True):
            piece.data.copy_(old.data)
        engine.updates = updates[-1]
        updates.append(engine.updates)
        restored = copy_slices(engine)
        losses.append(step(engine, 2).loss)
        updates.append(engine.updates)
        assert all(same_bits(a.data, b.data) for a, b in zip(saved, restored, strict=True))
        found[name] = Here(updates, before, after, restored, copy_slices(engine), losses)
        destroy_mesh()
    return found


@functools.cache
def ranks(name: str) -> list[Here]:
    return [found[name] for found in _all()]


@functools.cache
def _all() -> list[dict[str, Here]]:
    return run_ranks(train_and_write, RANKS)


@pytest.mark.parametrize("name", WORLDS)
def test_moments_are_there_before_the_first_step(name: str) -> None:
    wholes = whole_tensors([here.before for here in ranks(name)])
    states = {"weight", "exp_avg", "exp_avg_sq"} | ({"master"} if "bf16" in name else set())
    assert {state for _, state in wholes} == states
    names = {logical for logical, _ in wholes}
    assert wholes.keys() == {(logical, state) for logical in names for state in states}
    assert not any(whole.any() for (_, state), whole in wholes.items() if state.startswith("exp_avg"))


@pytest.mark.parametrize("name", WORLDS)
def test_masters_and_moments_are_fp32(name: str) -> None:
    for piece in ranks(name)[0].after:
        low = piece.state == "weight" and "bf16" in name
        assert piece.data.dtype == (torch.bfloat16 if low else torch.float32)


@pytest.mark.parametrize("name", WORLDS)
def test_the_distributed_optimizer_shares_out_the_state(name: str) -> None:
    """Each data rank holds about a third; without it each holds all of it."""
    held = [sum(math.prod(p.size) for p in here.after if p.state == "exp_avg") for here in ranks(name)]
    weights = sum(math.prod(p.size) for p in ranks(name)[0].after if p.state == "weight")
    replicas = {p.replicas for here in ranks(name) for p in here.after if p.state == "exp_avg"}
    if "plain" in name:
        assert held == [weights] * RANKS
        assert replicas == {tuple(range(RANKS))}
    else:
        assert sum(held) == weights
        assert max(held) - min(held) < 0.01 * weights, "apart by no more than the padding"
        assert replicas == {(rank,) for rank in range(RANKS)}
        assert any(p.size[1:] < p.shape[1:] for here in ranks(name) for p in here.after), "parts of rows"


@pytest.mark.parametrize("name", WORLDS)
def test_updates_are_counted(name: str) -> None:
    assert [here.updates for here in ranks(name)] == [[0, 2, 2, 3]] * RANKS


@pytest.mark.parametrize("name", WORLDS)
def test_writing_into_the_slices_is_going_back(name: str) -> None:
    """Loading is just that: the step after it gives the same loss, weights and moments, bit for bit."""
    for here in ranks(name):
        assert here.losses[0] == here.losses[1]
        for first, second in zip(here.after, here.again, strict=True):
            assert (first.name, first.state, first.offset) == (second.name, second.state, second.offset)
            assert same_bits(first.data, second.data), (first.name, first.state)


def adam_by_hand(name: str) -> Wholes:
    """From the state after two steps to that after three, given the third step's gradient from exp_avg."""
    start = whole_tensors([here.restored for here in ranks(name)])
    end = whole_tensors([here.after for here in ranks(name)])
    parameter = "master" if "bf16" in name else "weight"
    result: Wholes = {}
    for logical in {logical for logical, _ in start}:
        old = {state: start[logical, state].double() for state in (parameter, "exp_avg", "exp_avg_sq")}
        gradient = (end[logical, "exp_avg"].double() - 0.9 * old["exp_avg"]) / 0.1
        square = 0.95 * old["exp_avg_sq"] + 0.05 * gradient**2
        decay = 0.0 if logical.endswith("norm.weight") else 0.1
        mean = end[logical, "exp_avg"].double() / (1 - 0.9**3)
        size = (end[logical, "exp_avg_sq"].double() / (1 - 0.95**3)).sqrt() + 1e-8
        result[logical, parameter] = old[parameter] * (1 - 1e-3 * decay) - 1e-3 * mean / size
        result[logical, "exp_avg_sq"] = square
    return result


@pytest.mark.parametrize("name", WORLDS)
def test_an_update_is_adamw(name: str) -> None:
    """Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm 2, with the bias correction of update 3."""
    end = whole_tensors([here.after for here in ranks(name)])
    for (logical, state), expected in adam_by_hand(name).items():
        scale = float(expected.abs().max())
        # fp32 rounds at 6e-8; the gradient is worked out from a difference of moments, ten times enlarged.
        error = float((end[logical, state] - expected).abs().max()) / scale
        assert error < 3e-6, (logical, state)


def test_slices_are_views() -> None:
    assert run_ranks(share_memory, 1) == [True]


def share_memory() -> bool:
    engine = build(replace(WORLDS["bf16, distributed"], ranks=1))
    first, second = engine.slices(), engine.slices()
    return all(a.data.data_ptr() == b.data.data_ptr() for a, b in zip(first, second, strict=True))
