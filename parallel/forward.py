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
    """

    number: int
    logits: torch.Tensor
    loss_weights: torch.Tensor
    sources: torch.Tensor


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
    micro_batch, length = batches[0].tokens.shape
    chunks = engine.wrapped
    for chunk in chunks:
        chunk.train(not forward_only)
    steps = [iter(enumerate(batches)) for _ in chunks]
    single = len(chunks) == 1
    forward = partial(
        _forward_step, engine=engine, loss=loss, document_mask=document_mask, on_logits=on_logits
    )
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


def _forward_step(
    batches: Iterator[tuple[int, Batch]],
    chunk: Any,
    *,
    engine: Model,
    loss: Loss,
    document_mask: bool,
    on_logits: LogitsLoss | None,
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """What megatron-core's schedules call for every micro-batch and chunk."""
    (number, batch), device = next(batches), engine.mesh.device

    def mine(column: torch.Tensor) -> torch.Tensor:
        """This context rank's share of a [b, s] column, on its device.

        From pinned memory, since a copy from any other waits for what the device is doing.
        """
        part = context_slice(column, 1, engine.mesh.context_rank, engine.mesh.layout.context).contiguous()
        return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part

    labels = mine(batch.labels)
    output = chunk(
        input_ids=mine(batch.tokens),
        position_ids=mine(batch.positions),
        # On the host, where attention is planned: reading them back would wait for the device.
        attention_mask=batch.documents if document_mask else None,
        labels=labels if on_logits is None else None,  # without labels the model ends with its logits
    )

    def reduce(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss_weights, sources = mine(batch.loss_weights), mine(batch.sources)
        losses = output if on_logits is None else _cross_entropy(engine.chunks[-1], labels, output)
        total, report = loss(losses, loss_weights, sources)
        if on_logits is not None:
            more, columns = on_logits(LastStage(number, output, loss_weights, sources))
            total, report = total + more, torch.cat([report, columns], 1)
        return total, torch.zeros((), dtype=torch.int, device=device), report

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
