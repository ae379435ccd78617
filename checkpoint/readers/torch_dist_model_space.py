"""`fully_sharded_model_space`, the default up to megatron-core 0.13: flat runs of the blocks that ranks held.

A weight of shape [X, Y] that is cut into blocks of [x, y] has states of shape [X / x, Y / y, x * y]: a data
rank's share of a block is a range of the last axis (megatron-core 0.13, `dist_checkpointing/mapping.py`:
`ShardedTensor` with a `flattened_range`).
"""

from __future__ import annotations

import math
from dataclasses import replace

from checkpoint.boxes import Box
from checkpoint.manifest import Piece
from checkpoint.readers.torch_dist_shards import Shard, Whole, part_of


def is_flattened(state: Whole, weight: Whole) -> bool:
    """Whether a state has one axis more than its weight."""
    return len(state.shape) == len(weight.shape) + 1


def unflattened(state: Whole, weight: Whole) -> Whole:
    """The state in its weight's shape.

    Raises:
        ValueError: the shapes are not those of a weight and its blocks.
    """
    *counts, numel = state.shape
    size = tuple(whole // max(1, parts) for whole, parts in zip(weight.shape, counts, strict=True))
    whole = tuple(extent * parts for extent, parts in zip(size, counts, strict=True))
    if whole != weight.shape or math.prod(size) != numel:
        raise ValueError(
            f"{state.name}: a state of shape {list(state.shape)}, expected numbers of blocks of "
            f"{list(weight.shape)} and the elements of one"
        )
    pieces: list[Piece] = []
    for piece in state.pieces:
        *block, first = piece.box.offset
        offset = tuple(at * extent for at, extent in zip(block, size, strict=True))
        shard = Shard(weight.name, ((weight, Box(offset, size)),))
        for region in shard.between(first, first + piece.box.size[-1]):
            pieces.append(part_of(piece, region.first - first, region.box))
    return replace(state, shape=weight.shape, pieces=tuple(pieces))
