"""The same computation by our engine, on the ranks of a layout, and how far two computations are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from parallel.context import context_spans
from parallel.engine import Engine
from parallel.forward import run_micro_batches, sum_reports
from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.families.batches import rows_of
from tests.families.reference import Outcome, Tensors
from tests.ranks import run_ranks
from trainer.build import build_engine, execution_here
from trainer.data.batch import MicroBatch
from trainer.loss import token_loss
from trainer.model.architecture import Architecture
from trainer.optimizer import OptimizerConfig


@dataclass(frozen=True)
class Part:
    """A box of the logits or of a gradient, from one rank."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: torch.Tensor


@dataclass(frozen=True)
class Job:
    """What every rank computes; each takes its share of the batch's sequences."""

    model: Architecture
    layout: Layout
    weights: Tensors
    batch: MicroBatch
    precision: str = "fp32"


def run_engine(
    model: Architecture, layout: Layout, world_size: int, weights: Tensors, batch: MicroBatch, **options: Any
) -> Outcome:
    """Logits, loss and gradients of the engine on `world_size` ranks, put together from their parts.

    Raises:
        AssertionError: for parts that contradict each other or leave a hole.
    """
    job = Job(model, layout, weights, batch, **options)
    answers = run_ranks(_run_rank, world_size, job)
    tensors = _assemble([part for parts, _ in answers for part in parts])
    losses = {loss for _, loss in answers}
    assert len(losses) == 1, f"the ranks report different losses: {losses}"
    return Outcome(tensors.pop("logits"), losses.pop(), tensors)


def _run_rank(job: Job) -> tuple[list[Part], float]:
    torch.set_num_threads(1)  # tensors are tiny: threads would wait for each other, not compute
    mesh = build_mesh(job.layout)
    execution = execution_here(precision=job.precision)
    length = job.batch.tokens.shape[1]
    engine = build_engine(
        mesh, job.model, OptimizerConfig(lr=1e-3), execution, sequence_length=length, seed=1
    )
    fill(engine, job.weights)
    size = 2 if mesh.data * job.layout.pipeline <= 2 else 1  # the batch of four must fill ranks and stages
    starts = range(mesh.data_rank * size, len(job.batch.tokens), mesh.data * size)
    micro_batches = [rows_of(job.batch, start, start + size) for start in starts]
    logits = record_logits(engine)
    engine.zero_grad()
    engine.scale_loss(1.0 / float(job.batch.loss_weights.sum()))
    reports = run_micro_batches(engine, micro_batches, token_loss(1))
    total = sum_reports(engine, reports, (1, 2))[0]
    parts = [
        part
        for start, local in zip(starts, logits, strict=False)
        for part in _logits_parts(engine, start, local, (*job.batch.tokens.shape, job.model.vocab_size))
    ]
    return parts + _gradient_parts(engine), float(total[0] / total[1])


@torch.no_grad()
def fill(engine: Engine, weights: Tensors) -> None:
    """Write whole logical tensors into the boxes that this rank holds."""
    for entry in engine.named:
        for block in entry.blocks:
            whole = weights[block.name]
            assert tuple(whole.shape) == block.shape, f"{block.name}: {tuple(whole.shape)} for {block.shape}"
            box = tuple(slice(o, o + n) for o, n in zip(block.offset, block.size, strict=True))
            block.view(entry.parameter.data).copy_(whole[box])
    engine.weights_changed()


def record_logits(engine: Engine) -> list[torch.Tensor]:
    """A list that receives the local logits [b, s/cp, vocab/tp] of every micro-batch on the last stage."""
    recorded: list[torch.Tensor] = []

    def record(_module: Any, _inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
        recorded.append(output[0].detach().transpose(0, 1).clone())  # the loss works in place on it

    if engine.mesh.is_last_stage:
        engine.chunks[-1].output_layer.register_forward_hook(record)
    return recorded


def _logits_parts(engine: Engine, row: int, local: torch.Tensor, shape: tuple[int, ...]) -> list[Part]:
    """Boxes of the whole logits `shape` from a micro-batch that begins at sequence `row`."""
    mesh, parts, done = engine.mesh, [], 0
    first = mesh.tensor_rank * local.shape[2]
    present = min(local.shape[2], shape[2] - first)  # the rest is padding
    for start, end in context_spans(shape[1], mesh.context_rank, mesh.layout.context):
        data = local[:, done : done + end - start, :present].clone()
        parts.append(Part("logits", shape, (row, start, first), data))
        done += end - start
    return parts


def _gradient_parts(engine: Engine) -> list[Part]:
    return [
        Part(block.name, block.shape, block.offset, block.view(entry.parameter.main_grad).clone())  # type: ignore[attr-defined]
        for entry in engine.named
        for block in entry.blocks
    ]


def _assemble(parts: list[Part]) -> Tensors:
    tensors: Tensors = {}
    for part in parts:
        if part.name not in tensors:
            tensors[part.name] = torch.full(part.shape, float("nan"), dtype=part.data.dtype)
        sizes = part.data.shape
        box = tuple(slice(o, o + n) for o, n in zip(part.offset, sizes, strict=True))
        there = tensors[part.name][box]
        assert there.isnan().all() or torch.equal(there, part.data), f"the ranks disagree about {part.name}"
        tensors[part.name][box] = part.data
    holes = [name for name, tensor in tensors.items() if tensor.isnan().any()]
    assert not holes, f"no rank has all of {holes}"
    return tensors


@dataclass(frozen=True)
class Difference:
    """How far one outcome is from another: largest difference over largest absolute value.

    Attributes:
        gradient: of the parameter that is farthest apart, `parameter`.
    """

    logits: float
    loss: float
    gradient: float
    parameter: str

    @property
    def largest(self) -> float:
        return max(self.logits, self.loss, self.gradient)


def difference(actual: Outcome, expected: Outcome) -> Difference:
    """Compare two outcomes; both must have gradients of the same parameters.

    A gradient is measured against the largest of its own tensor, so that small ones count as much.
    """
    assert actual.gradients.keys() == expected.gradients.keys()
    apart = {
        name: relative(gradient, expected.gradients[name]) for name, gradient in actual.gradients.items()
    }
    parameter = max(apart, key=lambda name: apart[name])
    return Difference(
        logits=relative(actual.logits, expected.logits),
        loss=abs(actual.loss - expected.loss) / abs(expected.loss),
        gradient=apart[parameter],
        parameter=parameter,
    )


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value expected."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
