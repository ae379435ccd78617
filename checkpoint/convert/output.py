"""What a writer asks for: files made of regions, which parts of logical tensors fill, and fixed bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.manifest import ITEM_SIZES
from checkpoint.source import Part

Chunks = Sequence[tuple[int, bytes]]
"""(byte in the file, content)"""


@dataclass(frozen=True)
class Region:
    """A row-major tensor in an output file. What no part fills is zero (padding).

    Attributes:
        key: names it within its file.
        start: its first byte.
        dtype: that is written; numbers of another one are rounded to nearest even.
        shape: of the tensor.
        state: of the logical tensors that the parts name.
        parts: which box of which logical tensor is which region of this one.
    """

    key: str
    start: int
    dtype: str
    shape: tuple[int, ...]
    state: str
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class OutputFile:
    """A file of the target.

    Attributes:
        path: relative to the target's folder.
        early: bytes that are known beforehand: headers.
        late: makes the bytes that depend on the CRC-32 of the regions, which are given by key; None where
            nothing does, so that no CRC has to be computed.
    """

    path: str
    num_bytes: int
    regions: tuple[Region, ...]
    early: Chunks = ()
    late: Callable[[Mapping[str, int]], Chunks] | None = None


Hashes = Mapping[str, Mapping[str, str]]
"""Path of an output file -> key of a region -> xxh3-64 of its bytes, 16 hexadecimal digits."""


@dataclass
class WritePlan:
    """Everything that a writer wants done.

    Attributes:
        format: of the target, for people.
        files: large ones, written in one pass from the source's bytes.
        small: content of small files by relative path.
        last: makes small files that need the regions' hashes, such as a manifest; written after all else.
        carried: files of the source's folder, or another, to copy along: relative path -> from where.
        lost: what the target cannot hold, a line each; refused unless the user drops it.
        notes: what the user should know, a line each.
    """

    format: str
    files: list[OutputFile] = field(default_factory=list)
    small: dict[str, bytes] = field(default_factory=dict)
    last: Callable[[Hashes], Mapping[str, bytes]] | None = None
    carried: dict[str, Path] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """That will be written, small files aside."""
        return sum(file.num_bytes for file in self.files)
