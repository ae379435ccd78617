"""Slow copies of the weights, on the optimizer's shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from parallel.engine import Engine
from parallel.shards import MainPiece
from trainer.updates.anchors import Missing


class Counted:
    """Slow weights that change at every so many updates.

    Attributes:
        state_key: name of the state that holds the slow copy.
        pieces: this rank's parts of the parameters that have it.
        since: updates since the last change; in the checkpoint, so that a run stops and goes on anywhere.
    """

    state_key: ClassVar[str]

    def __init__(self, pieces: Sequence[MainPiece], every: int) -> None:
        """Follow `pieces`, which have the slow copy as a state."""
        self.pieces, self._every = pieces, every
        self.since = 0

    @torch.no_grad()
    def begin(self, missing: Missing, *, anew: bool, since: int | None) -> None:
        """Start from the weights where nothing was loaded, everywhere when `anew`; go on with the rest."""
        for piece in self.pieces:
            if anew or (piece.name, self.state_key) in missing:
                piece.state(self.state_key).copy_(piece.value)
        self.since = 0 if anew or since is None else since

    def after(self) -> None:
        """Count this update, and act when it is time."""
        self.since += 1
        if self.since >= self._every:
            self.since = 0
            self.change()

    def change(self) -> None:
        """What is done every so many updates."""
        raise NotImplementedError


class Ema(Counted):
    """ema <- decay x ema + (1 - decay) x theta. The training does not see it."""

    state_key: ClassVar[str] = "ema"

    def __init__(self, pieces: Sequence[MainPiece], every: int, decay: float) -> None:
        """As `Counted`; `decay` is the share of the average that stays at each change."""
        super().__init__(pieces, every)
        self._share = 1.0 - decay

    def change(self) -> None:
        """Mix the weights of now into the average."""
        for piece in self.pieces:
            piece.state(self.state_key).lerp_(piece.value, self._share)


class Reptile(Counted):
    """theta <- theta_0 + epsilon x (theta - theta_0), theta_0 <- theta. Adam's moments stay.

    Nichol et al. 2018, arXiv 1803.02999, algorithm 1.
    """

    state_key: ClassVar[str] = "slow"

    def __init__(self, pieces: Sequence[MainPiece], every: int, epsilon: float) -> None:
        """As `Counted`; `epsilon` is the share of the way since the last change that is kept."""
        super().__init__(pieces, every)
        self._epsilon = epsilon

    def change(self) -> None:
        """Go back part of the way."""
        for piece in self.pieces:
            slow = piece.state(self.state_key)
            slow.lerp_(piece.value, self._epsilon)
            piece.value.copy_(slow)


@contextlib.contextmanager
def swapped(engine: Engine, pieces: Sequence[MainPiece], key: str) -> Iterator[None]:
    """The model computes with the state `key` inside, and with its own weights afterwards, bit for bit.

    All ranks enter and leave together. Nothing may train or save inside: the state holds the weights.
    """
    _exchange(engine, pieces, key)
    try:
        yield
    finally:
        _exchange(engine, pieces, key)


@torch.no_grad()
def _exchange(engine: Engine, pieces: Sequence[MainPiece], key: str) -> None:
    engine.settle()
    for piece in pieces:
        held = piece.value.clone()
        piece.value.copy_(piece.state(key))
        piece.state(key).copy_(held)
    engine.main_changed()
