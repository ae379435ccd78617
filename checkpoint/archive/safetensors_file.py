"""The header of a safetensors file: https://huggingface.co/docs/safetensors, "Format".

Eight bytes, little-endian, are the length of a JSON object: name -> {dtype, shape, data_offsets}, where
offsets count from the byte behind the JSON. Everything is checked before it is believed.
"""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from checkpoint.archive.file_tensor import ELEMENT_SIZES, FileTensor
from checkpoint.plan import row_major

LONGEST_HEADER = 100_000_000
"""What the reference implementation accepts, in bytes."""

DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
}


def read_safetensors_header(path: Path | str) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """The tensors of a file, in the order of their bytes, and its metadata.

    Raises:
        ValueError: not there, empty, truncated, no safetensors, or offsets that do not fit the shapes, each
            other or the file; all problems at once.
    """
    file = os.path.abspath(path)
    try:
        tree, data = _header(file)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    size = os.path.getsize(file)
    metadata = tree.pop("__metadata__", {})
    problems: list[str] = []
    found: dict[str, FileTensor] = {}
    for name, entry in tree.items():
        made = _tensor(file, data, name, entry, problems)
        if made is not None:
            found[name] = made
    ordered = dict(sorted(found.items(), key=lambda item: item[1].start))
    problems += _misplaced(ordered, size)
    if problems:
        raise ValueError("\n  ".join([f"{file}: is damaged, or no safetensors file:", *problems]))
    return ordered, metadata if isinstance(metadata, dict) else {}


def _header(file: str) -> tuple[dict[str, Any], int]:
    """The JSON object, and the byte where the data begins."""
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        begin = stream.read(8)
        if len(begin) < 8:
            raise ValueError(f"{file}: is {'empty' if size == 0 else 'truncated'} ({size} bytes)")
        length = int.from_bytes(begin, "little")
        if length > LONGEST_HEADER:
            raise ValueError(f"{file}: is no safetensors file: its header would have {length} bytes")
        if 8 + length > size:
            raise ValueError(f"{file}: is truncated: {size} bytes, of which the header needs {8 + length}")
        text = stream.read(length)
    try:
        tree = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: is damaged, or no safetensors file: its header is no JSON: {error}"
        ) from None
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: is no safetensors file: its header is no JSON object")
    return tree, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return made


def _tensor(file: str, data: int, name: str, entry: Any, problems: list[str]) -> FileTensor | None:
    """A tensor's place; what is wrong with its entry is added to `problems`."""
    try:
        kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        problems.append(f"{name}: its entry {str(entry)[:100]} lacks dtype, shape or data_offsets")
        return None
    dtype = DTYPES.get(kind)
    if dtype is None:
        problems.append(f"{name}: its dtype {kind!r} is not known; read are {', '.join(DTYPES)}")
        return None
    needed = math.prod(shape) * ELEMENT_SIZES[dtype]
    if end - start != needed:
        problems.append(
            f"{name}: {kind} of shape {list(shape)} takes {needed} bytes, its data_offsets {[start, end]} "
            f"hold {end - start}"
        )
        return None
    return FileTensor(file, data + start, dtype, shape, row_major(shape))


def _misplaced(ordered: dict[str, FileTensor], size: int) -> list[str]:
    """Tensors that lie beyond the end of the file, or over each other."""
    problems = []
    ends = [(name, t.start, t.start + t.numel * t.item_size) for name, t in ordered.items() if t.numel]
    beyond = [(name, end) for name, _, end in ends if end > size]
    if beyond:
        problems.append(
            f"it ends at byte {size}, where {len(beyond)} tensors reach further, {beyond[0][0]} up to byte "
            f"{max(end for _, end in beyond)}: it is truncated"
        )
    for (first, _, end), (second, start, _) in pairwise(ends):
        if start < end:
            problems.append(f"{first} and {second} share bytes {start} to {end}")
    return problems
