"""Pickles of checkpoints, written without importing what they name.

Protocol 2, without memo: nested containers, numbers, strings, tensors as references to storages, and objects
of other programs' classes by name. torch.load reads them, with weights_only where the names allow it.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from checkpoint.archive.allowed import STORAGES
from checkpoint.archive.file_tensor import ELEMENT_SIZES
from checkpoint.archive.standins import Namespace, Opaque
from checkpoint.plan import row_major

_CLASSES = {dtype: f"torch.{kind}Storage" for kind, dtype in STORAGES.items() if kind != "Untyped"}


class TensorRef(NamedTuple):
    """A row-major tensor that has a storage of its own.

    Attributes:
        key: of the storage.
        dtype: torch's name, without "torch.".
        shape: in elements.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]


class Name(NamedTuple):
    """A class, function or other object of a module: "torch.bfloat16"."""

    name: str


class Call(NamedTuple):
    """What a function or class gives when it is called: an enum member, torch.Size."""

    name: str
    args: tuple[Any, ...]


class Instance(NamedTuple):
    """An object of a class, made without calling its constructor; its state is its attributes."""

    name: str
    state: Any


def write_pickle(value: Any) -> bytes:
    """The pickle of a value. Stand-ins that were read (`Opaque`, `Namespace`) become what they stand for.

    Raises:
        ValueError: a value of a type that is not written here; its place is named.
    """
    out: list[bytes] = []
    _write(value, out.append, "")
    return b"\x80\x02" + b"".join(out) + b"."


_Put = Callable[[bytes], None]


def _write(value: Any, put: _Put, where: str) -> None:
    write = _WRITERS.get(type(value))
    if write is None:
        write = next((w for kind, w in _WRITERS.items() if isinstance(value, kind)), None)
    if write is None:
        raise ValueError(f"{where or 'the value'} is of type {type(value).__name__}, which is not written")
    write(value, put, where)


def _write_int(value: int, put: _Put, _: str) -> None:
    if 0 <= value < 256:
        put(b"K" + struct.pack("<B", value))
    elif -(1 << 31) <= value < 1 << 31:
        put(b"J" + struct.pack("<i", value))
    else:
        digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        put(b"\x8a" + struct.pack("<B", len(digits)) + digits)


def _write_str(value: str, put: _Put, _: str) -> None:
    encoded = value.encode("utf-8", "surrogatepass")
    put(b"X" + struct.pack("<I", len(encoded)) + encoded)


def _write_bytes(value: bytes | bytearray, put: _Put, where: str) -> None:
    kind = "builtins.bytearray" if isinstance(value, bytearray) else "_codecs.encode"
    _write_call(Call(kind, (bytes(value).decode("latin1"), "latin1")), put, where)


def _write_list(value: Iterable[Any], put: _Put, where: str) -> None:
    put(b"](")
    for number, item in enumerate(value):
        _write(item, put, f"{where}[{number}]")
    put(b"e")


def _write_tuple(value: tuple[Any, ...], put: _Put, where: str) -> None:
    put(b"(")
    for number, item in enumerate(value):
        _write(item, put, f"{where}[{number}]")
    put(b"t")


def _write_items(value: Mapping[Any, Any], put: _Put, where: str) -> None:
    put(b"(")
    for key, item in value.items():
        _write(key, put, f"{where}: its key {key!r}")
        _write(item, put, f"{where}[{key!r}]")
    put(b"u")


def _write_dict(value: dict[Any, Any], put: _Put, where: str) -> None:
    put(b"}")
    _write_items(value, put, where)


def _write_ordered(value: Mapping[Any, Any], put: _Put, where: str) -> None:
    _write_call(Call("collections.OrderedDict", ()), put, where)
    _write_items(value, put, where)


def _write_set(value: set[Any], put: _Put, where: str) -> None:
    _write_call(Call("builtins.set", (sorted(value),)), put, where)


def _write_name(value: Name, put: _Put, _: str) -> None:
    module, _, name = value.name.rpartition(".")
    put(f"c{module.replace('builtins', '__builtin__')}\n{name}\n".encode())


def _write_call(value: Call, put: _Put, where: str) -> None:
    _write_name(Name(value.name), put, where)
    _write_tuple(value.args, put, where)
    put(b"R")


def _write_instance(value: Instance, put: _Put, where: str) -> None:
    _write_name(Name(value.name), put, where)
    put(b")\x81")
    _write(value.state, put, where)
    put(b"b")


def _write_namespace(value: Namespace, put: _Put, where: str) -> None:
    _write_instance(Instance("argparse.Namespace", dict(value)), put, where)


def _write_opaque(value: Opaque, put: _Put, where: str) -> None:
    """An enum member has arguments and no state; other objects are made from nothing and get their state."""
    if value.state is None:
        _write_call(Call(value.name, value.args), put, where)
    elif value.args or value.items or value.mapping:
        raise ValueError(f"{where or 'the value'} is a {value.name}, which cannot be written again")
    else:
        _write_instance(Instance(value.name, value.state), put, where)


def _write_tensor(value: TensorRef, put: _Put, where: str) -> None:
    numel = math.prod(value.shape)
    known = value.dtype in _CLASSES
    size = 1 if known else _element_size(value.dtype, where)
    _write_name(
        Name("torch._utils._rebuild_tensor_v2" if known else "torch._utils._rebuild_tensor_v3"), put, where
    )
    put(b"(")
    kind = Name(_CLASSES.get(value.dtype, "torch.storage.UntypedStorage"))
    _write_tuple(("storage", kind, value.key, "cpu", numel * size), put, where)
    put(b"Q")
    hooks: OrderedDict[str, Any] = OrderedDict()
    _write_int(0, put, where)
    _write_tuple(value.shape, put, where)
    _write_tuple(row_major(value.shape), put, where)
    _write(False, put, where)
    _write_ordered(hooks, put, where)
    if not known:
        _write_name(Name(f"torch.{value.dtype}"), put, where)
    put(b"tR")


def _element_size(dtype: str, where: str) -> int:
    if dtype not in ELEMENT_SIZES:
        raise ValueError(f"{where or 'the value'} is a tensor of dtype {dtype!r}, which is not known")
    return ELEMENT_SIZES[dtype]


_WRITERS: dict[type, Callable[[Any, _Put, str], None]] = {
    type(None): lambda _, put, __: put(b"N"),
    bool: lambda value, put, _: put(b"\x88" if value else b"\x89"),
    int: _write_int,
    float: lambda value, put, _: put(b"G" + struct.pack(">d", value)),
    str: _write_str,
    bytes: _write_bytes,
    bytearray: _write_bytes,
    TensorRef: _write_tensor,
    Name: _write_name,
    Call: _write_call,
    Instance: _write_instance,
    Namespace: _write_namespace,
    Opaque: _write_opaque,
    OrderedDict: _write_ordered,
    list: _write_list,
    tuple: _write_tuple,
    set: _write_set,
    dict: _write_dict,
}
"""By type; a subclass goes by the first of these that it is one of."""
