"""What torch's pickles call to make tensors of storages, done to places in a file.

The names and arguments: `torch/_utils.py` and `torch/_tensor.py`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

from checkpoint.archive.file_tensor import ELEMENT_SIZES, FileTensor
from checkpoint.archive.opcodes import BadPickleError
from checkpoint.archive.standins import Allowed, Opaque, StorageType


class FileStorage(NamedTuple):
    """A run of bytes that tensors are views of."""

    file: str
    start: int
    num_bytes: int
    dtype: str


def storage_of(saved_id: Any) -> tuple[str, str, int]:
    """dtype, key and number of bytes of a storage, from its persistent id."""
    if not isinstance(saved_id, tuple) or len(saved_id) < 5 or saved_id[0] != "storage":
        raise BadPickleError(f"its pickle refers to {reprlib.repr(saved_id)}, which is no storage")
    _, kind, key, _, numel, *view = saved_id
    if not isinstance(kind, StorageType) or not isinstance(numel, int) or numel < 0:
        raise BadPickleError(f"its pickle refers to a storage of an unknown type, {reprlib.repr(kind)}")
    if view and view[0] is not None:
        raise BadPickleError("its storages are views of others (torch before 0.4): load and save it again")
    return kind.dtype, str(key), numel * ELEMENT_SIZES[kind.dtype]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> FileTensor:
    """`_rebuild_tensor` and `_rebuild_tensor_v2`."""
    return _view(storage, offset, shape, strides, getattr(storage, "dtype", ""))


def _tensor_of_dtype(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    _meta: Any = None,
) -> FileTensor:
    """`_rebuild_tensor_v3`, for dtypes that have no storage class."""
    return _view(storage, offset, shape, strides, dtype)


def _view(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any) -> FileTensor:
    if not isinstance(storage, FileStorage) or not isinstance(dtype, str) or dtype not in ELEMENT_SIZES:
        raise BadPickleError(f"a tensor of dtype {reprlib.repr(dtype)} is made of {type(storage).__name__}")
    size = ELEMENT_SIZES[dtype]
    try:
        made = FileTensor(storage.file, storage.start + offset * size, dtype, tuple(shape), tuple(strides))
        numbers = (offset, *made.shape, *made.strides)
        wrong = any(type(n) is not int or n < 0 for n in numbers) or len(made.shape) != len(made.strides)
        last = 0 if wrong else offset + made.span
    except TypeError:
        raise BadPickleError("a tensor has a shape that is not made of whole numbers") from None
    if wrong or last * size > storage.num_bytes:
        raise BadPickleError(
            f"a tensor of shape {reprlib.repr(list(made.shape))} does not fit into its storage of "
            f"{storage.num_bytes} bytes"
        )
    return made


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor subclass: the tensor itself if it has memory, else its description (DTensor)."""
    if not isinstance(function, Allowed) or not isinstance(args, tuple):
        raise BadPickleError("a tensor subclass is not made by a function of torch")
    made = function(*args)
    if isinstance(made, Opaque):
        made.__setstate__(state)
    return made


def _wrapper(kind: Any, *args: Any) -> Opaque:
    """A tensor without memory of its own, such as a DTensor: its parts are in the state that follows."""
    if not isinstance(kind, type) or not issubclass(kind, Opaque):
        raise BadPickleError("a tensor subclass is of no class")
    return kind(*args)


def _meta(*_: Any) -> Opaque:
    raise BadPickleError("a tensor is on the meta device: it was saved without its elements")


def _refuse(what: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise BadPickleError(f"it holds a {what} tensor, which is not read: save it as a plain one")

    return refuse


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _parameter,
    "torch._utils._rebuild_wrapper_subclass": _wrapper,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_sparse_tensor": _refuse("sparse"),
    "torch._utils._rebuild_sparse_csr_tensor": _refuse("sparse"),
    "torch._utils._rebuild_nested_tensor": _refuse("nested"),
    "torch._utils._rebuild_qtensor": _refuse("quantised"),
}
"""By the name in a pickle."""
