"""A pull towards earlier weights, decoupled from Adam as AdamW's weight decay is, and its importances."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch

from parallel.shards import MainPiece
from parallel.transforms import Phase

ANCHOR, IMPORTANCE, PATH = "anchor", "importance", "path_integral"  # states of the held parameters

Missing = Collection[tuple[str, str]]
"""(logical name, state) of what the checkpoint that a run goes on from has not filled."""


class Pull:
    """theta -= min(1, lr x strength x scale x importance) x (theta - anchor).

    Plain gradient descent on strength/2 x sum of importance x (theta - anchor)^2, the penalty of L2-to-start,
    EWC and SI alike; the bound keeps a strong pull from shooting past the anchor.
    """

    phase = Phase.PULL

    def __init__(self, pieces: Sequence[MainPiece], strength: float, *, weighted: bool) -> None:
        """Hold `pieces`, which have the anchor as a state, and with `weighted` the importance too."""
        self._pieces, self._strength, self._weighted = pieces, strength, weighted
        self.scale = 1.0

    def before(self, lr: float) -> None:
        """Nothing: the pull looks at the updated weights."""

    def after(self, lr: float) -> None:
        """Move the weights."""
        rate = lr * self._strength * self.scale
        if rate == 0.0:
            return
        for piece in self._pieces:
            if self._weighted:
                share = piece.state(IMPORTANCE).mul(rate).clamp_(max=1.0)
                piece.value.copy_(torch.lerp(piece.value, piece.state(ANCHOR), share))
            else:
                piece.value.lerp_(piece.state(ANCHOR), min(1.0, rate))


class PathIntegral:
    """Adds up -gradient x change of the weight, what each element has lowered the loss by along the way.

    Zenke et al. 2017, equation 3, with the gradient as Adam sees it, after clipping, and the change that the
    whole update makes, the pull included. So it has to be added behind the pull.
    """

    phase = Phase.PULL

    def __init__(self, pieces: Sequence[MainPiece]) -> None:
        """Follow `pieces`, which have the path integral as a state."""
        self._pieces = pieces
        self._held: list[torch.Tensor] = []

    def before(self, lr: float) -> None:
        """Remember the weights."""
        self._held = [piece.value.clone() for piece in self._pieces]

    def after(self, lr: float) -> None:
        """Count this update."""
        for piece, held in zip(self._pieces, self._held, strict=True):
            piece.state(PATH).addcmul_(piece.gradient, piece.value - held, value=-1.0)
        self._held = []


@torch.no_grad()
def set_anchor(pieces: Iterable[MainPiece]) -> None:
    """Take the weights as they are now for the anchor."""
    for piece in pieces:
        piece.state(ANCHOR).copy_(piece.value)


@torch.no_grad()
def consolidate(pieces: Iterable[MainPiece], missing: Missing, *, xi: float) -> None:
    """Turn the path integrals of the stage that has ended into importance; they begin again at zero.

    importance += max(0, path integral) / ((theta - anchor)^2 + xi): Zenke et al. 2017, equation 5, where
    anchor is the start of that stage. Elements on whose way the loss has risen get none, since a negative
    importance would drive a weight away. Parameters that the checkpoint has no path of keep what they have.
    """
    for piece in pieces:
        path = piece.state(PATH)
        if not {(piece.name, PATH), (piece.name, ANCHOR)} & set(missing):
            distance = piece.value - piece.state(ANCHOR)
            piece.state(IMPORTANCE).add_(path.clamp(min=0.0) / (distance * distance + xi))
        path.zero_()


def mean_importance(pieces: Iterable[MainPiece], device: torch.device) -> float:
    """Over all elements of the mesh, those that several ranks hold counted once. Call it on every rank."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for piece in pieces:
        importance = piece.state(IMPORTANCE)
        total[0] += importance.sum(dtype=torch.float64) / piece.copies
        total[1] += importance.numel() / piece.copies
    torch.distributed.all_reduce(total)
    return float(total[0] / total[1]) if total[1] else 0.0
