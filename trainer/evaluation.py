"""The loss on held-out documents, one number for each validation set."""

from __future__ import annotations

import math
import time

from trainer.data.stream import ValidationStream, open_validation
from trainer.metrics.sink import EvaluationRecord
from trainer.session import Session
from trainer.step import evaluate
from trainer.updates.opening import averaged


class Evaluator:
    """Evaluates all validation sets of a run, on all ranks together."""

    def __init__(self, session: Session) -> None:
        """Open the validation sets."""
        config = session.config
        self._session = session
        self._streams = open_validation(config.data, global_batch=config.train.global_batch)

    def due(self, *, last: bool) -> bool:
        """Whether to evaluate after the step just done."""
        every = self._session.config.eval.every
        return bool(self._streams) and (last or (every > 0 and self._session.step % every == 0))

    def due_at_start(self) -> bool:
        """Whether to evaluate before the first step. A run that goes on from itself has done so already."""
        session = self._session
        return bool(self._streams) and session.config.eval.at_start and not session.resumed

    def run(self) -> EvaluationRecord:
        """Mean loss in nats of every validation set, over at most `eval.batches` global batches.

        Where the average of the weights is evaluated too, its losses are those of "NAME (average)".
        """
        began = time.monotonic()
        losses, tokens = self._means("")
        average = averaged(self._session.hooks)
        if average is not None:
            with average:
                of_average, its_tokens = self._means(" (average)")
            losses, tokens = losses | of_average, tokens | its_tokens
        return EvaluationRecord(self._session.step, losses, tokens, time.monotonic() - began)

    def _means(self, suffix: str) -> tuple[dict[str, float], dict[str, int]]:
        """Loss and tokens of every set, by its name with the suffix."""
        means = {stream.name + suffix: self._mean(stream) for stream in self._streams}
        return (
            {name: loss for name, (loss, _) in means.items()},
            {name: tokens for name, (_, tokens) in means.items()},
        )

    def _mean(self, stream: ValidationStream) -> tuple[float, int]:
        session = self._session
        total = count = 0.0
        for step in range(min(stream.steps, session.config.eval.batches or stream.steps)):
            batches = stream.micro_batches(
                step,
                data_rank=session.mesh.data_rank,
                data_size=session.mesh.data,
                micro_batch=session.config.train.micro_batch,
            )
            report = evaluate(
                session.engine, batches, num_sources=1, document_mask=session.config.data.document_mask
            )
            if report.tokens:
                total += report.loss * report.tokens
                count += report.tokens
        return (total / count if count else math.nan), round(count)
