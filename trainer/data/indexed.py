"""Megatron's pair of files: PREFIX.bin holds the tokens, PREFIX.idx says where each document begins.

`.idx`, little-endian: 9 bytes `MMIDIDX\\0\\0`, version u64 = 1, dtype code u8, number of sequences u64,
number of document borders u64; then the tokens of each sequence (int32), the byte offset of each sequence in
`.bin` (int64) and the sequence at which each document begins, closed by the number of sequences (int64).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}


def token_dtype(vocab_size: int) -> type[np.generic]:
    """The narrowest type that Megatron uses for ids below `vocab_size`."""
    return np.uint16 if vocab_size < 65500 else np.int32


class IndexedReader:
    """A pair of files, mapped into memory: opening costs the same for ten documents and for ten million.

    A document of several Megatron sequences is read as one document.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Map the files.

        Raises:
            ValueError: a file is missing, is no index, or the two do not fit together.
        """
        self.prefix = str(prefix)
        index = Path(self.prefix + ".idx")
        self.dtype, sequences, borders = _read_header(index)
        expected = HEADER.size + 12 * sequences + 8 * borders
        if index.stat().st_size < expected:
            raise ValueError(
                f"{index}: {index.stat().st_size} bytes, its header promises {expected}; the file was cut "
                "short, copy or prepare it again"
            )
        self._pages, self._lengths, self._pointers, self._borders = _map_index(index, sequences, borders)
        self.num_tokens = self._check_tokens()
        self.num_documents = max(0, borders - 1)
        self._one_each = borders == sequences + 1
        self._check_borders()
        self._let_go()
        self.tokens: NDArray[Any] = _map(Path(self.prefix + ".bin"), self.dtype, self.num_tokens, 0)

    def _check_tokens(self) -> int:
        """The number of tokens, once `.bin` is known to hold exactly those of the index."""
        data = Path(self.prefix + ".bin")
        if not data.is_file():
            raise ValueError(f"{data} does not exist, but its index does; copy or prepare it again")
        end = (
            int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize
            if len(self._lengths)
            else 0
        )
        if data.stat().st_size != end:
            raise ValueError(
                f"{data}: {data.stat().st_size} bytes, its index says {end}; the two files are not of one "
                "set, copy or prepare them again"
            )
        return end // self.dtype.itemsize

    def _check_borders(self) -> None:
        """Megatron's builder writes sequences behind the last end_document() into no document at all."""
        ends = self._first_token(self._borders[[0, -1]]).tolist() if len(self._borders) else [0, 0]
        if ends != [0, self.num_tokens]:
            raise ValueError(
                f"{self.prefix}.idx: its documents hold tokens {ends[0]} to {ends[1]} of the "
                f"{self.num_tokens} in {self.prefix}.bin; end every document, the last one too "
                "(end_document() of Megatron's builder), and write the index again"
            )

    def __len__(self) -> int:
        return self.num_documents

    def spans(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First token and number of tokens of each of these documents, both int64 [documents]."""
        if self._one_each:
            begin = self._pointers[documents] // self.dtype.itemsize
            lengths = self._lengths[documents].astype(np.int64)
        else:
            begin = self._first_token(self._borders[documents])
            lengths = self._first_token(self._borders[documents + 1]) - begin
        self._let_go()
        return begin, lengths

    def _let_go(self) -> None:
        """Unmap the pages looked at: documents in random order would come to map all of a large index.

        They stay in the kernel's cache, but those of hundreds of sources count as gigabytes of this process.
        """
        self._pages.madvise(mmap.MADV_DONTNEED)

    def _first_token(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        if not len(self._pointers):
            return np.zeros_like(sequences)
        last = len(self._pointers) - 1
        inside = self._pointers[np.minimum(sequences, last)] // self.dtype.itemsize
        return np.where(sequences <= last, inside, self.num_tokens)

    def __getitem__(self, document: int) -> NDArray[Any]:
        """The tokens of one document."""
        begin, length = self.spans(np.array([document]))
        return np.asarray(self.tokens[begin[0] : begin[0] + length[0]])


def write_index(file: BinaryIO, dtype: DTypeLike, lengths: Sequence[NDArray[np.int32]]) -> None:
    """Write an `.idx` for documents of one sequence each; `lengths` are their tokens, in pieces of any
    size."""
    kind = np.dtype(dtype)
    code = next(code for code, known in DTYPES.items() if np.dtype(known) == kind)
    count = sum(map(len, lengths))
    file.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
    for piece in lengths:
        file.write(piece.astype("<i4").tobytes())
    begin = 0
    for piece in lengths:
        ends = begin + np.cumsum(piece, dtype=np.int64) * kind.itemsize
        file.write((ends - piece.astype(np.int64) * kind.itemsize).astype("<i8").tobytes())
        begin = int(ends[-1]) if len(ends) else begin
    file.write(np.arange(count + 1, dtype="<i8").tobytes())


def _read_header(index: Path) -> tuple[np.dtype[Any], int, int]:
    if not index.is_file():
        raise ValueError(f"{index} does not exist; make it with: ratoon data prepare")
    with index.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(f"{index}: not a Megatron index (it begins with {head[:9]!r}, expected {MAGIC!r})")
    _, version, code, sequences, borders = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise ValueError(
            f"{index}: version {version}, token type code {code}; expected version 1 and one of "
            f"{sorted(DTYPES)}"
        )
    return np.dtype(DTYPES[code]), sequences, borders


def _map(path: Path, dtype: DTypeLike, count: int, offset: int) -> NDArray[Any]:
    if count == 0:
        return np.empty(0, dtype=dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def _map_index(
    path: Path, sequences: int, borders: int
) -> tuple[mmap.mmap, NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The mapped file, and the lengths, pointers and borders in it."""
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    at, arrays = HEADER.size, []
    for dtype, count in ((np.int32, sequences), (np.int64, sequences), (np.int64, borders)):
        arrays.append(np.frombuffer(pages, dtype, count, at) if count else np.empty(0, dtype))
        at += count * np.dtype(dtype).itemsize
    return pages, arrays[0], arrays[1], arrays[2]
