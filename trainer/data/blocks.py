"""The bytes of an input file, decompressed where its name says .gz or .zst."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import IO, Protocol

COMPRESSED_SUFFIXES = (".gz", ".zst")
BLOCK_BYTES = 1 << 20
COMPRESSED_BLOCK_BYTES = 1 << 18
ZSTD_LARGEST_WINDOW = 1 << 31  # what `zstd --long=31` needs, in which large corpora are handed on


class Decoder(Protocol):
    """Decompresses one gzip member or one Zstandard frame."""

    @property
    def eof(self) -> bool:
        """Whether the end of the frame has been read."""

    @property
    def unused_data(self) -> bytes:
        """What was handed in from behind that end."""

    def decompress(self, data: bytes, /) -> bytes:
        """The content of the next bytes."""


def read_blocks(file: IO[bytes], path: str) -> Iterator[bytes]:
    """The content of `file`, which is open at `path`, in pieces of any size above 0.

    Whatever can be decompressed before a file breaks off is given before the error is raised.

    Raises:
        EOFError: the file was cut short.
        OSError, zlib.error, zstandard.ZstdError: it cannot be read, or is no such file; see `unreadable`.
    """
    suffix = path.lower()
    if suffix.endswith(".gz"):
        yield from _decompress(file, lambda: zlib.decompressobj(wbits=31))
    elif suffix.endswith(".zst"):
        import zstandard

        yield from _decompress(
            file, zstandard.ZstdDecompressor(max_window_size=ZSTD_LARGEST_WINDOW).decompressobj
        )
    else:
        while block := file.read(BLOCK_BYTES):
            yield block


def _decompress(file: IO[bytes], start_frame: Callable[[], Decoder]) -> Iterator[bytes]:
    decoder = start_frame()
    begun = False
    while data := file.read(COMPRESSED_BLOCK_BYTES):
        begun = True
        while data:
            if decoder.eof:
                data = data.lstrip(b"\0")  # padding, as tapes leave it; no frame begins with a zero
                if not data:
                    break
                decoder = start_frame()
            if content := decoder.decompress(data):
                yield content
            data = decoder.unused_data
    if begun and not decoder.eof:
        raise EOFError("ends in the middle of a frame")


def unreadable(error: Exception) -> bool:
    """Whether this is about the file: it cannot be opened, or its compressed stream is broken."""
    return isinstance(error, OSError | EOFError | zlib.error) or type(error).__name__ == "ZstdError"
