"""The loss on held-out documents, one number for each validation set.

An evaluation reads batches of its own and moves no data cursor and no random stream: a run may be evaluated
as densely as one likes without becoming another run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.data.stream import ValidationStream, open_validation
from trainer.forgetting.text_bytes import bits_per_byte, count_text_bytes
from trainer.metrics.sink import EvaluationRecord, Role
from trainer.session import Session
from trainer.step import evaluate
from trainer.updates.opening import averaged

Extent = Literal["whole", "dense"]
"""How much of each set is read: up to `eval.batches`, or `eval.dense_batches` of those only."""


@dataclass(frozen=True)
class Mean:
    """The loss over a sample of a validation set, or over all of it that is to be read.

    Attributes:
        loss: mean in nats.
        steps: global batches of the set that it is over.
        whole: whether they are all that an evaluation reads.
    """

    set_name: str
    loss: float
    tokens: int
    steps: int
    whole: bool


class Evaluator:
    """Evaluates all validation sets of a run, on all ranks together."""

    def __init__(self, session: Session) -> None:
        """Open the validation sets."""
        config = session.config
        self._session = session
        self._streams = open_validation(config.data, global_batch=config.train.global_batch)
        wanted = config.eval.dense
        self._dense = bool(session.lineage) if wanted is None else wanted
        self._sources = {entry.name: entry.source or entry.name for entry in config.data.validation}
        self._roles = {name: self._role(source) for name, source in self._sources.items()}
        self._text_bytes: dict[tuple[str, int], int] = {}

    def due(self, *, last: bool) -> Extent | None:
        """What to evaluate after the step just done; None for nothing."""
        settings, step = self._session.config.eval, self._session.step
        if not self._streams:
            return None
        if last or (settings.every > 0 and step % settings.every == 0):
            return "whole"
        if self._dense and is_dense_step(step - self._session.first_step, settings.dense_per_decade):
            return "dense"
        return None

    def due_at_start(self) -> bool:
        """Whether to evaluate before the first step. A run that goes on from itself has done so already."""
        session, wanted = self._session, self._session.config.eval.at_start
        return bool(self._streams) and not session.resumed and (self._dense if wanted is None else wanted)

    def run(self, extent: Extent = "whole") -> EvaluationRecord:
        """Mean loss in nats of every validation set, and its bits per byte.

        Where the average of the weights is evaluated too, its losses are those of "NAME (average)".
        """
        began = time.monotonic()
        found = self._read_all(extent, "")
        average = averaged(self._session.hooks)
        if average is not None:
            with average:
                found |= self._read_all(extent, " (average)")
        whole = {name: mean for name, means in found.items() for mean in means if mean.whole}
        firsts = {name: mean for name, means in found.items() for mean in means if not mean.whole}
        text = {name: self._count(mean) for name, mean in whole.items()}
        bits = {name: bits_per_byte(mean.loss, mean.tokens, text[name]) for name, mean in whole.items()}
        return EvaluationRecord(
            self._session.step,
            {name: mean.loss for name, mean in whole.items()},
            {name: mean.tokens for name, mean in whole.items()},
            time.monotonic() - began,
            dense=extent == "dense",
            dense_losses={name: mean.loss for name, mean in firsts.items()},
            dense_tokens={name: mean.tokens for name, mean in firsts.items()},
            bits_per_byte=bits,
            text_bytes=text,
            sources=self._sources,
            roles=self._roles,
        )

    def _read_all(self, extent: Extent, suffix: str) -> dict[str, list[Mean]]:
        """The means of every set, by its name with the suffix."""
        return {stream.name + suffix: self._read(stream, extent) for stream in self._streams}

    def _read(self, stream: ValidationStream, extent: Extent) -> list[Mean]:
        """One pass over a set: the mean of a dense evaluation and, of a whole one, of all of it."""
        settings = self._session.config.eval
        steps = min(stream.steps, settings.batches or stream.steps)
        sample = spread(steps, settings.dense_batches) if self._dense else range(steps)
        found = {step: self._step(stream, step) for step in (sample if extent == "dense" else range(steps))}
        means = [self._mean(stream, [found[step] for step in sample], whole=len(sample) == steps)]
        if len(found) > len(sample):
            means.append(self._mean(stream, list(found.values()), whole=True))
        return means

    def _mean(self, stream: ValidationStream, found: Sequence[tuple[float, float]], *, whole: bool) -> Mean:
        """Of global batches, from the mean loss and the tokens of each."""
        count = sum(tokens for _, tokens in found)
        total = sum(loss * tokens for loss, tokens in found if tokens)
        return Mean(stream.name, total / count if count else math.nan, round(count), len(found), whole)

    def _step(self, stream: ValidationStream, step: int) -> tuple[float, float]:
        """Mean loss of one global batch, and its tokens."""
        session = self._session
        batches = stream.micro_batches(
            step,
            data_rank=session.mesh.data_rank,
            data_size=session.mesh.data,
            micro_batch=session.config.train.micro_batch,
        )
        masked = session.config.data.document_mask
        report = evaluate(session.engine, batches, num_sources=1, document_mask=masked)
        return report.loss, report.tokens

    def _count(self, mean: Mean) -> int:
        """Bytes of the text that a mean is over, counted once."""
        key = mean.set_name, mean.steps
        if key not in self._text_bytes:
            (stream,) = (one for one in self._streams if one.name == mean.set_name)
            self._text_bytes[key] = count_text_bytes(stream, mean.steps)
        return self._text_bytes[key]

    def _role(self, source: str) -> Role:
        if self._session.stream.weights.get(source):
            return "trained"
        return "old" if self._session.lineage else "unseen"


def spread(steps: int, most: int) -> Sequence[int]:
    """At most `most` of `steps` batches, evenly spaced: the first ones may be of one document."""
    return range(steps) if steps <= most else [place * steps // most for place in range(most)]


def is_dense_step(number: int, per_decade: int | None) -> bool:
    """Whether to evaluate after the `number`-th step of a stage, counted from 1.

    Args:
        per_decade: evaluations between n and 10 n steps; None takes the powers of 2.
    """
    if number < 1:
        return False
    if per_decade is None:
        return number & (number - 1) == 0
    nearest = round(per_decade * math.log10(number))
    return any(number == round(10 ** (place / per_decade)) for place in (nearest - 1, nearest, nearest + 1))
