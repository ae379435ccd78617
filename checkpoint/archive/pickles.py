"""Unpickling without executing anything.

A pickle may name any function of the interpreter and call it. Here a name gives one of our own inert objects
(`checkpoint.archive.standins`) if it is on the list below, and otherwise the whole file is refused; nothing
is ever imported. What comes out:

    torch.bfloat16, torch.Size([2])         "bfloat16", (2,)
    OrderedDict, defaultdict, Counter       `Ordered`, a dict
    argparse.Namespace                      `Namespace`, a dict
    numpy arrays and scalars                themselves
    paths, devices, signals                 str, str, int
    classes of trainers (PREFIXES)          `Opaque`; an enum member's value is in `.args`
"""

from __future__ import annotations

import io
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any

import numpy as np

from checkpoint.archive.opcodes import BadPickleError, Readable, pickle_end
from checkpoint.archive.standins import (
    Allowed,
    Namespace,
    NumpyDtype,
    Opaque,
    Ordered,
    SavedArray,
    StorageType,
    array_from_bytes,
    opaque_class,
)

__all__ = ["BadPickleError", "Namespace", "Opaque", "Ordered", "StorageType", "load_pickle"]

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
STORAGES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"},
    **{"ComplexDouble": "complex128", "ComplexFloat": "complex64", "Untyped": "uint8"},
    **{
        "QInt8": "qint8",
        "QUInt8": "quint8",
        "QInt32": "qint32",
        "QUInt4x2": "quint4x2",
        "QUInt2x4": "quint2x4",
    },
}
_DAMAGE = (
    *(pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, KeyError, TypeError),
    *(ValueError, OverflowError, MemoryError, RecursionError, AssertionError),
)


def load_pickle(
    data: Readable,
    where: str,
    persistent: Callable[[Any], Any] | None = None,
    *,
    functions: dict[str, Callable[..., Any]] | None = None,
) -> Any:
    """The object that a pickle describes, with stand-ins for what is not plain data.

    Args:
        where: what errors call it, mostly the path of the file.
        persistent: makes an object of a persistent id; without it they are refused.
        functions: more names that may be called, with what is called in their place.

    Raises:
        ValueError: it is damaged, or asks for names that are not on the list; all of them are given.
    """
    unpickler = None
    try:
        pickle_end(data)
        unpickler = _Unpickler(data, persistent, functions or {})
        value = unpickler.load()
    except _DAMAGE as error:
        if unpickler is None or not unpickler.refused:
            raise ValueError(f"{where}: {_cause(error)}") from None
    if unpickler.refused:
        raise ValueError(
            f"{where}: its pickle asks for {', '.join(sorted(unpickler.refused))}, which no checkpoint "
            "needs; nothing of it was executed. If you trust the file, load it where it was written and save "
            "the tensors again without these objects"
        )
    return value


def _cause(error: BaseException) -> str:
    if isinstance(error, BadPickleError):
        return str(error)
    return f"its pickle is damaged ({type(error).__name__}: {error})"


class _Unpickler(pickle.Unpickler):
    """The interpreter's unpickler with our table of names in place of imports."""

    def __init__(
        self,
        data: Readable,
        persistent: Callable[[Any], Any] | None,
        functions: dict[str, Callable[..., Any]],
    ) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")  # Python 2's strings: any byte is a character
        self.refused: set[str] = set()
        self._persistent = persistent
        self._functions = functions
        self._found: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = _present_name(module, name)
        if full not in self._found:
            self._found[full] = self._stand_in(full)
        return self._found[full]

    def persistent_load(self, saved_id: Any) -> Any:
        if self._persistent is None:
            raise BadPickleError("it refers to storages outside of itself: it is a part of a torch.save file")
        return self._persistent(saved_id)

    def _stand_in(self, full: str) -> Any:
        if full in self._functions:
            return Allowed(full, self._functions[full])
        if full in _CLASSES:
            return _CLASSES[full]
        if full in _FUNCTIONS:
            return Allowed(full, _FUNCTIONS[full])
        torch_type = _torch_type(full)
        if torch_type is not None:
            return torch_type
        if not (full.startswith(PREFIXES) or full in _INERT):
            self.refused.add(full)  # goes on with an inert class, so that all of them are found
        return opaque_class(full)


def _present_name(module: str, name: str) -> str:
    """Without the renamings of Python 3, which pickles up to protocol 2 undo, and of numpy 2."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}".replace("numpy._core.", "numpy.core.", 1)


def _torch_type(full: str) -> Any:
    """A dtype (a str), or the class of a storage."""
    module, _, name = full.rpartition(".")
    if module == "torch" and name in DTYPES:
        return name
    kind = name.removesuffix("Storage")
    if module in ("torch", "torch.cuda", "torch.storage") and kind != name and kind in STORAGES:
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
        raise BadPickleError(f"_codecs.encode with {encoding!r}: only latin1, as bytes are written, is read")
    return text.encode("latin1")


def _bytearray(content: Any = b"", encoding: Any = "latin1") -> bytearray:
    if isinstance(content, str):
        content = _encode(content, encoding)
    if not isinstance(content, bytes | bytearray | list):
        raise BadPickleError(f"bytearray({content!r:.50}): something else than bytes")
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


_CLASSES: dict[str, Any] = {
    "collections.OrderedDict": Ordered,
    "collections.Counter": Ordered,
    "argparse.Namespace": Namespace,
    "types.SimpleNamespace": Namespace,
}
"""Classes that a pickle may make objects of; frozen ones, since what it can name it can try to change."""

_FUNCTIONS: dict[str, Callable[..., Any]] = {
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

_INERT = {
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "object")),
    *(f"torch.{name}" for name in ("Tensor", "strided", "contiguous_format", "preserve_format")),
    *(f"torch.per_{kind}" for kind in ("tensor_affine", "tensor_symmetric", "channel_affine")),
    *("numpy.ndarray", "torch.nn.parameter.Parameter", "torch.Generator"),
    *(
        f"numpy.{name}"
        for name in ("float64", "float32", "float16", "int64", "int32", "int8", "uint8", "bool_")
    ),
}
"""Names that files refer to without calling them; a call makes an `Opaque` of them all the same."""
