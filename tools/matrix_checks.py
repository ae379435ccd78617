"""What a checkpoint of the known model must hold: compared bit for bit, by name and state."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from checkpoint.load import load
from checkpoint.manifest import LogicalTensor
from checkpoint.opening import Opened
from checkpoint.whole import read_whole
from parallel.slices import TensorSlice

STATES = ("weight", "master", "exp_avg", "exp_avg_sq")
_LISTED = 3


def faults(opened: Opened, oracle: Any, settings: dict[str, Any], *, with_master: bool = True) -> list[str]:
    """What is not as it must be, a line for each kind.

    Args:
        oracle: an open safetensors file of "NAME@STATE".
        settings: of the optimizer: lr, betas, eps, weight_decay, step.
        with_master: whether the source had masters; without, a format that wants some gets the weights.
    """
    tensors = opened.manifest.by_key()
    names = {key.partition("@")[0] for key in oracle.keys()}  # not a dict
    held = {state for _, state in tensors}
    found = []
    if missing := sorted(names - {name for name, _ in tensors}):
        found.append(f"{len(missing)} parameters are missing, such as {missing[0]}")
    if strange := sorted(f"{n} ({s})" for n, s in tensors if n not in names or s not in STATES):
        found.append(f"{len(strange)} tensors are of no known value, such as {strange[0]}")
    wrong = [
        f"{name} ({state})"
        for (name, state), tensor in tensors.items()
        if name in names and state in STATES
        if not _same(read_whole(opened.folder, tensor), oracle, name, state, with_master=with_master)
    ]
    if wrong:
        found.append(f"{len(wrong)} tensors differ: {', '.join(wrong[:_LISTED])}")
    for state in sorted(held & set(STATES)):
        count = sum((name, state) in tensors for name in names)
        if count != len(names):
            found.append(f"{state} of {count} of {len(names)} parameters")
    if {"exp_avg", "exp_avg_sq"} <= held:
        found += _settings_faults(opened, names, oracle, settings)
    return found


def silently_lost(before: Opened, after: Opened, lost: Sequence[str]) -> list[str]:
    """States that are gone though the plan did not say so. A master may live on as an fp32 weight.

    Args:
        lost: `WritePlan.lost`.
    """
    states = {tensor.state for tensor in before.manifest.tensors}
    kept = {tensor.state for tensor in after.manifest.tensors}
    parameters = {"weight", "master"}
    gone = states - kept - (parameters if kept & parameters else set())
    said = {word for line in lost for word in re.findall(r"\w+", line)}
    return [f"{state} is gone, silently" for state in sorted(gone - said)]


def direct_load_faults(opened: Opened, oracle: Any) -> list[str]:
    """Load what each of two tensor ranks would hold, and compare."""
    found: list[str] = []
    for rank in range(2):
        slices = [_half(tensor, rank) for tensor in opened.manifest.tensors]
        load(opened, slices, rank=0)
        wrong = [s for s in slices if not _same_part(s, oracle)]
        if wrong:
            name = f"{wrong[0].name} ({wrong[0].state})"
            found.append(f"{len(wrong)} boxes of tensor rank {rank} differ, such as {name}")
    return found


def _half(tensor: LogicalTensor, rank: int) -> TensorSlice:
    """Rows, or columns of what multiplies the last dimension; vectors are whole on both ranks."""
    axis = 1 if tensor.name.endswith(("o_proj.weight", "down_proj.weight")) else 0
    offset, extent = [0] * len(tensor.shape), list(tensor.shape)
    if len(tensor.shape) > 1:
        middle = (tensor.shape[axis] + 1) // 2
        offset[axis] = rank * middle
        extent[axis] = tensor.shape[axis] - middle if rank else middle
    data = torch.empty(extent, dtype=getattr(torch, tensor.dtype)).view(-1)
    return TensorSlice(tensor.name, tensor.state, tensor.shape, tuple(offset), tuple(extent), data, (0,))


def _same_part(piece: TensorSlice, oracle: Any) -> bool:
    box = tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.size, strict=True))
    expected = _expected(oracle, piece.name, piece.state, piece.data.dtype)
    return expected is not None and same_bits(piece.data.view(piece.size), expected[box])


def _same(actual: torch.Tensor, oracle: Any, name: str, state: str, *, with_master: bool) -> bool:
    if state == "master" and not with_master:
        expected: torch.Tensor | None = oracle.get_tensor(f"{name}@weight").float()
    else:
        expected = _expected(oracle, name, state, actual.dtype)
    return expected is not None and same_bits(actual, expected)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit: 0 is not -0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _expected(oracle: Any, name: str, state: str, dtype: torch.dtype) -> torch.Tensor | None:
    """An fp32 weight is the master of a bf16 model."""
    if state not in STATES:
        return None
    stored = "master" if state == "weight" and dtype == torch.float32 else state
    value: torch.Tensor = oracle.get_tensor(f"{name}@{stored}")
    return value if value.dtype == dtype else None


def _settings_faults(opened: Opened, names: set[str], oracle: Any, settings: dict[str, Any]) -> Iterator[str]:
    state = opened.manifest.state
    updates = state.get("scalars", {}).get("updates")
    if updates != settings["step"]:
        yield f"Adam's count is {updates}, not {settings['step']}"
    by_name = {name: group for group in state.get("groups", ()) for name in group["names"]}
    for key in ("lr", "betas", "eps", "weight_decay"):
        wrong = []
        for name in sorted(names):
            matrix = len(oracle.get_slice(f"{name}@weight").get_shape()) > 1
            spared = key == "weight_decay" and not matrix and not settings.get("decays_vectors")
            expected = 0.0 if spared else settings[key]
            value = by_name.get(name, {}).get(key)
            if (list(value) if isinstance(value, tuple) else value) != expected:
                wrong.append(f"{name}: {value}")
        if wrong:
            yield f"{key} of {len(wrong)} parameters is not {settings[key]}, such as {wrong[0]}"
