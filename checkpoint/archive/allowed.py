"""The list of names that a pickle may ask for, and what each of them gives."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

import numpy as np

from checkpoint.archive.opcodes import BadPickleError
from checkpoint.archive.standins import (
    Namespace,
    NumpyDtype,
    Opaque,
    Ordered,
    SavedArray,
    StorageType,
    array_from_bytes,
)

PREFIXES = (
    "megatron.",
    "deepspeed.",
    "transformers.",
    "apex.",
    "transformer_engine.",
    "torch.distributed.",
    "torch.optim.",
    "torch.nn.",
    "torch.amp.",
    "numpy.random.",
    "datetime.",
)
"""Classes whose names begin so become `Opaque`."""

DTYPES = {
    *("float64", "float32", "float16", "bfloat16", "complex32", "complex64", "complex128", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("float4_e2m1fn_x2", "qint8", "quint8", "qint32", "quint4x2", "quint2x4"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
}
"""Of torch."""

STORAGES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"},
    **{"ComplexDouble": "complex128", "ComplexFloat": "complex64", "Untyped": "uint8"},
    **{"QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32"},
}
"""Kind of a class of storages (torch.FloatStorage) -> dtype of its elements."""


def torch_type(name: str) -> str | StorageType | None:
    """A dtype, or the class of a storage; None if it is neither."""
    module, _, last = name.rpartition(".")
    if module == "torch" and last in DTYPES:
        return last
    kind = last.removesuffix("Storage")
    if module in ("torch", "torch.cuda", "torch.storage") and kind != last and kind in STORAGES:
        return StorageType(STORAGES[kind])
    return None


def _member(owner: Any, name: Any) -> Any:
    """An enum member as Python 3.11 and 3.12 pickle some: getattr(class, name)."""
    if isinstance(owner, type) and issubclass(owner, Opaque) and isinstance(name, str):
        return owner(name)
    raise BadPickleError(
        "its pickle asks for builtins.getattr of what is no enum; nothing of it was executed"
    )


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise BadPickleError(
            f"_codecs.encode with {reprlib.repr(encoding)}: only latin1, as bytes are written, is read"
        )
    return text.encode("latin1")


def _bytearray(content: Any = b"", encoding: Any = "latin1") -> bytearray:
    if isinstance(content, str):
        content = _encode(content, encoding)
    if not isinstance(content, bytes | bytearray | list):
        raise BadPickleError(f"bytearray({reprlib.repr(content)}): something else than bytes")
    return bytearray(content)


def _reconstruct(_kind: Any, _shape: Any = (), _code: Any = "b") -> SavedArray:
    return np.ndarray.__new__(SavedArray, (0,), "b")  # its state follows


def _scalar(dtype: Any, content: Any = b"") -> Any:
    return array_from_bytes(content, dtype, ())[()]


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any = "C") -> Any:
    array = array_from_bytes(content, dtype, shape if order == "C" else tuple(reversed(shape)))
    return array if order == "C" else array.T


def _reconstructor(kind: Any, _base: Any = None, _state: Any = None) -> Any:
    if not isinstance(kind, type):
        raise BadPickleError("copyreg._reconstructor of what is no class")
    return kind()


def _new_object(kind: Any, *args: Any) -> Any:
    return _reconstructor(kind) if not args else kind(*args)


CLASSES: dict[str, Any] = {
    "collections.OrderedDict": Ordered,
    "collections.Counter": Ordered,
    "argparse.Namespace": Namespace,
    "types.SimpleNamespace": Namespace,
}
"""Classes that a pickle may make objects of; frozen ones, since what it can name it can try to change."""

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "builtins.set": lambda items=(): set(items),
    "builtins.frozenset": lambda items=(): frozenset(items),
    "builtins.complex": complex,
    "builtins.slice": slice,
    "builtins.bytes": _bytearray,
    "builtins.bytearray": _bytearray,
    "builtins.getattr": _member,
    "_codecs.encode": _encode,
    "collections.defaultdict": lambda _factory=None, items=(): Ordered(items),
    "collections.deque": lambda items=(), _length=None: list(items),
    "copyreg._reconstructor": _reconstructor,
    "copyreg.__newobj__": _new_object,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy.dtype": NumpyDtype,
    "pathlib.PosixPath": lambda *parts: "/".join(parts).replace("//", "/"),
    "pathlib.PurePosixPath": lambda *parts: "/".join(parts).replace("//", "/"),
    "pathlib.WindowsPath": lambda *parts: "\\".join(parts),
    "signal.Signals": int,
    "torch.Size": lambda extents=(): tuple(extents),
    "torch.device": lambda kind, index=None: kind if index is None else f"{kind}:{index}",
    "torch.serialization._get_layout": lambda name: str(name),
}
"""Functions that a pickle may call, and what is called in their place."""

INERT = {
    *(f"builtins.{name}" for name in "bool dict float int list object str tuple".split()),
    *(f"numpy.{name}" for name in "bool_ float16 float32 float64 int32 int64 int8 ndarray uint8".split()),
    *(f"torch.{name}" for name in "Generator Tensor contiguous_format preserve_format strided".split()),
    *(f"torch.per_{name}" for name in "channel_affine tensor_affine tensor_symmetric".split()),
}
"""Names that files refer to without calling them; a call makes an `Opaque` of them all the same."""
