"""Micro-batches through the pipeline: context slices, megatron-core's schedule, the loss at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from parallel.context import context_slice
from parallel.engine import Engine


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


def run_micro_batches(
    engine: Engine,
    batches: Sequence[Batch],
    loss: Loss,
    *,
    forward_only: bool = False,
    document_mask: bool = True,
) -> list[torch.Tensor]:
    """Forward, and unless `forward_only` backward, of this data rank's micro-batches of one step.

    Args:
        loss: called on the last stage once a micro-batch.
        document_mask: attention stays inside a document; otherwise it sees the whole sequence before it.

    Returns:
        The reports of `loss`, one a micro-batch, on the last pipeline stage; nothing elsewhere.
    """
    micro_batch, length = batches[0].tokens.shape
    chunks = engine.wrapped
    for chunk in chunks:
        chunk.train(not forward_only)
    steps: list[Iterator[Batch]] = [iter(batches) for _ in chunks]
    single = len(chunks) == 1
    reports: list[Any] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, engine=engine, loss=loss, document_mask=document_mask),
        data_iterator=steps[0] if single else steps,
        model=chunks[0] if single else chunks,
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=micro_batch,
        forward_only=forward_only,
    )
    return reports


def _forward_step(
    batches: Iterator[Batch], chunk: Any, *, engine: Engine, loss: Loss, document_mask: bool
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """What megatron-core's schedules call for every micro-batch and chunk."""
    batch, device = next(batches), engine.mesh.device

    def mine(column: torch.Tensor) -> torch.Tensor:
        """This context rank's share of a [b, s] column, on its device.

        From pinned memory, since a copy from any other waits for what the device is doing.
        """
        part = context_slice(column, 1, engine.mesh.context_rank, engine.mesh.layout.context).contiguous()
        return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part

    losses = chunk(
        input_ids=mine(batch.tokens),
        position_ids=mine(batch.positions),
        # On the host, where attention is planned: reading them back would wait for the device.
        attention_mask=batch.documents if document_mask else None,
        labels=mine(batch.labels),
    )

    def reduce(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total, report = loss(output, mine(batch.loss_weights), mine(batch.sources))
        return total, torch.zeros((), dtype=torch.int, device=device), report

    return losses, reduce


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
