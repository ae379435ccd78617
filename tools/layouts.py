"""Train one tiny model under many layouts and compare every loss with one rank's.

    python -m tools.layouts [--steps 20] [--only NAME ...]

Prints a line for each layout with the largest relative difference of loss and gradient norm over all steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import torch

from launch.ranks import run_ranks
from parallel.layout import Layout
from parallel.mesh import build_mesh
from trainer.build import build_engine, execution_here
from trainer.data.batch import NEXT_TOKEN, NO_GROUP
from trainer.model.config import ModelConfig
from trainer.optimizer import OptimizerConfig
from trainer.step import train_step

TOLERANCE = 1e-5  # fp32 sums in another order, grown over the steps of a training run
SEQUENCE, VOCABULARY, GLOBAL_BATCH = 64, 259, 12


@dataclass(frozen=True)
class Case:
    """A layout to try, on how many ranks, with dense layers or experts."""

    name: str
    ranks: int
    layout: Layout
    moe: bool = False
    recompute: str = "none"


CASES = (
    Case("TP2", 2, Layout(tensor=2)),
    Case("TP4 (one head group a rank)", 4, Layout(tensor=4)),
    Case("TP2 SP", 2, Layout(tensor=2, sequence_parallel=True)),
    Case("PP2", 2, Layout(pipeline=2)),
    Case("PP2 x VPP2", 2, Layout(pipeline=2, virtual_pipeline=2)),
    Case("DP2, distributed optimizer", 2, Layout()),
    Case("DP2, plain optimizer", 2, Layout(distributed_optimizer=False)),
    Case("DP3, uneven shards", 3, Layout()),
    Case("CP2 all-gather", 2, Layout(context=2, context_kind="all_gather")),
    Case("CP2 ring", 2, Layout(context=2, context_kind="p2p")),
    Case("CP2 Ulysses", 2, Layout(context=2, context_kind="a2a")),
    Case("CP4 ring", 4, Layout(context=4, context_kind="p2p")),
    Case("recompute full", 2, Layout(tensor=2), recompute="full"),
    Case("TP2 SP x PP2 x DP2", 8, Layout(tensor=2, pipeline=2, sequence_parallel=True)),
    Case("TP2 SP x CP2 ring x DP2", 8, Layout(tensor=2, context=2, sequence_parallel=True)),
    Case("PP2 x VPP2 x CP2 x TP2", 8, Layout(tensor=2, pipeline=2, virtual_pipeline=2, context=2)),
    Case("EP2", 2, Layout(expert=2), moe=True),
    Case("EP2 x TP2 SP", 4, Layout(tensor=2, expert=2, sequence_parallel=True), moe=True),
    Case(
        "EP2 x PP2, plain optimizer", 4, Layout(pipeline=2, expert=2, distributed_optimizer=False), moe=True
    ),
)


@dataclass(frozen=True)
class RandomBatch:
    """Packed sequences of random tokens, documents of ragged lengths."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_weights: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor
    sources: torch.Tensor
    objectives: torch.Tensor
    groups: torch.Tensor


def random_batch(step: int, index: int) -> RandomBatch:
    """Sequence `index` of step `step`, [1, SEQUENCE]: the same in every layout."""
    generator = torch.Generator().manual_seed(step * 1000 + index)
    stream = torch.randint(VOCABULARY, (1, SEQUENCE + 1), generator=generator)
    stream = stream // (
        1 + 9 * (torch.arange(SEQUENCE + 1) % 3)
    )  # something to learn, so that the loss falls
    starts = torch.rand(1, SEQUENCE, generator=generator) < 0.1
    documents = starts.int().cumsum(1).int()
    last = torch.cat([documents[:, 1:] != documents[:, :-1], torch.zeros(1, 1, dtype=torch.bool)], 1)
    first = torch.where(starts, torch.arange(SEQUENCE), 0).cummax(1).values
    return RandomBatch(
        tokens=stream[:, :-1],
        labels=stream[:, 1:].contiguous(),
        loss_weights=(~last).float(),
        positions=torch.arange(SEQUENCE) - first,
        documents=documents,
        sources=torch.full((1, SEQUENCE), index % 2, dtype=torch.int32),
        objectives=torch.full((1, SEQUENCE), NEXT_TOKEN, dtype=torch.int32),
        groups=torch.full((1, SEQUENCE), NO_GROUP, dtype=torch.int32),
    )


def train(case: Case, steps: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step, on a rank of `case`."""
    mesh = build_mesh(case.layout)
    model = ModelConfig(preset="tiny-moe" if case.moe else "tiny").resolve(VOCABULARY)
    execution = execution_here(precision="fp32", recompute=case.recompute)  # type: ignore[arg-type]
    engine = build_engine(mesh, model, OptimizerConfig(lr=1e-3), execution, sequence_length=SEQUENCE, seed=1)
    curve = []
    for step in range(steps):
        share = range(mesh.data_rank, GLOBAL_BATCH, mesh.data)
        batches = [random_batch(step, index) for index in share]
        report = train_step(engine, batches, lr=1e-3, source_names=("even", "odd"))
        curve.append((report.loss, report.grad_norm))
    return curve


def compare(case: Case, reference: list[tuple[float, float]]) -> tuple[float, float]:
    """Largest relative difference of loss and of gradient norm from the reference curve."""
    curve = run_ranks(train, case.ranks, case, len(reference), deadline=300)[-1]
    pairs = list(zip(curve, reference, strict=True))
    return (
        max(abs(a[0] - b[0]) / abs(b[0]) for a, b in pairs),
        max(abs(a[1] - b[1]) / abs(b[1]) for a, b in pairs),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[], help="words that a layout's name must contain")
    arguments = parser.parse_args()
    cases = [case for case in CASES if all(word in case.name for word in arguments.only)]
    one = {
        moe: run_ranks(train, 1, Case("one", 1, Layout(), moe), arguments.steps, deadline=300)[0]
        for moe in {case.moe for case in cases}
    }
    print(f"{'layout':<30} {'ranks':>5} {'loss':>9} {'grad norm':>9}  {'seconds':>7}")
    worst = 0.0
    for case in cases:
        began = time.monotonic()
        loss, norm = compare(case, one[case.moe])
        worst = max(worst, loss)
        verdict = "" if loss <= TOLERANCE else "  TOO FAR"
        seconds = time.monotonic() - began
        line = f"{case.name:<30} {case.ranks:>5} {loss:9.1e} {norm:9.1e}  {seconds:7.1f}{verdict}"
        print(line, flush=True)
    print(f"largest relative loss difference {worst:.1e} over {len(cases)} layouts, allowed {TOLERANCE:.0e}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
