"""What a frozen reference says about the step's tokens, when it runs on the mesh of the training itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parallel.forward import Batch, forward_logits
from parallel.frozen import FrozenModel
from parallel.top_k import TopK, spread, top_k
from parallel.vocab_parallel import log_softmax, tempered


@dataclass(frozen=True)
class Reading:
    """How a reference is read.

    Attributes:
        chosen: for each source, whether the loss wants its tokens.
        temperature: of the softmax.
        top_k: tokens to keep; None keeps all of them.
        document_mask: as in the training.
    """

    chosen: tuple[bool, ...]
    temperature: float = 1.0
    top_k: int | None = None
    document_mask: bool = True

    def wanted(self, batches: Sequence[Batch]) -> list[int]:
        """Numbers of the micro-batches that have tokens of the loss."""
        chosen = torch.tensor(self.chosen)
        return [
            number
            for number, batch in enumerate(batches)
            if bool((chosen[batch.sources.long()] & (batch.loss_weights > 0)).any())
        ]


@dataclass
class SameLayout:
    """Runs the reference over the micro-batches of a step before the training pass does."""

    model: FrozenModel
    reading: Reading
    identity: dict[str, Any]
    _kept: dict[int, Tensor | TopK] = field(default_factory=dict)

    def prepare(self, step: int, batches: Sequence[Batch]) -> None:
        """Forward, of the micro-batches that have tokens of the loss; the last stage keeps the answers.

        The ranks of a tensor, context and pipeline group have the same micro-batches and so agree on which.
        Data ranks do not, which matters where experts span them; and an interleaved schedule needs them all.
        """
        self._kept.clear()
        layout = self.model.mesh.layout
        together = layout.expert > 1 or layout.virtual_pipeline is not None
        numbers = list(range(len(batches))) if together else self.reading.wanted(batches)
        if not numbers:
            return

        def keep(place: int, logits: Tensor) -> None:
            self._kept[numbers[place]] = self._read(logits)

        chosen = [batches[number] for number in numbers]
        forward_logits(self.model, chosen, keep, document_mask=self.reading.document_mask)

    def log_probabilities(self, number: int, logits: Tensor) -> Tensor | None:
        """As `Targets.log_probabilities`; each micro-batch's answer is given once, and its memory with it."""
        kept = self._kept.pop(number, None)
        if isinstance(kept, TopK):
            group = self.model.mesh.groups.tp
            return spread(kept, logits, group, temperature=self.reading.temperature)
        return kept

    def take(self) -> dict[int, TopK]:
        """The answers of the last `prepare` by micro-batch, on the last stage; with a `top_k` only."""
        kept, self._kept = self._kept, {}
        return {number: answer for number, answer in kept.items() if isinstance(answer, TopK)}

    def state(self) -> dict[str, Any]:
        """Which reference it is."""
        return self.identity

    def _read(self, logits: Tensor) -> Tensor | TopK:
        group, temperature = self.model.mesh.groups.tp, self.reading.temperature
        if self.reading.top_k is not None:
            return top_k(logits, self.reading.top_k, group, temperature=temperature)
        return log_softmax(tempered(logits, temperature), group)
