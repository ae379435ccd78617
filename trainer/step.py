"""One optimizer step: count, forward and backward, norm, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from parallel.engine import Engine
from parallel.forward import (
    Batch,
    LogitsLoss,
    gather_texts,
    run_micro_batches,
    sum_over_data,
    sum_reports,
)
from trainer.loss import token_loss
from trainer.losses.auxiliary import AuxLossReport, StepLosses


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; the message names rank, micro-batch and source."""


@dataclass(frozen=True)
class LossReport:
    """Mean losses per valid token, in nats.

    Attributes:
        loss: over all tokens of the step.
        tokens: sum of the loss weights.
        by_source: (mean loss, tokens) of every source, by index; NaN for a source without tokens.
    """

    loss: float
    tokens: float
    by_source: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class StepReport(LossReport):
    """What one training step did.

    Attributes:
        grad_norm: 2-norm of the gradient of the mean loss over the whole mesh, before clipping.
        lr: learning rate of the update.
        auxiliary: the losses beside the cross-entropy that were on.
    """

    grad_norm: float
    lr: float
    auxiliary: tuple[AuxLossReport, ...] = ()


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    *,
    lr: float,
    source_names: Sequence[str],
    tokens: float | None = None,
    document_mask: bool = True,
    losses: StepLosses | None = None,
) -> StepReport:
    """Make one update from this data rank's micro-batches of a global batch.

    Args:
        tokens: sum of the loss weights of the global batch; counted over the data ranks when not known.
        losses: what is added to the cross-entropy, on the last stage.

    Raises:
        NonFiniteError: before the update, so that weights and moments stay as they were.
    """
    if tokens is None:
        tokens = sum_over_data(engine, sum(float(batch.loss_weights.sum()) for batch in batches))
    if tokens <= 0:
        raise ValueError(
            "the global batch has no token that counts in the loss: check the data's loss weights"
        )
    if losses is not None:
        losses.prepare(batches)
    engine.zero_grad()
    engine.scale_loss(1.0 / tokens)
    reports = run_micro_batches(
        engine, batches, token_loss(len(source_names)), document_mask=document_mask, on_logits=losses
    )
    norm = engine.gradient_norm()  # before the first look at a loss, which waits for the device
    columns = 2 if losses is None else 2 + len(losses.terms)
    sums = sum_reports(engine, reports, (len(source_names), columns))
    if not sums.isfinite().all():
        raise NonFiniteError(_where_loss(engine, reports, source_names))
    if not math.isfinite(norm):
        raise NonFiniteError(_where_gradient(engine, batches, source_names, norm, losses))
    engine.update(lr, norm)
    total = mean_losses(sums[:, :2])
    auxiliary = () if losses is None else losses.reports(sums[:, 2:], sums[:, 1], source_names)
    return StepReport(total.loss, total.tokens, total.by_source, norm, lr, auxiliary)


@torch.no_grad()
def evaluate(
    engine: Engine, batches: Sequence[Batch], *, num_sources: int, document_mask: bool = True
) -> LossReport:
    """Mean loss of micro-batches, without a backward pass."""
    reports = run_micro_batches(
        engine, batches, token_loss(num_sources), forward_only=True, document_mask=document_mask
    )
    return mean_losses(sum_reports(engine, reports, (num_sources, 2)))


def mean_losses(sums: torch.Tensor) -> LossReport:
    """From sums by source, [num_sources, 2], to means."""
    weight = float(sums[:, 1].sum())
    by_source = tuple((_ratio(float(loss), float(count)), float(count)) for loss, count in sums)
    return LossReport(_ratio(float(sums[:, 0].sum()), weight), weight, by_source)


def _ratio(total: float, weight: float) -> float:
    return total / weight if weight else math.nan


def _where_loss(engine: Engine, reports: Sequence[torch.Tensor], source_names: Sequence[str]) -> str:
    bad = [
        (index, source)
        for index, report in enumerate(reports)
        for source in range(len(source_names))
        if not bool(report[source].isfinite().all())
    ]
    mine = ""
    if bad and engine.mesh.tensor_rank == 0:  # tensor ranks have the same losses
        index, source = bad[0]
        mine = f"{_me(engine)}, micro-batch {index}, source {source_names[source]!r}"
    return (
        f"the loss is not finite, first seen on {_listed(gather_texts(mine))}. Nothing was updated: resume "
        "from the last checkpoint with a lower optimizer.lr, or look at that batch"
    )


def _where_gradient(
    engine: Engine,
    batches: Sequence[Batch],
    source_names: Sequence[str],
    norm: float,
    losses: StepLosses | None,
) -> str:
    """Name the parameters, and the micro-batches that make them so: each runs again, without the others."""
    names = engine.non_finite_gradients()
    holders = f"rank {engine.mesh.rank}: {', '.join(names[:3])}" if names else ""
    causes = []
    if not engine.mesh.layout.virtual_pipeline:  # interleaving runs no single micro-batch
        if losses is not None:
            losses.prepare(batches)  # what was prepared is used up
        for index, batch in enumerate(batches):
            with engine.without_reduction():
                engine.zero_grad()
                again = None if losses is None else _numbered(losses, index)
                run_micro_batches(engine, [batch], token_loss(len(source_names)), on_logits=again)
            if engine.non_finite_gradients():
                sources = ", ".join(repr(source_names[source]) for source in batch.sources.unique().tolist())
                causes.append(f"{_me(engine)}, micro-batch {index}, source {sources}")
    found = _listed(gather_texts(causes[0] if causes else ""))
    return (
        f"the gradient norm is {norm} though the loss is finite. Made by {found}; "
        f"seen in {_listed(gather_texts(holders))}. Nothing was updated: resume from the last checkpoint "
        "with a lower optimizer.lr, or look at that batch"
    )


def _numbered(losses: StepLosses, index: int) -> LogitsLoss:
    """The losses of micro-batch `index` where it runs alone."""
    return lambda seen: losses(replace(seen, number=index))


def _me(engine: Engine) -> str:
    return f"rank {engine.mesh.rank} (data rank {engine.mesh.data_rank})"


def _listed(texts: Sequence[str], most: int = 3) -> str:
    """The first texts that say something, and how many more there are."""
    said = [text for text in texts if text]
    more = f" and {len(said) - most} more" if len(said) > most else ""
    return ("; ".join(said[:most]) or "no single rank") + more
