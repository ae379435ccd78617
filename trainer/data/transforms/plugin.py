"""A transform that somebody else wrote: found by its name, and every sample that it returns is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from trainer.data.transforms.protocol import Sample, SampleTransform
from trainer.entry_points import find_entry_point

GROUP = "ratoon.transforms"
"""The entry points that are transforms."""


class Plugin:
    """Asks a plug-in, one sequence at a time, so that what it makes of one cannot depend on the layout."""

    def __init__(self, name: str, options: Mapping[str, Any], *, vocab_size: int) -> None:
        """Raises ValueError when there is no such plug-in, or it cannot be made with these options."""
        key = "data.transforms.plugin"
        factory = find_entry_point(name, group=GROUP, key=key)
        if not callable(factory):
            raise ValueError(f"{key}: {name} is no callable (options) -> transform")
        try:
            self._inner: SampleTransform = factory(dict(options))
            self.reweights = bool(self._inner.reweights)
        except Exception as error:
            raise ValueError(f"{key}: {name} cannot be opened: {type(error).__name__}: {error}") from error
        self._name = name
        self._vocab_size = vocab_size

    def __call__(self, sample: Sample) -> None:
        """As `SampleTransform`.

        Raises:
            ValueError: the plug-in raises, or makes of a sample what cannot be trained on.
        """
        before = sample.loss_weights.copy()
        shown = replace(sample, positions=_locked(sample.positions), documents=_locked(sample.documents))
        where = f"data.transforms.plugin {self._name}, source {sample.source!r}, sequence {sample.number}: "
        try:
            self._inner(shown)
        except Exception as error:
            raise ValueError(f"{where}{type(error).__name__}: {error}") from error
        for name in ("tokens", "labels"):
            ids = getattr(sample, name)
            if ids.min() < 0 or ids.max() >= self._vocab_size:
                raise ValueError(
                    f"{where}{name} has ids {ids.min()} to {ids.max()}, the tokenizer ids 0 to "
                    f"{self._vocab_size - 1}"
                )
        weights = sample.loss_weights
        if not np.isfinite(weights).all() or weights.min() < 0:
            raise ValueError(f"{where}loss_weights has a number below 0, or one that is not finite")
        if not self.reweights and not np.array_equal(weights, before):
            raise ValueError(f"{where}loss_weights has changed, and the plug-in's reweights is False")


def _locked(column: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    view = column.view()
    view.flags.writeable = False
    return view
