"""megatron-core without CUDA: the unmodified library on CPU processes over gloo.

megatron-core asks torch for CUDA devices, streams and events by name. Where torch sees no CUDA, `activate`
gives the modules named below a view of torch in which those names mean the host: torch itself is left alone,
except for three Tensor methods, which change for callers inside megatron-core only. `deactivate` undoes it
all. Where torch does see CUDA, nothing is touched.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from parallel import host_matmul

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Substitution:
    """One megatron-core symbol that gets a stand-in on the host, and why."""

    module: str
    symbol: str
    why: str
    stand_in: Callable[[Any], Any]  # the original -> what replaces it


class HostStream:
    """Work on the host is done when a call returns: there is nothing to order or to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> HostEvent:
        return event or HostEvent()

    def synchronize(self) -> None:
        pass


class HostEvent:
    """An event that has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


_STREAM = HostStream()


def _nothing(*_: Any, **__: Any) -> None:
    pass


class _HostNvtx:
    range_push = staticmethod(_nothing)
    range_pop = staticmethod(_nothing)


class _HostCuda:
    """`torch.cuda` as megatron-core sees it on the host; what is not named here is torch's own."""

    Stream = HostStream
    Event = HostEvent
    nvtx = _HostNvtx
    synchronize = staticmethod(_nothing)
    empty_cache = staticmethod(_nothing)

    @staticmethod
    def current_device() -> torch.device:
        return HOST

    @staticmethod
    def current_stream(device: Any = None) -> HostStream:
        return _STREAM

    @staticmethod
    def default_stream(device: Any = None) -> HostStream:
        return _STREAM

    @staticmethod
    def stream(stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def _on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = HOST
        kwargs.pop("pin_memory", None)  # a torch without CUDA has no pinned memory to give
        return factory(*args, **kwargs)

    return create


class _HostTorch(types.ModuleType):
    """`torch` with the host in the place of the CUDA device; everything else is torch's own."""

    FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange")

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _HostCuda()
        self.matmul = host_matmul.matmul
        for name in self.FACTORIES:
            setattr(self, name, _on_host(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_HOST_TORCH = _HostTorch()


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _splits_as_list(original: Callable[..., Any]) -> Callable[..., Any]:
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.tolist() if as_numpy and torch.is_tensor(tensor) else tensor

    return move


def _view(module: str, why: str) -> Substitution:
    return Substitution(f"megatron.core.{module}", "torch", why, lambda _: _HOST_TORCH)


SUBSTITUTIONS: tuple[Substitution, ...] = (
    _view("parallel_state", "waits for the device after making groups"),
    _view("tensor_parallel.mappings", "allocates what it gathers on the current CUDA device"),
    _view("tensor_parallel.layers", "allocates weights and gathered input on the current CUDA device"),
    _view("tensor_parallel.random", "keeps one CUDA random state per tensor-parallel rank"),
    _view("tensor_parallel.utils", "gathers pipeline messages on the current CUDA device"),
    _view("optimizer.optimizer", 'allocates found_inf and loss scale on device "cuda"'),
    _view("optimizer.clip_grads", 'allocates norms on device "cuda"'),
    _view("optimizer.grad_scaler", 'allocates the loss scale on device "cuda"'),
    _view("optimizer.distrib_optimizer", "allocates shards on the current CUDA device"),
    _view("distributed.distributed_data_parallel", "opens CUDA streams for overlapped reduction"),
    _view("distributed.param_and_grad_buffer", "allocates gradient buffers on the current CUDA device"),
    _view("pipeline_parallel.schedules", 'counts tokens in a tensor on device "cuda"'),
    _view("pipeline_parallel.p2p_communication", "allocates messages on the CUDA device and waits for it"),
    _view("utils", 'measures norms in a tensor on device "cuda" without Apex'),
    _view("transformer.attention", "keeps key and value caches on the current CUDA device"),
    _view("transformer.module", "allocates on the current CUDA device"),
    _view("transformer.moe.experts", "allocates expert weights on the current CUDA device"),
    _view("transformer.moe.router", "moves the router's weight to the current CUDA device"),
    _view("transformer.moe.moe_utils", 'keeps auxiliary losses in tensors on device "cuda"'),
    _view("transformer.moe.token_dispatcher", "copies split sizes to the host on a CUDA stream"),
    _view("models.common.language_module.language_module", "sums tied embeddings on CUDA"),
    _view("models.common.embeddings.rope_utils", "pins the index of a context rank's slices"),
    _view("models.common.embeddings.rotary_pos_embedding", "keeps frequencies on the current CUDA device"),
    Substitution(
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
        "reads the CUDA generators by a path of its own",
        lambda _: _get_rng_state,
    ),
    Substitution(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        "writes the CUDA generators by a path of its own",
        lambda _: _set_rng_state,
    ),
    Substitution(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        "turns split sizes into host integers for CUDA tensors only; all_to_all_single refuses tensors",
        _splits_as_list,
    ),
)

# Bound by an import that is skipped without Transformer Engine, though the code below it asks for it.
_MISSING_WITHOUT_TE = ("megatron.core.transformer.moe.moe_utils", "te_general_gemm")

# megatron-core tells CUDA tensors by their type's name, moves tensors with .cuda(), and multiplies gradients
# with .matmul().
_TENSOR_CALLERS = "megatron.core."

_undo: list[tuple[Any, str, Any]] = []


def needed() -> bool:
    """Whether megatron-core needs the stand-ins here: torch sees no CUDA device."""
    return not torch.cuda.is_available()


def missing_symbols() -> list[str]:
    """What `activate` would replace but the installed megatron-core no longer has."""
    return [
        f"{s.module}.{s.symbol} ({s.why})"
        for s in SUBSTITUTIONS
        if not hasattr(importlib.import_module(s.module), s.symbol)
    ]


def activate() -> bool:
    """Let megatron-core run on the host; does nothing where there is CUDA or when already active.

    Returns:
        Whether the stand-ins are in place.

    Raises:
        RuntimeError: the installed megatron-core lacks a symbol that needs a stand-in.
    """
    if not needed() or _undo:
        return bool(_undo)
    missing = missing_symbols()
    if missing:
        raise RuntimeError(
            "this megatron-core has changed where Ratoon must adapt it to run without CUDA; install "
            "megatron-core~=0.16.1, or use a machine with CUDA. Not found: " + "; ".join(missing)
        )
    for s in SUBSTITUTIONS:
        module = importlib.import_module(s.module)
        _replace(module, s.symbol, s.stand_in(getattr(module, s.symbol)))
    module = importlib.import_module(_MISSING_WITHOUT_TE[0])
    if not hasattr(module, _MISSING_WITHOUT_TE[1]):
        _replace(module, _MISSING_WITHOUT_TE[1], None)
    _replace(torch.Tensor, "type", _type_for_megatron(torch.Tensor.type))
    _replace(torch.Tensor, "cuda", _cuda_for_megatron(torch.Tensor.cuda))
    _replace(torch.Tensor, "matmul", _matmul_for_megatron(torch.Tensor.matmul))
    return True


def deactivate() -> None:
    """Put every replaced symbol back."""
    while _undo:
        owner, name, original = _undo.pop()
        if original is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


@contextlib.contextmanager
def active() -> Iterator[bool]:
    """`activate` for the length of a block."""
    was_active = bool(_undo)
    try:
        yield activate()
    finally:
        if not was_active:
            deactivate()


_ABSENT = object()


def _replace(owner: Any, name: str, value: Any) -> None:
    _undo.append((owner, name, vars(owner).get(name, _ABSENT)))  # what it inherits is not its own
    setattr(owner, name, value)


def _called_by_megatron() -> bool:
    caller: str = sys._getframe(2).f_globals.get("__name__", "")
    return caller.startswith(_TENSOR_CALLERS)


def _type_for_megatron(original: Callable[..., Any]) -> Callable[..., Any]:
    def type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, str) and not self.is_cuda and _called_by_megatron():
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    return type


def _cuda_for_megatron(original: Callable[..., Any]) -> Callable[..., Any]:
    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self if _called_by_megatron() else original(self, *args, **kwargs)

    return cuda


def _matmul_for_megatron(original: Callable[..., Any]) -> Callable[..., Any]:
    def matmul(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return host_matmul.matmul(self, other) if _called_by_megatron() else original(self, other)

    return matmul
