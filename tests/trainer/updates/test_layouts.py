"""Anchors, frozen and slow weights on every layout: the numbers of one rank, bits where bits are promised."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from parallel.layout import Layout
from tests.proof.gather import Wholes, different, same_bits, whole_tensors
from tests.proof.worlds import World
from tests.ranks import run_ranks
from tests.trainer.updates.worlds import Run, Setup, runs
from trainer.optimizer import OptimizerConfig

PLAIN = Layout(distributed_optimizer=False)
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-4)  # else sums in another order make Adam's steps differ
LAYOUTS = {
    "one rank": World(optimizer=OPTIMIZER),
    "DP2": World(2, optimizer=OPTIMIZER),
    "DP2, plain": World(2, PLAIN, optimizer=OPTIMIZER),
    "TP2": World(2, Layout(tensor=2, sequence_parallel=True), optimizer=OPTIMIZER),
    "PP2, tied": World(2, Layout(pipeline=2), optimizer=OPTIMIZER),
    "CP2": World(2, Layout(context=2), optimizer=OPTIMIZER),
}
FISHER = {"kind": "ewc", "strength": 30.0, "sources": ["old"], "batches": 2, "sequences": 3}
MAIN = {"fp32": "weight", "bf16": "master"}
FROZEN = (r"model\.layers\.1\..*", r".*\.norm\.weight")
METHODS = {
    "none": Setup(),
    "strength 0": Setup(anchor={"kind": "l2", "strength": 0.0}),
    "ewc, ema": Setup(freeze=FROZEN, anchor=FISHER | {"sequences": 1}, slow={"kind": "ema", "decay": 0.9}),
    "ewc of three, reptile": Setup(
        freeze=FROZEN, anchor=FISHER, slow={"kind": "reptile", "every": 3, "epsilon": 0.3}
    ),
    "si, ema": Setup(anchor={"kind": "si", "strength": 1.0}, slow={"kind": "ema", "decay": 0.9}),
}


def long(*cases: Any) -> list[Any]:
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)
        for case in cases
    ]


QUICK = ["DP2", "TP2"]
PRECISIONS = [
    ("one rank", "fp32"),
    ("DP2", "fp32"),
    ("DP2", "bf16"),
    ("TP2", "fp32"),
    *long(("one rank", "bf16"), ("TP2", "bf16"), ("DP2, plain", "fp32"), ("DP2, plain", "bf16")),
    *long(("PP2, tied", "fp32"), ("PP2, tied", "bf16")),
]


@functools.cache
def found(layout: str, precision: str = "fp32") -> dict[str, list[Run]]:
    """By method, the run on every rank."""
    world = replace(LAYOUTS[layout], precision=precision)
    setups = [replace(setup, world=world) for setup in METHODS.values()]
    ranks: Sequence[list[Run]] = run_ranks(runs, world.ranks, setups)
    return {name: [rank[number] for rank in ranks] for number, name in enumerate(METHODS)}


def wholes(ranks: list[Run], step: int = -1) -> Wholes:
    return whole_tensors([run.slices[step] for run in ranks])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", [*QUICK, *long("DP2, plain", "CP2", "PP2, tied")])
def test_the_layout_does_not_matter(layout: str, method: str) -> None:
    """fp32 sums gradients in another order: 1e-5 of the largest element after three steps of 1e-3."""
    one, other = wholes(found("one rank")[method]), wholes(found(layout)[method])
    assert one.keys() == other.keys()
    for key, value in one.items():
        scale = float(value.abs().max())
        tolerance = 1e-4 if key[1] == "path_integral" else 2e-5
        assert float((value - other[key]).abs().max()) <= tolerance * scale, key


@pytest.mark.parametrize(("layout", "precision"), PRECISIONS)
def test_strength_zero_changes_no_bit(layout: str, precision: str) -> None:
    methods = found(layout, precision)
    off, on = wholes(methods["none"]), wholes(methods["strength 0"])
    assert different(off, {key: value for key, value in on.items() if key[1] != "anchor"}) == []
    assert methods["none"][0].losses == methods["strength 0"][0].losses


@pytest.mark.parametrize(("layout", "precision"), PRECISIONS)
@pytest.mark.parametrize("method", ["ewc, ema", "ewc of three, reptile"])
def test_frozen_weights_keep_every_bit_and_the_others_move(layout: str, precision: str, method: str) -> None:
    ranks = found(layout, precision)[method]
    start, end = wholes(ranks, 0), wholes(ranks)
    for (name, state), value in end.items():
        frozen = ".layers.1." in name or name == "model.norm.weight"
        if state in MAIN.values() and frozen:
            assert same_bits(value, start[name, state]), (name, state)
        elif state == MAIN[precision]:  # small steps do not show in bf16
            assert not torch.equal(value, start[name, state]), (name, state)
    moments = [key for key in end if ".layers.1." in key[0] and key[1] == "exp_avg"]
    assert all(bool(end[key].any()) for key in moments), "their moments go on"


@pytest.mark.parametrize("layout", ["DP2", *long("DP2, plain", "TP2")])
@pytest.mark.parametrize("method", ["ewc of three, reptile", "si, ema"])
def test_weights_are_the_rounded_masters(layout: str, method: str) -> None:
    end = wholes(found(layout, "bf16")[method])
    masters = [name for name, state in end if state == "master"]
    assert masters
    assert all(torch.equal(end[name, "weight"], end[name, "master"].bfloat16()) for name in masters)


def test_further_states_are_those_that_were_asked_for() -> None:
    """Also where a fused matrix keeps memory for the neighbours of what was asked for."""
    setup = METHODS["ewc, ema"]
    setup = replace(setup, anchor={"kind": "l2", "strength": 1.0, "only": [r".*\.0\..*q_proj.weight"]})
    ((run,),) = run_ranks(runs, 1, [setup])
    end = whole_tensors([run.slices[-1]])
    assert {name for name, state in end if state == "anchor"} == {"model.layers.0.self_attn.q_proj.weight"}
    assert {name for name, state in end if state == "ema"} == {name for name, _ in end}
