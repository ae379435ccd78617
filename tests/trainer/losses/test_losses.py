"""Auxiliary losses in a step: torch's numbers and gradients, on every layout."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from parallel.layout import Layout
from parallel.mesh import destroy_mesh
from parallel.slices import TensorSlice
from tests.marks import but_long
from tests.proof.gather import Wholes, copy_slices, different, whole_tensors
from tests.proof.worlds import SOURCES, batches, build
from tests.ranks import run_ranks
from tests.trainer.losses.worlds import LOSSES, Case, Found, opened, plain, stepped
from trainer.losses.auxiliary import AuxLossReport
from trainer.step import train_step

CASES = {
    "one rank": Case.of(1),
    "DP2": Case.of(2),
    "TP2": Case.of(2, Layout(tensor=2)),
    "TP2 SP": Case.of(2, Layout(tensor=2, sequence_parallel=True)),
    "PP2": Case.of(2, Layout(pipeline=2)),
    "PP2 x VPP2": Case.of(2, Layout(pipeline=2, virtual_pipeline=2)),
    "CP2": Case.of(2, Layout(context=2)),
    "TP2 x PP2 x CP2": Case.of(8, Layout(tensor=2, pipeline=2, context=2)),
}


def moments(ranks: list[list[TensorSlice]]) -> Wholes:
    """The first moments, which after one step are 0.1 x the gradient."""
    return {key: whole for key, whole in whole_tensors(ranks).items() if key[1] == "exp_avg"}


@pytest.fixture(scope="module")
def by_torch() -> tuple[dict[str, float], Wholes]:
    means, slices = run_ranks(plain, 1, CASES["one rank"])[0]
    return means, moments([slices])


# TP2 is in TP2 SP and PP2 in PP2 x VPP2; eight ranks put together what the others do one by one.
LONG = {"TP2", "PP2", "TP2 x PP2 x CP2"}


@pytest.mark.parametrize("name", but_long(CASES, LONG))
def test_losses_and_gradients_are_plain_torchs(by_torch: tuple[dict[str, float], Wholes], name: str) -> None:
    case = CASES[name]
    found: list[Found] = run_ranks(stepped, case.world.ranks, case)
    means, gradients = by_torch
    for rank in found:
        reports = {one.name: one.loss for one in rank.reports[0].auxiliary}
        assert reports == pytest.approx(means, rel=1e-5)  # fp32 sums in another order
    ours = moments([rank.slices for rank in found])
    assert ours.keys() == gradients.keys()
    for key, expected in gradients.items():
        # of the element, or of the largest one of its tensor: fp32 sums in another order
        torch.testing.assert_close(ours[key], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


# What it must not change


def without(case: Case) -> Found:
    engine = build(case.world)
    reports = [
        train_step(engine, batches(engine, number), lr=1e-3, source_names=SOURCES)
        for number in range(case.steps)
    ]
    return Found(reports, copy_slices(engine))


WEIGHTLESS = tuple({**one, "weight": 0.0} for one in LOSSES)
SAME = {
    "fp32": Case.of(1, losses=WEIGHTLESS, steps=3),
    "bf16, TP2": Case.of(2, Layout(tensor=2), losses=WEIGHTLESS, steps=3, precision="bf16"),
    "PP2, dropout": Case.of(2, Layout(pipeline=2), losses=WEIGHTLESS, steps=3, model={"hidden_dropout": 0.1}),
    "not yet": Case.of(1, losses=[{**LOSSES[0], "from_step": 3}], steps=3),
}


@pytest.mark.parametrize("name", SAME)
def test_a_loss_without_weight_changes_no_bit(name: str) -> None:
    case = SAME[name]
    on, off = (run_ranks(function, case.world.ranks, case) for function in (stepped, without))
    for a, b in zip(on, off, strict=True):
        assert [(r.loss, r.grad_norm, r.by_source) for r in a.reports] == [
            (r.loss, r.grad_norm, r.by_source) for r in b.reports
        ]
    wholes = [whole_tensors([rank.slices for rank in ranks]) for ranks in (on, off)]
    assert different(*wholes) == []


# What it means


def kl_reports(case: Case) -> list[AuxLossReport]:
    return [report.auxiliary[0] for report in stepped(case).reports]


START = {
    "fp32": Case.of(1, losses=[LOSSES[0]], seed=1, steps=3),
    "bf16, TP2": Case.of(2, Layout(tensor=2), losses=[LOSSES[0]], seed=1, steps=3, precision="bf16"),
    "top-k, PP2": Case.of(2, Layout(pipeline=2), losses=[LOSSES[2]], seed=1, steps=3),
}


@pytest.mark.parametrize("name", START)
def test_the_divergence_from_the_start_begins_at_zero(name: str) -> None:
    case = START[name]
    for reports in run_ranks(kl_reports, case.world.ranks, case):
        # A top-k spreads its rest by a difference of logarithms, which fp32 rounds.
        assert abs(reports[0].loss) <= (1e-7 if "top-k" in name else 0.0)
        assert reports[1].loss > 1e-6
        assert reports[2].loss > reports[1].loss


def routed_gradients(case: Case) -> dict[str, list[torch.Tensor]]:
    """Gradients of a step whose tokens count only where they are of the named source."""
    found = {}
    for name, losses in (("with", case.losses), ("without", ())):
        engine = build(case.world)
        step = opened(dataclasses.replace(case, losses=losses), engine).at(0)
        parts = [part for part in batches(engine, 0) if int(part.sources[0, 0]) == 0]
        train_step(engine, parts, lr=1e-3, source_names=SOURCES, losses=step)
        found[name] = [piece.data for piece in copy_slices(engine) if piece.state == "exp_avg"]
        destroy_mesh()
    return found


def test_tokens_of_other_sources_contribute_nothing() -> None:
    """Only even sequences, and a loss on odd ones: the gradient is that of the cross-entropy, bit for bit."""
    case = Case.of(1, losses=[LOSSES[0], {"kind": "z", "weight": 1.0, "sources": ["odd"]}])
    found = run_ranks(routed_gradients, 1, case)[0]
    assert all(torch.equal(a, b) for a, b in zip(found["with"], found["without"], strict=True))


def none_of_them(case: Case) -> tuple[float, dict[str, float], float]:
    """A loss of which the first data rank has no token, or the whole step has none."""
    engine = build(case.world)
    losses = opened(case, engine)
    parts = [part for part in batches(engine, 0) if int(part.sources[0, 0]) == 0 or engine.mesh.data_rank]
    first = train_step(engine, parts[:2], lr=1e-3, source_names=SOURCES, losses=losses.at(0)).auxiliary[0]
    parts = [dataclasses.replace(part, sources=torch.zeros_like(part.sources)) for part in parts[:2]]
    second = train_step(engine, parts, lr=1e-3, source_names=SOURCES, losses=losses.at(1))
    assert math.isfinite(second.loss)
    return first.loss, dict(second.auxiliary[0].by_source), second.auxiliary[0].loss


@pytest.mark.parametrize(
    ("preset", "layout"), [("tiny", Layout()), ("tiny-moe", Layout(expert=2)), ("tiny", Layout(pipeline=2))]
)
def test_a_step_without_tokens_of_a_loss_goes_on(preset: str, layout: Layout) -> None:
    case = Case.of(2, layout, losses=[LOSSES[0], LOSSES[2]], preset=preset)
    for first, by_source, mean in run_ranks(none_of_them, 2, case):
        assert math.isfinite(first) == (layout.pipeline == 1)
        assert by_source == {}
        assert math.isnan(mean)


def reports_of(case: Case) -> Any:
    return stepped(case).reports[0]


def test_reports_are_means_by_source_over_the_global_batch() -> None:
    case = Case.of(2, losses=[{"kind": "z", "weight": 1e-3}])
    report = run_ranks(reports_of, 2, case)[0]
    (z,) = report.auxiliary
    assert set(z.by_source) == set(SOURCES)
    counts = [tokens for _, tokens in report.by_source]
    mean = sum(z.by_source[name] * count for name, count in zip(SOURCES, counts, strict=True)) / sum(counts)
    assert z.loss == pytest.approx(mean, rel=1e-12)
