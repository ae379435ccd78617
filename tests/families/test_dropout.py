"""Dropout: the same again from the same seed, and different where ranks hold different things."""

from __future__ import annotations

import pytest
import torch

from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.families.batches import packed_batch, rows_of
from tests.ranks import run_ranks
from trainer.build import build_engine, execution_here
from trainer.model.config import ModelConfig
from trainer.optimizer import OptimizerConfig
from trainer.step import evaluate, train_step

DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
LAYOUTS = {
    "one rank": (1, Layout()),
    "TP2": (2, Layout(tensor=2)),
    "TP2 SP": (2, Layout(tensor=2, sequence_parallel=True)),
    "PP2": (2, Layout(pipeline=2)),
    "DP2": (2, Layout()),
}
Trained = tuple[list[tuple[float, float]], float]


def train(layout: Layout, dropout: dict[str, float], seed: int, recompute: str) -> Trained:
    """Loss and gradient norm of three steps, and the loss on the same sequences in evaluation."""
    torch.set_num_threads(1)
    mesh = build_mesh(layout, seed=seed)
    model = ModelConfig(preset="tiny", hidden_size=32, ffn_hidden_size=64, **dropout).resolve(67)
    execution = execution_here(precision="fp32", recompute=recompute)
    engine = build_engine(mesh, model, OptimizerConfig(lr=1e-3), execution, sequence_length=32, seed=1)
    batch = packed_batch(67)
    share = [rows_of(batch, row, row + 1) for row in range(mesh.data_rank, 4, mesh.data)]
    curve = []
    for _ in range(3):
        report = train_step(engine, share, lr=1e-3, source_names=("text",))
        curve.append((report.loss, report.grad_norm))
    return curve, evaluate(engine, share, num_sources=1).loss


def run(layout: str, dropout: dict[str, float], *, seed: int = 1, recompute: str = "none") -> Trained:
    ranks, degrees = LAYOUTS[layout]
    return run_ranks(train, ranks, degrees, dropout, seed, recompute)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_seed_drops_the_same(layout):
    curve, evaluated = run(layout, DROPOUT)
    assert run(layout, DROPOUT) == (curve, evaluated)
    assert run(layout, DROPOUT, seed=2)[0] != curve


@pytest.mark.parametrize("kind", DROPOUT)
def test_each_dropout_drops(kind):
    assert run("one rank", {kind: 0.2})[0][0] != run("one rank", {})[0][0]


def test_without_dropout_the_seed_of_the_streams_is_not_used():
    assert run("one rank", {}, seed=1) == run("one rank", {}, seed=2)


@pytest.mark.parametrize("layout", ["one rank", "TP2"])
def test_recomputation_drops_the_same_again(layout):
    assert run(layout, DROPOUT, recompute="full") == run(layout, DROPOUT)


def mask(layout: Layout) -> list[float]:
    """The first mask that this rank draws for what its tensor ranks hold alike."""
    build_mesh(layout, seed=1)
    return torch.nn.functional.dropout(torch.ones(64), 0.5).tolist()


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(pipeline=2), Layout(context=2)], ids=["DP2", "PP2", "CP2"]
)
def test_ranks_with_other_tokens_or_layers_drop_otherwise(layout):
    """One mask for all data ranks, or for the first layer of every stage, is less noise than asked for."""
    first, second = run_ranks(mask, 2, layout)
    assert first != second


def test_tensor_ranks_drop_the_same_of_what_they_all_hold():
    first, second = run_ranks(mask, 2, Layout(tensor=2))
    assert first == second
