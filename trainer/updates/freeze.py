"""Weights that stay: the whole update is taken back, since a masked gradient would not hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from parallel.shards import MainPiece
from parallel.transforms import Phase


class Freeze:
    """Puts the weights back after Adam, which momentum and weight decay move without any gradient."""

    phase = Phase.MASK

    def __init__(self, pieces: Sequence[MainPiece]) -> None:
        """`pieces` are this rank's parts of the frozen parameters."""
        self._pieces = pieces
        self._held: list[torch.Tensor] = []

    def before(self, lr: float) -> None:
        """Remember the weights."""
        self._held = [piece.value.clone() for piece in self._pieces]

    def after(self, lr: float) -> None:
        """Put them back, bit for bit."""
        for piece, held in zip(self._pieces, self._held, strict=True):
            piece.value.copy_(held)
        self._held = []
