"""A reference on another layout of the same ranks says what it says on the layout of the training."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from parallel.layout import Layout
from tests.marks import but_long
from tests.proof.gather import Wholes, whole_tensors
from tests.ranks import run_ranks
from tests.trainer.losses.worlds import Case, Found, stepped

LOSSES = (
    {"kind": "kl", "weight": 0.5, "sources": ["odd"], "top_k": 16},
    {
        "kind": "kl",
        "name": "reverse",
        "weight": 0.3,
        "direction": "reverse",
        "temperature": 2.0,
        "top_k": 259,
    },
)
LAYOUTS = {  # of the training, of the reference
    "TP2 on DP2": (2, Layout(tensor=2), Layout()),
    "DP2 on TP2 SP": (2, Layout(), Layout(tensor=2, sequence_parallel=True)),
    "PP2 on CP2": (2, Layout(pipeline=2), Layout(context=2)),
    "CP2 on PP2": (2, Layout(context=2), Layout(pipeline=2)),
    "VPP2 on DP2": (2, Layout(pipeline=2, virtual_pipeline=2), Layout()),
    "TP2 PP2 on CP2 DP2": (4, Layout(tensor=2, pipeline=2), Layout(context=2)),
}


def case(ranks: int, layout: Layout, reference: Layout | None) -> Case:
    added = {} if reference is None else {"layout": dataclasses.asdict(reference)}
    return Case.of(ranks, layout, losses=[{**one, **added} for one in LOSSES], steps=2)


def weights(found: list[Found]) -> Wholes:
    return whole_tensors([rank.slices for rank in found])


LONG = {"VPP2 on DP2", "TP2 PP2 on CP2 DP2"}


@pytest.mark.parametrize("name", but_long(LAYOUTS, LONG))
def test_the_layout_of_the_reference_does_not_matter(name: str) -> None:
    ranks, layout, reference = LAYOUTS[name]
    same = run_ranks(stepped, ranks, case(ranks, layout, None))
    other = run_ranks(stepped, ranks, case(ranks, layout, reference))
    for a, b in zip(same, other, strict=True):
        for x, y in zip(a.reports, b.reports, strict=True):
            means = [one.loss for one in x.auxiliary]
            # fp32 knows log-probabilities of 5.6, whose differences these are, to 2.4e-7
            assert [one.loss for one in y.auxiliary] == pytest.approx(means, rel=1e-5, abs=2.4e-7)
            assert y.grad_norm == pytest.approx(x.grad_norm, rel=1e-5)
    expected, found = weights(same), weights(other)
    for key, whole in expected.items():
        if key[1] == "exp_avg":
            torch.testing.assert_close(found[key], whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
