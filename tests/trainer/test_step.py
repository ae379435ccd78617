"""One step: what the loss is, and what does not change it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch

from parallel.layout import Layout
from tests.proof.gather import copy_slices, same_bits
from tests.proof.worlds import GLOBAL_BATCH, SOURCES, World, batches, build, step
from tests.ranks import run_ranks
from tools.layouts import RandomBatch
from trainer.loss import token_loss
from trainer.step import LossReport, evaluate, mean_losses, train_step


def joined(parts: list[RandomBatch]) -> RandomBatch:
    """Several sequences as one micro-batch."""
    columns = [torch.cat(column) for column in zip(*(vars(part).values() for part in parts), strict=True)]
    return RandomBatch(*columns)


def one_rank(function: Callable[..., object], *args: object) -> object:
    return run_ranks(function, 1, *args)[0]


# What the loss is


def loss_by_hand() -> tuple[LossReport, float, list[float]]:
    """The report of a step, and the same from torch's cross-entropy over the logits of every token."""
    engine = build(World())
    logits = []
    hook = engine.chunks[0].output_layer.register_forward_hook(
        lambda module, inputs, output: logits.append(output[0].detach().transpose(0, 1).double())
    )
    parts = batches(engine, 0)
    report = evaluate(engine, parts, num_sources=2)
    hook.remove()
    sums, counts = torch.zeros(2, dtype=torch.double), torch.zeros(2, dtype=torch.double)
    for part, scores in zip(parts, logits, strict=True):
        each = torch.nn.functional.cross_entropy(
            scores.flatten(0, 1), part.labels.flatten(), reduction="none"
        )
        sums.index_add_(0, part.sources.flatten(), each * part.loss_weights.flatten())
        counts.index_add_(0, part.sources.flatten(), part.loss_weights.flatten().double())
    return report, float(sums.sum() / counts.sum()), (sums / counts).tolist()


def test_the_loss_is_the_mean_cross_entropy_of_valid_tokens() -> None:
    report, whole, by_source = one_rank(loss_by_hand)
    assert report.loss == pytest.approx(whole, rel=1e-6)  # fp32
    assert [loss for loss, _ in report.by_source] == pytest.approx(by_source, rel=1e-6)
    assert sum(tokens for _, tokens in report.by_source) == report.tokens


def test_token_loss_reports_by_source() -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], requires_grad=True)
    weights = torch.tensor([[1.0, 0.0, 1.0], [0.5, 1.0, 0.0]])
    sources = torch.tensor([[0, 0, 2], [2, 2, 1]])
    total, report = token_loss(4)(losses, weights, sources)
    assert float(total) == 1 + 3 + 2 + 5
    assert report.tolist() == [[1.0, 1.0], [0.0, 0.0], [10.0, 2.5], [0.0, 0.0]]
    assert report.dtype == torch.float64
    total.backward()
    assert torch.equal(losses.grad, weights)


def test_a_source_without_tokens_has_no_loss() -> None:
    report = mean_losses(torch.tensor([[6.0, 3.0], [0.0, 0.0]], dtype=torch.float64))
    assert (report.loss, report.tokens, report.by_source[0]) == (2.0, 3.0, (2.0, 3.0))
    assert math.isnan(report.by_source[1][0])
    assert report.by_source[1][1] == 0.0


# What does not change it


def steps_with(micro_batch: int, recompute: str = "none", ranks: int = 1) -> list[float]:
    """Losses and norms of two steps with so many sequences a micro-batch."""
    layout = Layout(tensor=ranks, sequence_parallel=ranks > 1)
    engine = build(World(ranks, layout, recompute=recompute))
    found = []
    for number in range(2):
        parts = batches(engine, number)
        grouped = [joined(parts[at : at + micro_batch]) for at in range(0, GLOBAL_BATCH, micro_batch)]
        report = train_step(engine, grouped, lr=1e-3, source_names=SOURCES)
        found += [report.loss, report.grad_norm]
    return found


@pytest.mark.parametrize("micro_batch", [2, 3, 6])
def test_the_micro_batch_does_not_change_the_step(micro_batch: int) -> None:
    """A mean of means would weigh sequences with few valid tokens too much: off by 1e-3 and more."""
    # fp32 adds in another order; the norm of the second step has an update behind it.
    assert one_rank(steps_with, micro_batch) == pytest.approx(kept(1)[0], rel=2e-6)


@functools.cache
def kept(ranks: int) -> object:
    return run_ranks(steps_with, ranks, 1, "none", ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_are_the_same_bits(recompute: str, ranks: int) -> None:
    assert run_ranks(steps_with, ranks, 1, recompute, ranks) == kept(ranks)


def count_attentions(recompute: str) -> tuple[int, int]:
    """How often attention and the MLP of one layer run in one step of one micro-batch."""
    engine = build(World(recompute=recompute))
    layer, counts = engine.chunks[0].decoder.layers[0], [0, 0]

    def counter(index: int) -> Callable[..., None]:
        def count(*_: object) -> None:
            counts[index] += 1

        return count

    layer.self_attention.core_attention.register_forward_hook(counter(0))
    layer.mlp.register_forward_hook(counter(1))
    train_step(engine, batches(engine, 0)[:1], lr=1e-3, source_names=SOURCES)
    return counts[0], counts[1]


@pytest.mark.parametrize(("recompute", "counts"), [("none", (1, 1)), ("selective", (2, 1)), ("full", (2, 2))])
def test_recompute_recomputes(recompute: str, counts: tuple[int, int]) -> None:
    assert one_rank(count_attentions, recompute) == counts


def evaluate_between() -> dict[str, object]:
    """A training step with an evaluation before it and after it, under dropout."""
    engine = build(World(model={"hidden_dropout": 0.2}))
    parts = batches(engine, 0)
    first = evaluate(engine, parts, num_sources=2)
    held = copy_slices(engine)
    second = evaluate(engine, parts, num_sources=2)
    touched = not all(same_bits(a.data, b.data) for a, b in zip(held, copy_slices(engine), strict=True))
    train_losses = {step(engine, 0, lr=0.0).loss for _ in range(2)}
    return {"first": first, "second": second, "touched": touched, "train": train_losses}


def test_an_evaluation_has_no_dropout_and_leaves_no_trace() -> None:
    found = one_rank(evaluate_between)
    assert found["first"] == found["second"]
    assert not found["touched"]
    assert len(found["train"]) == 2, "dropout is on again in training"
    assert found["first"].loss not in found["train"]


def evaluate_then_train(world: World) -> tuple[float, float]:
    engine = build(world)
    return evaluate(engine, batches(engine, 0), num_sources=2).loss, step(engine, 0).loss


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2, pipeline=2), Layout(context=2)], ids=str)
def test_an_evaluation_is_the_loss_of_a_step_without_the_step(layout: Layout) -> None:
    world = World(layout.model_parallel, layout)
    for evaluated, trained in run_ranks(evaluate_then_train, world.ranks, world):
        assert evaluated == trained
