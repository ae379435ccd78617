"""Loss weights of whole sources."""

from __future__ import annotations

import numpy as np

from trainer.data.transforms.protocol import Sample


class LossWeight:
    """Multiplies the loss weights of a sample."""

    reweights = False  # by a factor that is known before any token is read

    def __init__(self, factor: float) -> None:
        self.factor = np.float32(factor)

    def __call__(self, sample: Sample) -> None:
        """As `SampleTransform`."""
        sample.loss_weights[:] *= self.factor
