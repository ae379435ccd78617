"""Joining what many ranks held of one logical tensor: the pieces that make it, and the copies beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from checkpoint.boxes import Box, BoxIndex
from checkpoint.manifest import LogicalTensor, Piece
from checkpoint.source import SourceTensor

Coordinates = tuple[tuple[str, int], ...]


def coordinates(tensor: SourceTensor) -> Coordinates:
    """Of the rank that held it, but for the data axis: alike for all parts and replicas of one tensor."""
    return tuple(sorted((axis, at) for axis, at in tensor.at.items() if axis != "data"))


class Copies:
    """Pieces of one tensor in layers: each box is in the first layer once, its n-th copy in the n-th layer.

    Data ranks hold either parts of a tensor (ZeRO's flat ranges), which all come to lie in the first layer,
    or the same boxes, which come to lie in a layer each.
    """

    def __init__(self) -> None:
        self.layers: list[list[Piece]] = []
        self._seen: dict[Box, set[int | None]] = {}

    def add(self, pieces: Iterable[Piece], data: int | None) -> None:
        """Pieces of the data rank `data`. A box that this very rank held before overlaps: it is no copy."""
        for piece in pieces:
            holders = self._seen.setdefault(piece.box, set())
            number = 0 if data in holders else len(holders)
            holders.add(data)
            if number == len(self.layers):
                self.layers.append([])
            self.layers[number].append(piece)


@dataclass
class Joined:
    """One state of one logical tensor, as far as it has been seen.

    Attributes:
        primary: what the language calls the tensor itself, of all ranks.
        others: what it calls a copy, by the rank's coordinates.
        average: the copies differ, and the tensor is their mean.
    """

    name: str
    state: str
    shape: tuple[int, ...]
    primary: Copies = field(default_factory=Copies)
    others: dict[Coordinates, Copies] = field(default_factory=dict)
    average: bool = False

    def tensor(self) -> LogicalTensor:
        """The pieces, and the replicas, as few as possible; one without any piece keeps its name: a gap."""
        copies = [layer for other in self.others.values() for layer in other.layers]
        layers = [*self.primary.layers[:1], *pack(self.primary.layers[1:] + copies, self.shape)]
        pieces, *replicas = (tuple(layer) for layer in layers or [[]])
        dtype = pieces[0].dtype if pieces else "float32"
        return LogicalTensor(
            self.name, self.state, self.shape, dtype, pieces, tuple(replicas), average=self.average
        )


def pack(layers: Sequence[Sequence[Piece]], shape: tuple[int, ...]) -> list[list[Piece]]:
    """Put layers together that share no element, such as the shards that two tensor ranks held of a copy."""
    packed: list[list[Piece]] = []
    room: list[int] = []  # elements that each still lacks
    for layer in layers:
        numel = sum(piece.box.numel for piece in layer)
        for number, already in enumerate(packed):
            if numel <= room[number] and not _meet(already, layer, len(shape)):
                already.extend(layer)
                room[number] -= numel
                break
        else:
            packed.append(list(layer))
            room.append(math.prod(shape) - numel)
    return packed


def _meet(some: Sequence[Piece], others: Sequence[Piece], num_axes: int) -> bool:
    index = BoxIndex([piece.box for piece in some], num_axes)
    return any(index.meeting(piece.box) for piece in others)
