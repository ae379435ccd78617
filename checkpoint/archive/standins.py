"""Inert objects that take the place of what a pickle asks for by name.

Classes of whatever trainer wrote a file are not imported: an `Opaque` keeps their name, arguments and state.
Every class here forbids to change itself, since a pickle may set attributes on anything it can name.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoint.archive.opcodes import BadPickleError


class Frozen(type):
    """A class whose attributes a pickle cannot set."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise BadPickleError(f"it sets {name!r} on the class {cls.__name__}: nothing that a checkpoint needs")


class Allowed:
    """A function that a pickle may call: one of ours, under the name of another."""

    __slots__ = ("_call", "name")
    name: str

    def __init__(self, name: str, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call: Callable[..., Any] = object.__getattribute__(self, "_call")
        try:
            return call(*args, **kwargs)
        except TypeError as error:
            raise BadPickleError(f"it calls {self.name} in a way that torch.save does not: {error}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise BadPickleError(f"it sets {name!r} on {self.name}: nothing that a checkpoint needs")


class Opaque(metaclass=Frozen):
    """An object of a class that is not imported, or a member of an enum.

    A class or function that a pickle only refers to is the subclass itself, with the same `name`.

    Attributes:
        name: module and qualified name.
        args: what it was made from: positional arguments; an enum member has its value there.
        state: what was restored into it afterwards, mostly its attributes by name; None if nothing was.
        items: what was appended, for subclasses of list.
        mapping: what was set by key, for subclasses of dict.
    """

    __slots__ = ("args", "items", "mapping", "state")
    name = ""
    args: tuple[Any, ...]
    state: Any
    items: list[Any]
    mapping: dict[Any, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        made = super().__new__(cls)
        made.args = args if not kwargs else (*args, kwargs)
        made.state = None
        made.items = []
        made.mapping = {}
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments were taken by `__new__`, which is all that some opcodes call."""

    def __setstate__(self, state: Any) -> None:
        match state:
            case (dict() | None as attributes, dict() as slots):  # how pickle divides attributes
                self.state = {**(attributes or {}), **slots}
            case _:
                self.state = state

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Iterable[Any]) -> None:
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.mapping[key] = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Opaque):
            return NotImplemented
        return (self.name, self.args, self.state) == (other.name, other.args, other.state)

    def __hash__(self) -> int:
        state = tuple(self.state.items()) if isinstance(self.state, dict) else self.state
        try:
            return hash((self.name, self.args, state))
        except TypeError:
            return hash(self.name)

    def __repr__(self) -> str:
        """Its arguments not in depth: a small pickle can refer to one object billions of times."""
        plain = (bool, int, float, str, type(None))
        return f"{self.name}({', '.join(repr(a) if isinstance(a, plain) else '...' for a in self.args)})"


def opaque_class(name: str) -> type[Opaque]:
    """The stand-in for the class or function of that name."""
    made = Frozen(name.rpartition(".")[2], (Opaque,), {"__slots__": (), "name": name})
    assert issubclass(made, Opaque)
    return made


class Ordered(dict[Any, Any], metaclass=Frozen):
    """`collections.OrderedDict`, and other dicts; attributes such as a module's `_metadata` are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Attributes of a dict are no part of a checkpoint."""


class Namespace(dict[str, Any], metaclass=Frozen):
    """`argparse.Namespace`: attributes by name."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise BadPickleError(f"a Namespace has a state of type {type(state).__name__}, not a dict")
        self.update(state)


class StorageType:
    """A class of storages: the dtype of its elements, by torch's name."""

    __slots__ = ("dtype",)
    dtype: str

    def __init__(self, dtype: str) -> None:
        object.__setattr__(self, "dtype", dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        raise BadPickleError(f"it sets {name!r} on a storage type: nothing that a checkpoint needs")


class NumpyDtype(metaclass=Frozen):
    """`numpy.dtype` of numbers or strings, before and after its state says the byte order."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: str, *_: Any) -> None:
        self._code, self._order = code if isinstance(code, str) else "", "="

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", "="):
            raise BadPickleError(f"a numpy dtype has the byte order {reprlib.repr(order)}")
        self._order = order

    def real(self) -> np.dtype[Any]:
        """As numpy's own."""
        code = self._code.lstrip("<>|=")
        if not code or code[0] not in "biufcSU?" or (code[1:] and not code[1:].isdigit()):
            raise BadPickleError(f"a numpy array holds {self._code!r}: only numbers and strings are read")
        return np.dtype(self._order.replace("|", "=") + code)


class SavedArray(np.ndarray[Any, Any], metaclass=Frozen):
    """A numpy array from a pickle."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        made = array_from_bytes(content, dtype, shape)
        # numpy's stubs ask for a bool of its own, its code for a whole number
        super().__setstate__((1, made.shape, made.dtype, int(fortran), made.tobytes()))  # type: ignore[arg-type]


def array_from_bytes(content: Any, dtype: Any, shape: Any) -> npt.NDArray[Any]:
    """An array of raw bytes, checked.

    Raises:
        BadPickleError: the bytes are not as many as the shape says, or the dtype is no plain one.
    """
    if not isinstance(dtype, NumpyDtype):
        raise BadPickleError("a numpy array has no plain dtype")
    if isinstance(content, str):
        content = content.encode("latin1")  # as Python 2 and protocol 2 write bytes
    if not isinstance(content, bytes | bytearray):
        raise BadPickleError("a numpy array holds Python objects: only numbers and strings are read")
    shape = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    made = np.frombuffer(bytes(content), dtype.real())
    count = 1
    for extent in shape:
        count *= extent
    if count != made.size:
        raise BadPickleError(f"a numpy array of shape {list(shape)} has {made.size} elements")
    return made.reshape(shape)
