"""`fully_sharded_model_space`: masters and moments as flat blocks of the weights' shapes.

A weight of shape [X, Y] that was cut into blocks [x, y] was stored as [X / x, Y / y, x * y], and a data
rank's part of a block as a range of the last axis. megatron-core up to 0.13 wrote this by default; 0.15 and
later can neither write nor read it (`sharded_tensor_to_torch_sharded_tensor` in
`dist_checkpointing/strategies/torch.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from checkpoint.boxes import Box
from checkpoint.manifest import ITEM_SIZES, Piece
from parallel.slices import flat_range_boxes


def unflattened(
    name: str, shape: tuple[int, ...], pieces: Sequence[Piece], weight: tuple[int, ...]
) -> Iterator[Piece]:
    """The pieces of a stored state in the shape of its weight.

    Args:
        name: of the state, for errors.
        shape: as it was stored.
        weight: shape of the weight.

    Raises:
        ValueError: the shapes do not belong together.
    """
    parts = shape[:-1]
    if len(parts) != len(weight) or any(
        not count or whole % count for whole, count in zip(weight, parts, strict=True)
    ):
        raise ValueError(f"{name}: {list(shape)} is no cut of {list(weight)}, the shape of the weight")
    size = tuple(whole // count for whole, count in zip(weight, parts, strict=True))
    if math.prod(size) != shape[-1]:
        raise ValueError(f"{name}: a block of {list(size)} has {math.prod(size)} elements, not {shape[-1]}")
    for piece in pieces:
        *block, first = piece.box.offset
        corner = tuple(at * extent for at, extent in zip(block, size, strict=True))
        byte = piece.start
        for inner, extent in flat_range_boxes(size, first, first + piece.box.numel):
            box = Box(tuple(o + i for o, i in zip(corner, inner, strict=True)), extent)
            yield Piece(piece.file, byte, piece.dtype, box)
            byte += box.numel * ITEM_SIZES[piece.dtype]
