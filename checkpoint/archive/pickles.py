"""Unpickling without executing anything.

A pickle may name any function of the interpreter and call it. Here a name gives one of our own inert objects
(`checkpoint.archive.standins`) if it is on a list (`checkpoint.archive.allowed`), and otherwise the whole
file is refused; nothing is ever imported. What comes out:

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

from checkpoint.archive.allowed import CLASSES, FUNCTIONS, INERT, PREFIXES, torch_type
from checkpoint.archive.opcodes import BadPickleError, Readable, pickle_end
from checkpoint.archive.standins import Allowed, opaque_class

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
        if full in CLASSES:
            return CLASSES[full]
        if full in FUNCTIONS:
            return Allowed(full, FUNCTIONS[full])
        if (found := torch_type(full)) is not None:
            return found
        if not (full.startswith(PREFIXES) or full in INERT):
            self.refused.add(full)  # goes on with an inert class, so that all of them are found
        return opaque_class(full)


def _present_name(module: str, name: str) -> str:
    """Without the renamings of Python 3, which pickles up to protocol 2 undo, and of numpy 2."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}".replace("numpy._core.", "numpy.core.", 1)
