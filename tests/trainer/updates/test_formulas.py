"""One rank against torch's own AdamW on the same gradients, with each method's formula written out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.proof.gather import whole_tensors
from tests.ranks import run_ranks
from tests.trainer.updates.worlds import Run, Setup, run
from trainer.optimizer import OptimizerConfig, weight_decay

LRS = (1e-3, 8e-4, 6e-4, 4e-4, 2e-4)
STRENGTH, DECAY, EPSILON = 50.0, 0.9, 0.3
Tensors = dict[str, torch.Tensor]

SETUPS = {
    "l2": Setup(anchor={"kind": "l2", "strength": STRENGTH}),
    "ewc": Setup(
        anchor={"kind": "ewc", "strength": STRENGTH, "sources": ["old"], "batches": 2, "normalise": False}
    ),
    "ewc, normalised": Setup(anchor={"kind": "ewc", "strength": STRENGTH, "sources": ["old"], "batches": 2}),
    "too strong": Setup(anchor={"kind": "l2", "strength": 1e9}),
    "si": Setup(anchor={"kind": "si", "strength": STRENGTH}),
    "ema": Setup(slow={"kind": "ema", "decay": DECAY, "every": 2}),
    "reptile": Setup(slow={"kind": "reptile", "every": 2, "epsilon": EPSILON}),
    "all of it": Setup(
        freeze=(r".*\.1\..*", ".*norm.*"),
        anchor={"kind": "l2", "strength": STRENGTH, "only": [".*_proj.*"]},
        slow={"kind": "reptile", "every": 2, "epsilon": EPSILON},
    ),
}


@functools.cache
def found(name: str) -> Run:
    result: Run = run_ranks(run, 1, SETUPS[name], LRS)[0]
    return result


def states(name: str, state: str) -> list[Tensors]:
    """By step, the first before any: each tensor of a state."""
    wholes = [whole_tensors([pieces]) for pieces in found(name).slices]
    return [{key[0]: whole for key, whole in one.items() if key[1] == state} for one in wholes]


class Reference:
    """AdamW in torch's plain form, double precision, on the recorded gradients."""

    def __init__(self, name: str) -> None:
        self.theta = {key: w.double() for key, w in states(name, "weight")[0].items()}
        config = OptimizerConfig()
        groups = [{"params": [w], "weight_decay": weight_decay(config, k)} for k, w in self.theta.items()]
        self.adam = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, foreach=False, fused=False)
        self.gradients = found(name).gradients

    def step(self, number: int) -> None:
        for group in self.adam.param_groups:
            group["lr"] = LRS[number]
        for key, weight in self.theta.items():
            weight.grad = self.gradients[number][key].view_as(weight).double()
        self.adam.step()


def compare(name: str, act: Callable[[Reference, int], Any], state: str = "weight") -> None:
    """After every step `act` has to make the reference's weights, or what it returns, those of the engine."""
    reference = Reference(name)
    for number in range(len(LRS)):
        reference.step(number)
        expected = act(reference, number) or reference.theta
        for key, value in states(name, state)[number + 1].items():
            scale = float(expected[key].abs().max())
            error = float((value.double() - expected[key]).abs().max())
            assert error <= 1e-6 * scale, (number, key, error, scale)


def pull(reference: Reference, anchor: Tensors, share: Tensors | float) -> None:
    for key, weight in reference.theta.items():
        amount = share if isinstance(share, float) else share[key]
        weight.copy_(weight - amount * (weight - anchor[key]))


def test_without_anything_the_reference_is_the_engine() -> None:
    compare("ema", lambda reference, number: None)


def test_l2_pulls_to_the_start() -> None:
    start = states("l2", "anchor")[0]
    compare("l2", lambda reference, number: pull(reference, start, LRS[number] * STRENGTH))


def test_the_anchor_is_where_the_stage_began_and_stays() -> None:
    anchors = states("l2", "anchor")
    for key, weight in states("l2", "weight")[0].items():
        assert all(torch.equal(anchor[key], weight) for anchor in anchors)


@pytest.mark.parametrize("name", ["ewc", "ewc, normalised"])
def test_ewc_weighs_the_pull(name: str) -> None:
    start, importance = states(name, "anchor")[0], states(name, "importance")[0]
    scale = 1.0
    if name != "ewc":
        scale = 1 / float(torch.cat([w.double().flatten() for w in importance.values()]).mean())
        assert found(name).state == {"importance_scale": pytest.approx(scale, rel=1e-6)}

    def act(reference: Reference, number: int) -> None:
        rate = LRS[number] * STRENGTH * scale
        pull(reference, start, {key: (w.double() * rate).clamp(max=1.0) for key, w in importance.items()})

    compare(name, act)


def test_a_pull_does_not_shoot_past_the_anchor() -> None:
    weights = states("too strong", "weight")
    for key, start in weights[0].items():
        assert all(torch.equal(after[key], start) for after in weights[1:])


def test_si_adds_up_the_path_integral_and_pulls_nothing_in_its_first_stage() -> None:
    total: Tensors = {}

    def act(reference: Reference, number: int) -> Tensors:
        before, after = (states("si", "weight")[n] for n in (number, number + 1))
        for key, gradient in reference.gradients[number].items():
            moved = after[key].double() - before[key].double()
            total[key] = total.get(key, 0) - gradient.view_as(moved).double() * moved
        return total

    compare("si", act, state="path_integral")
    compare("si", lambda reference, number: None)
    assert found("si").notes == [
        "nothing has importance yet, and nothing is pulled: no earlier stage had this anchor"
    ]


def test_the_average_is_its_closed_form() -> None:
    """After n changes: decay^n x start + (1 - decay) x sum of decay^(n - i) x theta_i."""
    weights = states("ema", "weight")
    for number, average in enumerate(states("ema", "ema")):
        seen = [weights[n] for n in range(2, number + 1, 2)]
        for key, value in average.items():
            closed = DECAY ** len(seen) * weights[0][key].double()
            for i, one in enumerate(seen, start=1):
                closed += (1 - DECAY) * DECAY ** (len(seen) - i) * one[key].double()
            torch.testing.assert_close(
                value.double(), closed, rtol=0, atol=3e-7
            )  # norms are 1: fp32 rounds at 1.2e-7


def reptile(reference: Reference, slow: Tensors, number: int) -> None:
    if number % 2 == 1:
        for key, weight in reference.theta.items():
            weight.copy_(slow[key] + EPSILON * (weight - slow[key]))
            slow[key] = weight.clone()


def test_reptile_goes_part_of_the_way() -> None:
    slow = {key: w.double() for key, w in states("reptile", "slow")[0].items()}
    compare("reptile", lambda reference, number: reptile(reference, slow, number))


def test_all_of_it_in_the_documented_order() -> None:
    start = {key: w.double() for key, w in states("all of it", "weight")[0].items()}
    slow = dict(start)
    held = {key for key in start if ".1." in key or "norm" in key}

    def act(reference: Reference, number: int) -> None:
        for key in held:
            reference.theta[key].copy_(start[key])
        share = {key: torch.tensor(LRS[number] * STRENGTH * ("_proj" in key)).double() for key in start}
        pull(reference, start, share)
        reptile(reference, slow, number)

    compare("all of it", act)
    moved = {
        key for key, w in states("all of it", "weight")[-1].items() if not torch.equal(w, start[key].float())
    }
    assert moved == start.keys() - held
