"""megatron-core takes its own checkpoints of the oracle for what they are, and steps as the oracle does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parallel.layout import Layout
from tests.foreign.megatron import ITERATION, Dist, Run, load_and_step, save_torch_dist
from tests.foreign.oracle import Oracle
from tests.proof.gather import Wholes

BF16 = Oracle(precision="bf16")
CASES = {
    "TP2 PP2": (BF16, Run(Layout(tensor=2, pipeline=2), 4), Dist()),
    "DP3, buckets": (BF16, Run(Layout(), 3, bucket=100_000), Dist()),
    "EP2": (Oracle(experts=4, precision="bf16"), Run(Layout(expert=2), 2), Dist(homogeneous=False)),
    "DP2, fully reshardable": (BF16, Run(Layout(), 2), Dist("fully_reshardable")),
    "plain, fp32": (Oracle(), Run(Layout(distributed_optimizer=False)), Dist()),
}


def wrong(stepped: Wholes, oracle: Oracle) -> set[str]:
    """Names of parameters whose state is not the oracle's after the step."""
    found = set()
    for name in oracle.shapes():
        for state, expected in oracle.stepped(name).items():
            held = stepped.get((name, state))
            if held is None:
                held = stepped[name, "weight"]  # in float32 it is the master
            # one rounding apart in AdamW's arithmetic: 2^-24 of values below 1
            if not torch.allclose(held, expected, rtol=0, atol=1.2e-7):
                found.add(name)
    return found


@pytest.mark.parametrize("case", CASES)
def test_megatron_core_goes_on_as_the_oracle_does(case: str, tmp_path: Path) -> None:
    oracle, run, dist = CASES[case]
    save_torch_dist(tmp_path, oracle, run, dist)
    assert wrong(load_and_step(tmp_path / ITERATION, oracle, run, dist), oracle) == set()


def test_padded_buckets_are_saved_wrong_by_megatron_core_itself(tmp_path: Path) -> None:
    """The genuine damage of `fully_reshardable` (megatron-core before PR 5077) that readers have to name."""
    run, dist = Run(Layout(), 3, bucket=100_000), Dist("fully_reshardable")
    save_torch_dist(tmp_path, BF16, run, dist)
    assert len(wrong(load_and_step(tmp_path / ITERATION, BF16, run, dist), BF16)) > 10
