"""The format of torch.save before torch 1.6: pickles one behind the other, then the storages.

Magic number, protocol version, a description of the machine, the object, the keys of its storages; then each
storage in the order of the keys: the number of its elements (int64) and the elements. See `_legacy_save` in
`torch/serialization.py`.
"""

from __future__ import annotations

import mmap
import reprlib
import struct
from typing import Any

from checkpoint.archive.file_tensor import ELEMENT_SIZES
from checkpoint.archive.opcodes import BadPickleError, pickle_end
from checkpoint.archive.pickles import load_pickle
from checkpoint.archive.rebuild import FUNCTIONS, FileStorage, storage_of

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


def is_legacy(begin: bytes) -> bool:
    """Whether the first bytes of a file are those of the magic number's pickle."""
    return begin[:1] == b"\x80" and b"\x8a\x0a" + MAGIC.to_bytes(10, "little") in begin


def read_legacy(descriptor: int, file: str, size: int) -> Any:
    """The object in the file, with a `FileTensor` for every tensor.

    Its tensors are made before the file says where the storages are, so it is unpickled twice.

    Raises:
        BadPickleError: truncated or damaged, or of a big-endian machine.
        ValueError: its pickle is refused.
    """
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as content:
        start = _check_head(content, file)
        end = pickle_end(content, start)
        pickled = content[start:end]
        dtypes: dict[str, str] = {}
        load_pickle(pickled, file, lambda saved_id: _note(saved_id, dtypes, file), functions=FUNCTIONS)
        keys_end = pickle_end(content, end)
        keys = load_pickle(content[end:keys_end], file)
        places = _places(content, keys_end, keys, dtypes)
    return load_pickle(pickled, file, lambda saved_id: _place(saved_id, places, file), functions=FUNCTIONS)


def _check_head(content: mmap.mmap, file: str) -> int:
    """Where the object's pickle begins."""
    at = 0
    head = []
    for _ in range(3):
        end = pickle_end(content, at)
        head.append(load_pickle(content[at:end], file))
        at = end
    if head[:2] != [MAGIC, PROTOCOL]:
        raise BadPickleError(f"its protocol version is {reprlib.repr(head[1])}, {PROTOCOL} is read")
    if not isinstance(head[2], dict) or head[2].get("little_endian") is not True:
        raise BadPickleError("its numbers are big-endian: only little-endian files are read")
    return at


def _note(saved_id: Any, dtypes: dict[str, str], file: str) -> Any:
    if isinstance(saved_id, tuple) and saved_id[:1] == ("module",):
        return saved_id[1]  # the class of a pickled module
    dtype, key, num_bytes = storage_of(saved_id)
    dtypes.setdefault(key, dtype)
    return FileStorage(file, 0, num_bytes, dtype)


def _place(saved_id: Any, places: dict[str, tuple[int, int]], file: str) -> Any:
    if isinstance(saved_id, tuple) and saved_id[:1] == ("module",):
        return saved_id[1]
    dtype, key, num_bytes = storage_of(saved_id)
    start, held = places[key]
    if num_bytes > held:
        raise BadPickleError(f"the storage {key} should have {num_bytes} bytes, the file holds {held}")
    return FileStorage(file, start, held, dtype)


def _places(content: mmap.mmap, at: int, keys: Any, dtypes: dict[str, str]) -> dict[str, tuple[int, int]]:
    """First byte and number of bytes of every storage."""
    if not isinstance(keys, list) or set(map(str, keys)) != set(dtypes):
        raise BadPickleError("its list of storages is not that of its tensors: it is damaged")
    places = {}
    for key in map(str, keys):
        if at + 8 > len(content):
            raise BadPickleError(f"it ends before the storage {key}: it is truncated")
        (numel,) = struct.unpack_from("<q", content, at)
        num_bytes = numel * ELEMENT_SIZES[dtypes[key]]
        if numel < 0 or at + 8 + num_bytes > len(content):
            raise BadPickleError(f"it ends inside the storage {key} of {num_bytes} bytes: it is truncated")
        places[key] = (at + 8, num_bytes)
        at += 8 + num_bytes
    return places
