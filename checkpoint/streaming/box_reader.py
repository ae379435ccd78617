"""Any box of a logical tensor as one array, from however many pieces, and the mean of copies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from checkpoint.boxes import Box, BoxIndex
from checkpoint.manifest import LogicalTensor, Piece
from checkpoint.streaming.bits import Bits, as_floats, bits_type
from checkpoint.streaming.panels import Files, sub_box


class BoxReader:
    """Reads boxes of one tensor, which its pieces must cover exactly once.

    Attributes:
        dtype: of what is read: the pieces' own; float32 for a mean, float64 where pieces have several.
    """

    def __init__(self, tensor: LogicalTensor) -> None:
        copies = (tensor.pieces, *tensor.replicas) if tensor.average else (tensor.pieces,)
        self._copies = [
            (pieces, BoxIndex([piece.box for piece in pieces], len(tensor.shape))) for pieces in copies
        ]
        kinds = {piece.dtype for pieces in copies for piece in pieces}
        self._stored = kinds.pop() if len(kinds) == 1 else "float64"
        self.dtype = "float32" if tensor.average else self._stored

    def read(self, files: Files, box: Box) -> Bits:
        """The bits of a box, in its shape.

        Raises:
            OSError: a file is not there, or ends too early.
        """
        if self.dtype == self._stored and len(self._copies) == 1:
            return self._copy(files, *self._copies[0], box)
        total = np.zeros(box.size, np.float32)
        for pieces, index in self._copies:
            total += as_floats(self._copy(files, pieces, index, box), self._stored)
        return (total / np.float32(len(self._copies))).view(np.uint32)

    def _copy(self, files: Files, pieces: Sequence[Piece], index: BoxIndex, box: Box) -> Bits:
        found = index.meeting(box)
        if len(found) == 1 and pieces[found[0][0]].dtype == self._stored:
            return files.read(pieces[found[0][0]], box)
        whole = np.empty(box.size, bits_type(self._stored))
        for number, shared in found:
            bits = files.read(pieces[number], shared)
            if pieces[number].dtype != self._stored:
                bits = as_floats(bits, pieces[number].dtype).astype(np.float64).view(np.uint64)
            sub_box(whole, box, shared)[...] = bits
        return whole
