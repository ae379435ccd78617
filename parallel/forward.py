"""Micro-batches through the pipeline: context slices, megatron-core's schedule, the loss at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from parallel.context import context_slice
from parallel.engine import Engine
from parallel.mesh import Mesh


class Batch(Protocol):
    """A micro-batch of whole sequences, [b, s] each, as docs/design.md describes them."""

    @property
    def tokens(self) -> torch.Tensor: ...
    @property
    def labels(self) -> torch.Tensor: ...
    @property
    def loss_weights(self) -> torch.Tensor: ...
    @property
    def positions(self) -> torch.Tensor: ...
    @property
    def documents(self) -> torch.Tensor: ...
    @property
    def sources(self) -> torch.Tensor: ...
    @property
    def objectives(self) -> torch.Tensor: ...
    @property
    def groups(self) -> torch.Tensor: ...


# (losses of every token, loss weights, sources: [b, s/CP] each) -> (sum to differentiate, report)
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class LastStage:
    """What the last stage knows of a micro-batch: this context rank's positions.

    Attributes:
        number: of the micro-batch among those of the step, from 0.
        logits: fp32 [b, s/CP, V/TP], this tensor rank's columns; padded ones are the lowest number there is.
        loss_weights: float32 [b, s/CP].
        sources: int32 [b, s/CP].
        objectives: int32 [b, s/CP].
        groups: int32 [b, s/CP].
    """

    number: int
    logits: torch.Tensor
    loss_weights: torch.Tensor
    sources: torch.Tensor
    objectives: torch.Tensor
    groups: torch.Tensor


# what else is summed and differentiated besides the loss -> (sum, columns to append to the loss's report)
LogitsLoss = Callable[[LastStage], tuple[torch.Tensor, torch.Tensor]]


class Model(Protocol):
    """What can be run forward: an `Engine`, or a `parallel.frozen.FrozenModel`."""

    @property
    def mesh(self) -> Mesh: ...
    @property
    def chunks(self) -> Sequence[Any]: ...
    @property
    def wrapped(self) -> Sequence[Any]: ...


def run_micro_batches(
    engine: Model,
    batches: Sequence[Batch],
    loss: Loss,
    *,
    forward_only: bool = False,
    document_mask: bool = True,
    on_logits: LogitsLoss | None = None,
) -> list[torch.Tensor]:
    """Forward, and unless `forward_only` backward, of this data rank's micro-batches of one step.

    Args:
        loss: called on the last stage once a micro-batch.
        document_mask: attention stays inside a document; otherwise it sees the whole sequence before it.
        on_logits: called after `loss`, where something needs the logits, which are then kept: what it returns
            is added. The numbers of `loss` stay the same, bit for bit.

    Returns:
        The reports of `loss`, one a micro-batch, on the last pipeline stage; nothing elsewhere.
    """

    def finish(step: _MicroStep, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        columns = step.mine(step.batch.loss_weights), step.mine(step.batch.sources)
        if on_logits is None:
            return loss(output, *columns)
        losses = _cross_entropy(engine.chunks[-1], step.mine(step.batch.labels), output)
        total, report = loss(losses, *columns)
        others = step.mine(step.batch.objectives), step.mine(step.batch.groups)
        more, further = on_logits(LastStage(step.number, output, *columns, *others))
        return total + more, torch.cat([report, further], 1)

    forward = partial(_forward_step, model=engine, finish=finish, with_labels=on_logits is None)
    return _run(engine, batches, partial(forward, document_mask=document_mask), forward_only=forward_only)


@torch.no_grad()
def forward_logits(
    model: Model,
    batches: Sequence[Batch],
    keep: Callable[[int, torch.Tensor], None],
    *,
    document_mask: bool = True,
) -> None:
    """Run micro-batches forward; on the last stage `keep` gets the number of each and its logits.

    The logits are fp32 [b, s/CP, V/TP] as in `LastStage`.
    """

    def finish(step: _MicroStep, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keep(step.number, output)
        return output.new_zeros(()), output.new_zeros(())

    forward = partial(_forward_step, model=model, finish=finish, with_labels=False)
    _run(model, batches, partial(forward, document_mask=document_mask), forward_only=True)


def _run(
    model: Model, batches: Sequence[Batch], forward: Callable[..., Any], *, forward_only: bool
) -> list[Any]:
    """megatron-core's schedule for this layout; returns the reports."""
    micro_batch, length = batches[0].tokens.shape
    chunks = model.wrapped
    for chunk in chunks:
        chunk.train(not forward_only)
    steps = [iter(enumerate(batches)) for _ in chunks]
    single = len(chunks) == 1
    reports: list[Any] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=steps[0] if single else steps,
        model=chunks[0] if single else chunks,
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=micro_batch,
        forward_only=forward_only,
    )
    return reports


@dataclass(frozen=True)
class _MicroStep:
    """A micro-batch on its way through this rank."""

    number: int
    batch: Batch
    mesh: Mesh

    def mine(self, column: torch.Tensor) -> torch.Tensor:
        """This context rank's share of a [b, s] column, on its device.

        From pinned memory, since a copy from any other waits for what the device is doing.
        """
        mesh = self.mesh
        part = context_slice(column, 1, mesh.context_rank, mesh.layout.context).contiguous()
        return part.pin_memory().to(mesh.device, non_blocking=True) if mesh.device.type == "cuda" else part


_Finish = Callable[[_MicroStep, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _forward_step(
    batches: Iterator[tuple[int, Batch]],
    chunk: Any,
    *,
    model: Model,
    finish: _Finish,
    document_mask: bool,
    with_labels: bool,
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """What megatron-core's schedules call for every micro-batch and chunk."""
    step = _MicroStep(*next(batches), model.mesh)
    output = chunk(
        input_ids=step.mine(step.batch.tokens),
        position_ids=step.mine(step.batch.positions),
        # On the host, where attention is planned: reading them back would wait for the device.
        attention_mask=step.batch.documents if document_mask else None,
        labels=step.mine(step.batch.labels)
        if with_labels
        else None,  # without, the model ends with its logits
    )

    def reduce(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total, report = finish(step, output)
        return total, torch.zeros((), dtype=torch.int, device=model.mesh.device), report

    return output, reduce


def _cross_entropy(chunk: Any, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The model's own loss of every token [b, s/CP] from its logits [b, s/CP, V/TP].

    On a copy, since megatron-core's cross-entropy overwrites fp32 logits.
    """
    copy = logits.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    losses: torch.Tensor = chunk.compute_language_model_loss(labels, copy)
    return losses


def sum_over_data(engine: Engine, value: float) -> float:
    """Sum of a number over the data ranks, each of which has its own micro-batches.

    From host to host, so that nobody waits for the devices.
    """
    total = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(total, group=engine.mesh.groups.dp)
    return float(total)


def sum_reports(engine: Engine, reports: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Sum of a step's reports over micro-batches, context and data ranks: float64 `shape`, on every rank."""
    total = torch.zeros(shape, dtype=torch.float64, device=engine.mesh.device)
    if engine.mesh.is_last_stage and engine.mesh.tensor_rank == 0:  # tensor ranks have the same losses
        for report in reports:
            total += report
    torch.distributed.all_reduce(total)
    return total.cpu()


def gather_texts(text: str) -> list[str]:
    """Every rank's text, in the order of ranks, on every rank."""
    texts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(texts, text)
    return texts
