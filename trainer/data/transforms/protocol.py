"""What a transform of samples is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """One sequence of one source, with a value for every token: all [s], to be changed in place.

    Attributes:
        number: of the sequence in the whole run, step x global batch + place in the step: what randomness may
            depend on, since neither layout nor restart changes it.
        source: name of its source.
        tokens: int64.
        labels: int64, the next token.
        loss_weights: float32, of the labels.
        objectives: int32, see `MicroBatch`.
        groups: int32, see `MicroBatch`.
        positions: int64, cannot be changed.
        documents: int32, cannot be changed.
    """

    number: int
    source: str
    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_weights: NDArray[np.float32]
    objectives: NDArray[np.int32]
    groups: NDArray[np.int32]
    positions: NDArray[np.int64]
    documents: NDArray[np.int32]


class SampleTransform(Protocol):
    """A pure function of a sample, without a state: what it makes of a sequence follows from the sequence.

    So a run that goes on, on whatever layout, needs nothing of it in the checkpoint.
    """

    @property
    def reweights(self) -> bool:
        """Whether loss weights may come out as others.

        The sum of the loss weights of a step is then counted by the ranks after all of it was read; otherwise
        it is known before.
        """

    def __call__(self, sample: Sample) -> None:
        """Change a sample in place; its length stays."""


Factory = Callable[[dict[str, Any]], SampleTransform]
"""`options` of the run file -> the transform."""
