"""Files of torch.save, without their payload and without torch.

`open_torch_file(path).value` is what torch.load would give, except that every tensor is a `FileTensor` (its
place in the file) and every object of a trainer's class an `Opaque`. Both formats are read: the zip archive
of torch 1.6 and later, and the older one of pickles one behind the other (`torch_legacy`).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.archive.opcodes import BadPickleError
from checkpoint.archive.pickles import load_pickle
from checkpoint.archive.rebuild import FUNCTIONS, FileStorage, storage_of
from checkpoint.archive.torch_legacy import is_legacy, read_legacy
from checkpoint.archive.zip_records import LOCAL, BadZipError, Record, Window, payload_start, read_directory


@dataclass(frozen=True)
class TorchFile:
    """A file of torch.save.

    Attributes:
        path: of the file.
        value: the object that was saved, with a `FileTensor` for every tensor.
    """

    path: Path
    value: Any


def open_torch_file(path: Path | str, offset: int = 0, length: int | None = None) -> TorchFile:
    """What torch.save wrote to a file, or to `length` bytes from `offset` on of a bigger file.

    Raises:
        ValueError: not there, empty, truncated, damaged, of another format, or its pickle asks for names that
            are not on the list of `checkpoint.archive.pickles`; the file and the cause are named.
    """
    file = os.path.abspath(path)
    with _opened(file) as descriptor:
        size = os.fstat(descriptor).st_size
        rest = size - offset if length is None else length
        where = file if length is None else f"{file} (bytes {offset} to {offset + rest})"
        if rest <= 0 or offset + rest > size:
            raise ValueError(f"{where}: {_too_short(rest, size)}")
        window = Window(descriptor, offset, rest)
        try:
            begin = window.read(0, 32)
            if begin[:4] == LOCAL:
                value = _read_zip(window, file, where)
            elif is_legacy(begin) and length is None:
                value = read_legacy(descriptor, file, size)
            else:
                raise ValueError(f"{where}: is no file of torch.save: it begins with {begin[:8]!r}")
        except (BadZipError, BadPickleError) as fault:
            raise ValueError(f"{where}: {fault}") from None
    return TorchFile(Path(file), value)


def read_torch_bytes(path: Path | str, offset: int, length: int) -> TorchFile:
    """What torch.save wrote into a part of a bigger file."""
    return open_torch_file(path, offset, length)


def _too_short(rest: int, size: int) -> str:
    return "is empty (0 bytes)" if size == 0 else f"the file has only {size} bytes: it is truncated"


@contextmanager
def _opened(file: str) -> Iterator[int]:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    try:
        yield descriptor
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _read_zip(window: Window, file: str, where: str) -> Any:
    members = read_directory(window)
    prefix = next((name.rpartition("/")[0] for name in members if name.endswith("data.pkl")), None)
    if prefix is None:
        raise BadZipError("it is a zip archive without data.pkl: not a file of torch.save")
    if f"{prefix}/constants.pkl" in members:
        raise BadZipError("it is a TorchScript program (torch.jit.save), not a checkpoint")
    if f"{prefix}/byteorder" in members:
        order = _content(window, members, f"{prefix}/byteorder")
        if order != b"little":
            raise BadZipError(
                f"its numbers are {order.decode('latin1')}-endian: only little-endian files are read"
            )
    pickled = _content(window, members, f"{prefix}/data.pkl")
    return load_pickle(pickled, where, _storages(window, members, prefix, file), functions=FUNCTIONS)


def _storages(
    window: Window, members: dict[str, Record], prefix: str, file: str
) -> Callable[[Any], FileStorage]:
    """What gives the place of a storage from its persistent id."""
    found: dict[str, tuple[int, int]] = {}

    def place(saved_id: Any) -> FileStorage:
        dtype, key, num_bytes = storage_of(saved_id)
        if key not in found:
            name = f"{prefix}/data/{key}"
            if name not in members:
                raise BadPickleError(f"its pickle refers to the storage {key}, but there is no member {name}")
            member = members[name]
            start = payload_start(window, name, member)
            found[key] = (start, member.num_bytes)
        start, held = found[key]
        if num_bytes > held:
            raise BadPickleError(f"the storage {key} should have {num_bytes} bytes, the archive holds {held}")
        return FileStorage(file, start, held, dtype)

    return place


def _content(window: Window, members: dict[str, Record], name: str) -> bytes:
    record = members[name]
    content = window.read(payload_start(window, name, record) - window.start, record.num_bytes)
    if record.crc and zlib.crc32(content) != record.crc:
        raise BadZipError(f"its member {name} does not have its checksum: it is damaged")
    return content
