"""The layout of a torch.save archive whose payload somebody else writes into its place.

`lay_out` needs the sizes of the storages only. What it gives is what torch.save itself would write, byte for
byte but for the serialisation id: members stored as they are, payloads aligned to 64 bytes, sizes and
checksums behind each payload and in the directory, zip64 where 4 GiB are passed. So torch.load reads it,
mapped or not.

Format: PKWARE's APPNOTE.TXT 6.3; `caffe2/serialize/inline_container.cc` of torch for the alignment.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from checkpoint.archive.zip_records import CENTRAL, END, END64, LOCAL, LOCATOR64, UNKNOWN16, UNKNOWN32

ALIGNMENT = 64
DESCRIPTOR = b"PK\x07\x08"
IN_DESCRIPTOR, UTF8 = 0x0008, 0x0800  # flags: sizes follow the content; names are UTF-8
MADE_BY, NEEDS = 0x031E, 45  # Unix, version 4.5 (zip64)


class _Member(NamedTuple):
    """A member of the archive: bytes `start` to `start + num_bytes` of it; its header begins at `header`.

    Its content is either known, or the payload of the storage `key`.
    """

    name: bytes
    header: int
    start: int
    num_bytes: int
    content: bytes = b""
    key: str | None = None

    def crc(self, crcs: Mapping[str, int]) -> int:
        """CRC-32 of the content; `crcs` has those of the payloads."""
        return zlib.crc32(self.content) if self.key is None else crcs[self.key]

    @property
    def end(self) -> int:
        """Behind the descriptor."""
        return self.start + self.num_bytes + len(self.descriptor(0))

    def local_header(self) -> bytes:
        """What precedes the content, padding included."""
        flags = UTF8 | (IN_DESCRIPTOR if self.num_bytes else 0)
        zip64 = _zip64(self.num_bytes, self.header)
        padding = self.start - self.header - 30 - len(self.name) - len(zip64) - 4
        extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        return struct.pack("<4s5H3I2H", LOCAL, 0, flags, 0, 0, 0, 0, 0, 0, len(self.name), len(extra)) + (
            self.name + extra
        )

    def descriptor(self, crc: int) -> bytes:
        """What follows the content."""
        if not self.num_bytes:
            return b""
        wide = max(self.num_bytes, self.header) >= UNKNOWN32
        return struct.pack("<4sI2Q" if wide else "<4s3I", DESCRIPTOR, crc, self.num_bytes, self.num_bytes)

    def central_entry(self, crc: int) -> bytes:
        """Its entry in the directory."""
        flags = UTF8 | (IN_DESCRIPTOR if self.num_bytes else 0)
        zip64 = _zip64(self.num_bytes, self.header)
        size, header = min(self.num_bytes, UNKNOWN32), min(self.header, UNKNOWN32)
        fixed = (
            CENTRAL,
            0,
            0,
            flags,
            0,
            0,
            0,
            crc,
            size,
            size,
            len(self.name),
            len(zip64),
            0,
            0,
            0,
            0,
            header,
        )
        return struct.pack("<4s6H3I5H2I", *fixed) + self.name + zip64


def _zip64(size: int, header: int) -> bytes:
    """The extra field of what does not fit into 32 bits."""
    numbers = [size, size] if size >= UNKNOWN32 else []
    numbers += [header] if header >= UNKNOWN32 else []
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


@dataclass(frozen=True)
class ArchiveLayout:
    """Where everything of an archive lies. Places are bytes from its start.

    Attributes:
        early: (place, bytes) of all that is known beforehand: headers, the pickle, small members.
        payloads: storage key -> (place, number of bytes), in the order given.
        num_bytes: of the whole archive.
    """

    early: tuple[tuple[int, bytes], ...]
    payloads: dict[str, tuple[int, int]]
    num_bytes: int
    _members: tuple[_Member, ...]

    def late(self, crcs: Mapping[str, int]) -> tuple[tuple[int, bytes], ...]:
        """(place, bytes) of all that depends on the CRC-32 of the payloads, given by storage key."""
        payloads = [member for member in self._members if member.key is not None]
        descriptors = [(each.start + each.num_bytes, each.descriptor(each.crc(crcs))) for each in payloads]
        found = [(place, content) for place, content in descriptors if content]
        return (*found, (self._members[-1].end, _directory(self._members, crcs)))


def lay_out(pickled: bytes, storages: Sequence[tuple[str, int]], *, name: str = "archive") -> ArchiveLayout:
    """The layout of an archive.

    Args:
        pickled: its data.pkl, see `checkpoint.archive.pickle_writer`.
        storages: (key, number of bytes), in the order in which they shall lie.
        name: of the folder in the archive: "archive", or the file's name without its ending.
    """
    identity = int.from_bytes(hashlib.blake2b(pickled).digest(), "little") % 10**40
    first = {"data.pkl": pickled, ".format_version": b"1", ".storage_alignment": b"%d" % ALIGNMENT}
    first |= {"byteorder": b"little"}
    last = {"version": b"3\n", ".data/serialization_id": b"%040d" % identity}
    members: list[_Member] = []
    for key, content in first.items():
        members.append(_small(f"{name}/{key}", members, content))
    for key, size in storages:
        members.append(_place(f"{name}/data/{key}", members, size)._replace(key=key))
    for key, content in last.items():
        members.append(_small(f"{name}/{key}", members, content))
    early: list[tuple[int, bytes]] = []
    for member in members:
        early.append((member.header, member.local_header()))
        if member.key is None:
            early.append((member.start, member.content + member.descriptor(member.crc({}))))
    payloads = {member.key: (member.start, member.num_bytes) for member in members if member.key is not None}
    size = members[-1].end + len(_directory(members, dict.fromkeys(payloads, 0)))
    return ArchiveLayout(_joined(early), payloads, size, tuple(members))


def _place(name: str, before: Sequence[_Member], size: int) -> _Member:
    """The next member, its content on the next aligned byte."""
    header = before[-1].end if before else 0
    least = header + 30 + len(name.encode()) + len(_zip64(size, header)) + 4
    return _Member(name.encode(), header, -(-least // ALIGNMENT) * ALIGNMENT, size)


def _small(name: str, before: Sequence[_Member], content: bytes) -> _Member:
    return _place(name, before, len(content))._replace(content=content)


def _directory(members: Sequence[_Member], crcs: Mapping[str, int]) -> bytes:
    """The central directory and the end records, in both widths as torch.save writes them."""
    start = members[-1].end
    entries = b"".join(member.central_entry(member.crc(crcs)) for member in members)
    count, length = len(members), len(entries)
    end = struct.pack("<4sQ2H2I4Q", END64, 44, MADE_BY, NEEDS, 0, 0, count, count, length, start)
    end += struct.pack("<4sIQI", LOCATOR64, 0, start + length, 1)
    few = min(count, UNKNOWN16)
    end += struct.pack("<4s4H2IH", END, 0, 0, few, few, min(length, UNKNOWN32), min(start, UNKNOWN32), 0)
    return entries + end


def _joined(parts: Sequence[tuple[int, bytes]]) -> tuple[tuple[int, bytes], ...]:
    """Parts that follow each other as one."""
    joined: list[tuple[int, bytes]] = []
    for place, content in parts:
        if joined and joined[-1][0] + len(joined[-1][1]) == place:
            joined[-1] = (joined[-1][0], joined[-1][1] + content)
        else:
            joined.append((place, content))
    return tuple(joined)
