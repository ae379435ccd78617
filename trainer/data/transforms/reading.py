"""What the transforms of a run make of its sources: of their documents, and of the samples cut from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.config import DataConfig
from trainer.data.order import Spans
from trainer.data.reader import Documents
from trainer.data.tokenizer import Tokenizer
from trainer.data.transforms.opening import open_transforms, open_views
from trainer.data.transforms.places import Places
from trainer.data.transforms.protocol import Sample, SampleTransform
from trainer.data.transforms.weighting import LossWeight


class Transforms:
    """The transforms of a run's sources."""

    def __init__(
        self, config: DataConfig, texts: Mapping[str, Documents], tokenizer: Tokenizer, *, seed: int
    ) -> None:
        """Open what they need; `texts` are the documents of the sources that have files.

        Raises:
            ValueError: lists what is missing.
        """
        self._names = tuple(source.name for source in config.sources)
        self._of = open_transforms(config, tokenizer)
        self._views = open_views(config, texts, tokenizer)
        self.places = {name: Places(view, seed=seed, name=name) for name, view in self._views.items()}
        self.documents: dict[str, Documents] = {**texts, **self._views}
        """by source, what its sequences are cut from"""
        self._reweights = any(one.reweights for transforms in self._of for one in transforms)
        self._factors = [_factor(transforms) for transforms in self._of]

    def mark(self, source: int, spans: Spans) -> Spans:
        """The spans of a source, with what of them is given."""
        view = self._views.get(self._names[source])
        return spans if view is None else replace(spans, given=view.given_of(spans))

    def total(self, learnt: Mapping[int, int]) -> float | None:
        """The sum of the loss weights of so many labels by source; None where only the tokens tell it."""
        if self._reweights:
            return None
        factors = self._factors
        return sum(n if factors[source] == 1 else n * factors[source] for source, n in learnt.items())

    def change(
        self,
        source: int,
        columns: Mapping[str, NDArray[Any]],
        rows: NDArray[np.int64],
        numbers: Sequence[int],
    ) -> None:
        """Change some rows of the columns of a step, [b, s] each, in place.

        Args:
            numbers: of these sequences in the run.
        """
        for transform in self._of[source]:
            for row, number in zip(rows.tolist(), numbers, strict=True):
                fields = {name: column[row] for name, column in columns.items() if name != "sources"}
                transform(Sample(number=number, source=self._names[source], **fields))


def _factor(transforms: Sequence[SampleTransform]) -> float:
    """What loss weights of 1 become, rounded as they are."""
    weight = np.float32(1)
    for transform in transforms:
        if isinstance(transform, LossWeight):
            weight *= transform.factor
    return float(weight)
