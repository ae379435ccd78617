"""The directory of a zip archive that stores its members as they are, as torch.save writes it.

The archive may be a window of a bigger file. Format: PKWARE's APPNOTE.TXT 6.3, with zip64.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
END64, LOCATOR64 = b"PK\x06\x06", b"PK\x06\x07"
TAIL = 22 + 20 + 56  # end record, zip64 locator and zip64 end record: the last bytes of an archive
LONGEST_COMMENT = 1 << 16
UNKNOWN32, UNKNOWN16 = 0xFFFFFFFF, 0xFFFF  # "look into the zip64 fields"


class BadZipError(ValueError):
    """What is wrong with an archive; whoever knows the file adds its name."""


class Record(NamedTuple):
    """A member of an archive.

    Attributes:
        header: byte of the file where its local header begins.
        num_bytes: of its content.
        crc: CRC-32 of its content; 0 may also mean that it was not computed.
    """

    header: int
    num_bytes: int
    crc: int


class Window:
    """Bytes `start` to `start + length` of an open file."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor = descriptor
        self.start, self.length = start, length

    def read(self, at: int, length: int) -> bytes:
        """Bytes from `at` (counted in the window) on; fewer at its end."""
        length = max(0, min(length, self.length - at))
        content = os.pread(self._descriptor, length, self.start + at)
        while len(content) < length:
            more = os.pread(self._descriptor, length - len(content), self.start + at + len(content))
            if not more:
                break
            content += more
        return content


def read_directory(window: Window) -> dict[str, Record]:
    """Members by name, in the archive's order.

    Raises:
        BadZipError: truncated or damaged, a member is compressed or encrypted, or a name occurs twice.
    """
    count, start, length = _find_directory(window)
    content = window.read(start, length)
    if len(content) < length:
        raise BadZipError("its zip directory lies beyond its end: it is truncated or damaged")
    records: dict[str, Record] = {}
    at = 0
    for _ in range(count):
        name, record, at = _entry(content, at, window)
        if name in records:
            raise BadZipError(f"it has two members {name}: it is damaged")
        records[name] = record
    return records


def payload_start(window: Window, name: str, record: Record) -> int:
    """Byte of the file where the content of a member begins.

    Raises:
        BadZipError: no member begins there, or its content lies beyond the archive's end.
    """
    header = window.read(record.header - window.start, 30)
    if len(header) < 30 or header[:4] != LOCAL:
        raise BadZipError(f"byte {record.header} should begin its member {name}, but does not: it is damaged")
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    start: int = record.header + 30 + name_length + extra_length
    if start + record.num_bytes > window.start + window.length:
        raise BadZipError(
            f"its member {name} of {record.num_bytes} bytes lies beyond its end: it is truncated"
        )
    return start


def _find_directory(window: Window) -> tuple[int, int, int]:
    """Number of members, first byte (in the window) and length of the central directory."""
    tail = window.read(max(0, window.length - TAIL), TAIL)
    at = tail.rfind(END)
    if at < 0:
        tail = window.read(max(0, window.length - TAIL - LONGEST_COMMENT), TAIL + LONGEST_COMMENT)
        at = tail.rfind(END)
    if at < 0 or len(tail) - at < 22:
        raise BadZipError(f"its {window.length} bytes do not end with a zip directory: it is truncated")
    count, length, start = struct.unpack_from("<H2I", tail, at + 10)
    locator = tail.rfind(LOCATOR64, 0, at)
    if UNKNOWN16 == count or UNKNOWN32 in (length, start):
        if locator < 0 or at - locator != 20:
            raise BadZipError("its zip64 directory is missing: it is damaged")
        (where,) = struct.unpack_from("<Q", tail, locator + 8)
        end = window.read(where, 56)
        if len(end) < 56 or end[:4] != END64:
            raise BadZipError("its zip64 directory is missing: it is damaged")
        count, length, start = struct.unpack_from("<3Q", end, 32)
    if start + length > window.length:
        raise BadZipError("its zip directory lies beyond its end: it is truncated or damaged")
    return count, start, length


def _entry(content: bytes, at: int, window: Window) -> tuple[str, Record, int]:
    """A member's name and place, and where the next entry begins."""
    if content[at : at + 4] != CENTRAL or len(content) < at + 46:
        raise BadZipError(f"entry {at} of its zip directory is damaged")
    flags, method, crc, packed, size, name_length, extra_length, comment_length, header = struct.unpack_from(
        "<HH4xIII3H8xI", content, at + 8
    )
    begin = at + 46
    name = content[begin : begin + name_length].decode("utf-8", "replace")
    extra = content[begin + name_length : begin + name_length + extra_length]
    if UNKNOWN32 in (packed, size, header):
        size, packed, header = _zip64(extra, name, (size, packed, header))
    if flags & 1:
        raise BadZipError(f"its member {name} is encrypted: torch.save does not write that")
    if method != 0 or packed != size:
        raise BadZipError(
            f"its member {name} is compressed: torch.save does not write that; store it uncompressed"
        )
    return name, Record(window.start + header, size, crc), begin + name_length + extra_length + comment_length


def _zip64(extra: bytes, name: str, known: tuple[int, int, int]) -> tuple[int, int, int]:
    """Size, packed size and header's place, of which the unknown ones stand in an extra field of id 1."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            numbers = iter(
                struct.unpack_from(f"<{length // 8}Q", extra.ljust(at + 4 + length, b"\0"), at + 4)
            )
            size, packed, header = (next(numbers, n) if n == UNKNOWN32 else n for n in known)
            return size, packed, header
        at += 4 + length
    raise BadZipError(f"its member {name} lacks the zip64 sizes: it is damaged")
