"""A tensor in a file: where its elements lie, without having read any of them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoint.boxes import Box
from checkpoint.manifest import ITEM_SIZES, Piece
from checkpoint.plan import row_major

ELEMENT_SIZES = ITEM_SIZES | {
    **{"uint64": 8, "uint32": 4, "uint16": 2, "complex128": 16, "complex64": 8, "complex32": 4},
    **{"float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1, "float4_e2m1fn_x2": 1},
    **{"qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1},
}
"""Bytes an element takes, also of dtypes that no parameter of ours can have."""


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor's place in a file.

    Attributes:
        file: absolute path.
        start: byte in the file where its first element lies.
        dtype: torch's name, without "torch.".
        shape: in elements.
        strides: in elements, one an axis.
    """

    file: str
    start: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def item_size(self) -> int:
        """Bytes an element takes."""
        return ELEMENT_SIZES[self.dtype]

    @property
    def span(self) -> int:
        """Elements from the first to the last, both and everything between them included."""
        if not self.numel:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))

    @property
    def contiguous(self) -> bool:
        """Row-major without gaps."""
        wanted = row_major(self.shape)
        return all(
            have == want or size == 1
            for have, want, size in zip(self.strides, wanted, self.shape, strict=True)
        )

    def narrow(self, offset: tuple[int, ...], size: tuple[int, ...]) -> FileTensor:
        """The elements from `offset` to `offset + size`."""
        first = sum(at * step for at, step in zip(offset, self.strides, strict=True))
        return FileTensor(self.file, self.start + first * self.item_size, self.dtype, size, self.strides)

    def reshape(self, shape: tuple[int, ...]) -> FileTensor:
        """The same bytes in another shape of as many elements; the tensor has to be contiguous."""
        if not self.contiguous or math.prod(shape) != self.numel:
            raise ValueError(f"{self.file}: a tensor of shape {list(self.shape)} cannot become {list(shape)}")
        return FileTensor(self.file, self.start, self.dtype, shape, row_major(shape))

    def piece(self, box: Box | None = None) -> Piece:
        """The tensor as a piece of a larger one.

        Args:
            box: which elements of the larger tensor these are, as many as this one has; a box of another
                shape takes them row-major. None: the tensor is the whole.

        Raises:
            ValueError: elements share memory (an expanded tensor), or a dtype that no parameter has.
        """
        if box is None:
            box = Box((0,) * len(self.shape), self.shape)
        tensor = self if box.size == self.shape else self.reshape(box.size)
        if self.dtype not in ITEM_SIZES:
            raise ValueError(f"{self.file}: a tensor of dtype {self.dtype}, which is not read")
        if tensor.contiguous:
            return Piece(self.file, self.start, self.dtype, box)
        if any(step <= 0 < size - 1 for size, step in zip(tensor.shape, tensor.strides, strict=True)):
            raise ValueError(
                f"{self.file}: an expanded tensor of shape {list(self.shape)}, which is not read"
            )
        return Piece(self.file, self.start, self.dtype, box, strides=tensor.strides)

    def read(self) -> npt.NDArray[Any]:
        """The elements, for small tensors: numpy has them all in memory. bfloat16 becomes float32, exactly.

        Raises:
            ValueError: the file ends early, or numpy has no such dtype.
        """
        raw = np.frombuffer(self._bytes(), "<u2" if self.dtype == "bfloat16" else self._numpy_dtype())
        steps = tuple(step * self.item_size for step in self.strides)
        values = (
            np.lib.stride_tricks.as_strided(raw, self.shape, steps) if self.numel else raw.reshape(self.shape)
        )
        if self.dtype == "bfloat16":
            return (np.ascontiguousarray(values).astype("<u4") << 16).view("<f4").reshape(self.shape)
        return values.copy()

    def item(self) -> float | int | bool:
        """The value of a tensor of one element."""
        if self.numel != 1:
            raise ValueError(f"{self.file}: a number is expected, found a tensor of shape {list(self.shape)}")
        value: float | int | bool = self.read().reshape(-1)[0].item()
        return value

    def _numpy_dtype(self) -> np.dtype[Any]:
        try:
            return np.dtype(self.dtype).newbyteorder("<")
        except TypeError:
            raise ValueError(f"{self.file}: numbers of dtype {self.dtype} are not read one by one") from None

    def _bytes(self) -> bytes:
        length = self.span * self.item_size
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            content = os.pread(descriptor, length, self.start)
        finally:
            os.close(descriptor)
        if len(content) != length:
            raise ValueError(
                f"{self.file}: ends at byte {self.start + len(content)}, where "
                f"{length - len(content)} more are expected: it is truncated"
            )
        return content
