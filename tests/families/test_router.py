"""The router's load-balancing loss: by its formula on one rank, and the same in every layout."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.families.batches import SEQUENCE, packed_batch, rows_of
from tests.families.cases import plain, saved_model
from tests.families.compare import difference, run_engine
from tests.families.reference import Outcome, logical_tensors, weights
from tests.ranks import run_ranks
from trainer.build import build_engine, execution_here
from trainer.model.config import ModelConfig
from trainer.optimizer import OptimizerConfig
from trainer.step import train_step

# Strong, so that a wrong share of it shows: it moves the gradient of the routers by as much as the loss does.
COEFFICIENT = 1.0
CURVE_LAYOUTS = {
    "micro-batches of 2": (1, 2, Layout()),
    "DP2": (2, 1, Layout()),
    "EP2": (2, 1, Layout(expert=2)),
    "CP2": (2, 1, Layout(context=2)),
    "EP2 x CP2, micro-batches of 2": (2, 2, Layout(context=2, expert=2)),
    "TP2 SP": (2, 1, Layout(tensor=2, sequence_parallel=True)),
    "PP2": (2, 1, Layout(pipeline=2)),
    "TP2 SP x EP2": (4, 2, Layout(tensor=2, expert=2, sequence_parallel=True)),
}


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, plain()),
        (2, plain(expert=2)),
        (2, plain(context=2)),
        (2, plain(tensor=2, sequence_parallel=True)),
    ],
    ids=["one rank", "EP2", "CP2", "TP2 SP"],
)
def test_balancing_loss_has_the_gradient_of_its_formula(ranks, layout, tmp_path):
    model, folder = saved_model("mixtral", tmp_path)
    batch = packed_batch(67, documents=((SEQUENCE,),) * 4)
    given = ModelConfig(hf=str(folder), router_aux_loss_coefficient=COEFFICIENT).resolve()
    found = difference(run_engine(given, layout, ranks, weights(model), batch), _expected(model, batch))
    assert found.gradient <= 3e-5, found  # as in test_families.py


def _expected(model, batch) -> Outcome:
    """Switch Transformer's loss (arXiv 2101.03961, equation 4) of every sequence and layer, by autograd."""
    output = model(batch.tokens, output_router_logits=True)
    losses = F.cross_entropy(output.logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    weight = batch.loss_weights
    loss = (losses * weight.flatten()).sum() / weight.sum()
    balance = sum(
        _balance(logits, model.config.num_experts_per_tok)
        for layer in output.router_logits
        for logits in layer.view(*batch.tokens.shape, -1)
    )
    (loss + COEFFICIENT * balance * SEQUENCE / weight.sum()).backward()
    gradients = logical_tensors(model, lambda parameter: parameter.grad)
    return Outcome(output.logits.detach(), float(loss.detach()), gradients)


def _balance(logits: torch.Tensor, chosen: int) -> torch.Tensor:
    """The number of experts times the sum of share of the choices x mean probability: logits [s, experts]."""
    probabilities = logits.softmax(-1)
    choices = torch.zeros_like(logits).scatter(1, probabilities.topk(chosen).indices, 1.0)
    return logits.shape[1] * (choices.mean(0) / chosen * probabilities.mean(0)).sum()


def train(
    layout: Layout, size: int, coefficient: float, kind: str = "seq_aux_loss"
) -> list[tuple[float, float]]:
    """Loss and gradient norm of some steps."""
    torch.set_num_threads(1)
    mesh = build_mesh(layout)
    given = ModelConfig(
        preset="tiny-moe",
        num_layers=2,
        hidden_size=32,
        init_std=0.1,
        router_aux_loss_coefficient=coefficient,
        router_aux_loss_type=kind,
    )
    optimizer = OptimizerConfig(lr=3e-3)
    execution = execution_here(precision="fp32")
    engine = build_engine(mesh, given.resolve(67), optimizer, execution, sequence_length=SEQUENCE, seed=1)
    curve = []
    for step in range(6):
        batch = packed_batch(67, seed=step)
        rows = range(mesh.data_rank * size, 4, mesh.data * size)
        share = [rows_of(batch, row, row + size) for row in rows]
        report = train_step(engine, share, lr=3e-3, source_names=("text",))
        curve.append((report.loss, report.grad_norm))
    return curve


@functools.cache
def one_rank(coefficient: float) -> list[tuple[float, float]]:
    return run_ranks(train, 1, Layout(), 1, coefficient)[0]


@pytest.mark.parametrize("layout", CURVE_LAYOUTS)
def test_training_with_a_balancing_loss_does_not_depend_on_the_layout(layout):
    ranks, size, degrees = CURVE_LAYOUTS[layout]
    curve = run_ranks(train, ranks, degrees, size, COEFFICIENT)[0]
    for ours, expected in zip(curve, one_rank(COEFFICIENT), strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)  # float32 sums in another order, over six updates


@pytest.mark.parametrize("layout", [Layout(context=2), Layout(tensor=2, sequence_parallel=True)])
def test_balancing_micro_batches_of_one_sequence_is_balancing_sequences(layout):
    curve = run_ranks(train, 2, layout, 1, COEFFICIENT, "aux_loss")[0]
    for ours, expected in zip(curve, one_rank(COEFFICIENT), strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)


def test_the_balancing_loss_shows_in_the_curve():
    """Otherwise the comparison above would pass without it."""
    assert one_rank(0.0)[-1][0] != pytest.approx(one_rank(COEFFICIENT)[-1][0], rel=1e-4)
    assert one_rank(0.0)[0][1] != pytest.approx(one_rank(COEFFICIENT)[0][1], rel=1e-2)
