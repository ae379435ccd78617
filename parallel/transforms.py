"""What may change an update between the gradient and the weights of the model, and in which order.

One step is: gradients reduced -> norm -> clip -> `before` of every transform -> Adam -> `after` of the
masks, of the pulls, of the projections -> slow weights -> weights of the model, gathered from all shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Protocol

import torch

from parallel.shards import step_main


class Phase(IntEnum):
    """When a transform acts on the update; those of the same phase act in the order they were added."""

    MASK = 0
    """leaves out part of the update, weight decay included"""
    PULL = 1
    """moves the updated weights towards something, as decoupled weight decay does"""
    PROJECTION = 2
    """brings the result back to where it has to lie"""


class UpdateTransform(Protocol):
    """Changes the update of the main copies that it was made for, in place, without a gradient recorded.

    All ranks call both methods at every update, also those that hold nothing it is about.
    """

    @property
    def phase(self) -> Phase:
        """When it acts."""
        ...

    def before(self, lr: float) -> None:
        """Between clipping and Adam: gradients may be masked, weights remembered."""
        ...

    def after(self, lr: float) -> None:
        """After Adam, in the order of the phases. Frees what was remembered."""
        ...


class SlowWeights(Protocol):
    """A second copy of the weights that follows the first, or is mixed into it; acts last."""

    def after(self) -> None:
        """The main copies are as this update leaves them, but for what is done here."""
        ...


@torch.no_grad()
def transformed_step(
    optimizer: Any, transforms: Sequence[UpdateTransform], slow_weights: SlowWeights | None, *, lr: float
) -> None:
    """Update the main copies with everything that changes the update. Weights of the model do not follow."""
    ordered = sorted(transforms, key=lambda transform: transform.phase)
    for transform in ordered:
        transform.before(lr)
    step_main(optimizer)
    for transform in ordered:
        transform.after(lr)
    if slow_weights is not None:
        slow_weights.after()
