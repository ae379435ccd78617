"""The records a run produces, and the protocol of whatever takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Role = Literal["trained", "old", "unseen"]
"""Of a validation set in a stage: its source is trained on; or is not, and the stage starts from a checkpoint
that may know it; or is not, and there is no checkpoint."""


@dataclass(frozen=True)
class RunInfo:
    """What is known when the loop starts.

    Attributes:
        first_step: optimizer steps that are already done: 0, or the step of the checkpoint resumed from.
        total_steps: steps done when the run is over.
        tokens_per_step: token positions of a global batch, padding included.
        layout: the degrees in one line.
        parameters: of the whole model.
        notes: sentences to show once: kernels in use and why, the MFU formula and the peak.
    """

    name: str
    first_step: int
    total_steps: int
    tokens_per_step: int
    layout: str = ""
    parameters: int = 0
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as seen by the whole mesh.

    Attributes:
        step: optimizer steps done, this one included: 1 to total_steps.
        loss: mean over the valid tokens of the global batch, in nats.
        lr: learning rate that this step used.
        grad_norm: of the whole model, before clipping.
        tokens: valid tokens of this step over all data ranks.
        step_seconds: wall time of this step.
        tokens_per_second: over the recent steps, all ranks together.
        eta_seconds: wall time to the last step at the recent speed.
        mfu: model FLOPs utilisation, a fraction of the peak, by way of counting: causal, full, packed.
        source_losses: mean loss of each source that this step had tokens of.
        source_tokens: valid tokens of each source.
        auxiliary: mean of each auxiliary loss over the tokens of its sources, without its weight.
        auxiliary_by_source: the same by source, of the sources that this step had tokens of.
        memory_bytes: peak device memory of the reporting rank.
        gpu: readings of the reporting rank's GPU; empty without one. See `trainer.metrics.nvml`.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    step_seconds: float
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    mfu: Mapping[str, float] = field(default_factory=dict)
    source_losses: Mapping[str, float] = field(default_factory=dict)
    source_tokens: Mapping[str, int] = field(default_factory=dict)
    auxiliary: Mapping[str, float] = field(default_factory=dict)
    auxiliary_by_source: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    memory_bytes: int | None = None
    gpu: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationRecord:
    """The held-out losses after `step` optimizer steps.

    Attributes:
        losses: mean loss in nats of each validation set, by its name.
        tokens: valid tokens that each mean is over.
        seconds: wall time of the whole evaluation.
        dense: one of the early ones between the others, over `eval.dense_batches` global batches spread over
            each set. Sets that have more than those are in `dense_losses` only.
        dense_losses, dense_tokens: losses and tokens over what a dense evaluation reads, of the sets that
            have more; every evaluation has them, so that all make one curve.
        bits_per_byte: of each of `losses`; compares different tokenizers, which nats a token do not.
        text_bytes: UTF-8 bytes of the tokens that each mean is over; special tokens have none.
        sources: the source that each set belongs to.
        roles: what the stage does with it: see `Role`.
    """

    step: int
    losses: Mapping[str, float]
    tokens: Mapping[str, int]
    seconds: float = 0.0
    dense: bool = False
    dense_losses: Mapping[str, float] = field(default_factory=dict)
    dense_tokens: Mapping[str, int] = field(default_factory=dict)
    bits_per_byte: Mapping[str, float] = field(default_factory=dict)
    text_bytes: Mapping[str, int] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, Role] = field(default_factory=dict)

    def perplexity(self, name: str) -> float:
        """exp(loss) of one validation set; infinite where that overflows."""
        try:
            return math.exp(self.losses[name])
        except OverflowError:
            return math.inf


class MetricSink(Protocol):
    """Something that takes a run's records: a terminal, a file, TensorBoard. Lives on one rank only."""

    def start(self, info: RunInfo) -> None:
        """The loop begins; called once, before everything else."""

    def step(self, record: StepRecord) -> None:
        """A step is done."""

    def event(self, text: str, *, step: int) -> None:
        """Something worth a line happened after `step` steps: resumed, saved, skipped."""

    def evaluation(self, record: EvaluationRecord) -> None:
        """An evaluation is done."""

    def close(self) -> None:
        """The run is over, well or badly. May be called twice."""


@dataclass(frozen=True)
class SinkList:
    """Hands every record to each sink in turn; itself a `MetricSink`."""

    sinks: Sequence[MetricSink] = ()

    def start(self, info: RunInfo) -> None:
        for sink in self.sinks:
            sink.start(info)

    def step(self, record: StepRecord) -> None:
        for sink in self.sinks:
            sink.step(record)

    def event(self, text: str, *, step: int) -> None:
        for sink in self.sinks:
            sink.event(text, step=step)

    def evaluation(self, record: EvaluationRecord) -> None:
        for sink in self.sinks:
            sink.evaluation(record)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
