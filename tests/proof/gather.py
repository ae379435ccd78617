"""Whole logical tensors, put together from what every rank holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from checkpoint.boxes import Box, cover_fault
from parallel.engine import Engine
from parallel.slices import TensorSlice

Key = tuple[str, str]  # logical name, state
Wholes = dict[Key, torch.Tensor]


def copy_slices(engine: Engine) -> list[TensorSlice]:
    """All that this rank holds, in memory of its own, so that it can be sent and training can go on."""
    return [dataclasses.replace(piece, data=piece.data.detach().clone()) for piece in engine.slices()]


def whole_tensors(ranks: Sequence[Sequence[TensorSlice]]) -> Wholes:
    """Every logical tensor and optimizer state of the mesh.

    Checks on the way that the boxes of each cover it exactly once, that `replicas` names just the ranks that
    hold a box, and that these hold the same bits.
    """
    holders: dict[tuple[Key, Box], list[tuple[int, TensorSlice]]] = {}
    for rank, pieces in enumerate(ranks):
        for piece in pieces:
            box = Box(piece.offset, piece.size)
            holders.setdefault(((piece.name, piece.state), box), []).append((rank, piece))
    wholes: Wholes = {}
    boxes: dict[Key, list[Box]] = {}
    for (key, box), held in holders.items():
        first = held[0][1]
        assert {piece.replicas for _, piece in held} == {tuple(rank for rank, _ in held)}, (key, box)
        assert all(same_bits(first.data, piece.data) for _, piece in held), f"{key} {box}: replicas differ"
        whole = wholes.setdefault(key, torch.full(first.shape, torch.nan, dtype=first.data.dtype))
        assert whole.shape == first.shape, key
        whole[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))] = first.data.view(first.size)
        boxes.setdefault(key, []).append(box)
    faults = {key: cover_fault(tuple(wholes[key].shape), found) for key, found in boxes.items()}
    assert not {key: fault for key, fault in faults.items() if fault}
    return wholes


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit, so that NaN equals NaN and 0 differs from -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))


def different(a: Wholes, b: Wholes) -> list[Key]:
    """What the two do not both have, bit for bit."""
    both = a.keys() & b.keys()
    return sorted({key for key in both if not same_bits(a[key], b[key])} | (a.keys() ^ b.keys()))
