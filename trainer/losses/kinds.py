"""The kinds of auxiliary losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.forward import Batch, LastStage
from parallel.vocab_parallel import kl_divergence, log_sum_exp


class ZLoss:
    """log^2 Z of every token, which keeps the logits' normaliser near one.

    Z is the sum of the exponentials of the logits. Source: PaLM (arXiv 2204.02311, section 5, 1e-4 log^2 Z);
    OLMo 2 (arXiv 2501.00656) takes 1e-5.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """`group`: of the tensor ranks."""
        self._group = group

    def prepare(self, step: int, batches: Sequence[Batch]) -> None:
        """Nothing to do."""

    def __call__(self, seen: LastStage) -> Tensor:
        """fp32 [b, s/CP]."""
        return log_sum_exp(seen.logits, self._group).square()

    def state(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}


class Targets(Protocol):
    """A frozen reference's probabilities of the next token, for the micro-batches of one step."""

    def prepare(self, step: int, batches: Sequence[Batch]) -> None:
        """Before the training pass, on all ranks together."""

    def log_probabilities(self, number: int, logits: Tensor) -> Tensor | None:
        """For micro-batch `number`, this tensor rank's columns [b, s/CP, V/TP] of the tempered log-softmax.

        None for a micro-batch without tokens of the loss's sources.

        Args:
            logits: the model's own, which decide how the tokens that a top-k leaves out share what is left.
        """

    def state(self) -> dict[str, Any]:
        """Which reference it is."""


class KLLoss:
    """The divergence of every token between a frozen reference p and the model q, in nats.

    KL(p || q), or KL(q || p) for "reverse", of the softmaxes at a temperature T, times T^2: as in knowledge
    distillation (Hinton et al., arXiv 1503.02531, section 2) and, where the reference is what the stage
    started from, learning without forgetting (Li and Hoiem, arXiv 1606.09282).
    """

    def __init__(
        self, targets: Targets, group: dist.ProcessGroup, *, temperature: float = 1.0, reverse: bool = False
    ) -> None:
        """`group`: of the tensor ranks."""
        self._targets = targets
        self._group = group
        self._temperature = temperature
        self._reverse = reverse

    def prepare(self, step: int, batches: Sequence[Batch]) -> None:
        """Run the reference over the micro-batches, or look its answers up."""
        self._targets.prepare(step, batches)

    def __call__(self, seen: LastStage) -> Tensor:
        """fp32 [b, s/CP]; zero on a micro-batch without tokens of its sources."""
        log_p = self._targets.log_probabilities(seen.number, seen.logits.detach())
        if log_p is None:
            return torch.zeros_like(seen.loss_weights)
        divergence = kl_divergence(
            seen.logits, log_p, self._group, temperature=self._temperature, reverse=self._reverse
        )
        return divergence * self._temperature**2

    def state(self) -> dict[str, Any]:
        """Which reference it is."""
        return self._targets.state()
