"""What delayed FP8 scaling remembers: scales and past maxima of every Transformer Engine module, as bytes.

The other recipes keep nothing from step to step. The state belongs to the modules of one rank; in another
layout it starts anew, as at the start of a run, and is exact again after the first micro-batch.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

_PREFIX = "fp8:"
_TENSORS = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")  # Transformer Engine's names


def get_fp8_state(chunks: Sequence[torch.nn.Module], config: TransformerConfig) -> dict[str, bytes]:
    """Scales and maxima of all modules that have made an FP8 product; nothing unless scaling is delayed."""
    states = {}
    for name, module in _modules(chunks, config):
        state = _unpacked(module)
        for key in _TENSORS:
            if key in state:
                states[f"{_PREFIX}{name}.{key}"] = state[key].cpu().numpy().tobytes()
    return states


def set_fp8_state(
    chunks: Sequence[torch.nn.Module], config: TransformerConfig, states: Mapping[str, bytes]
) -> None:
    """Put back what `get_fp8_state` returned, before the first step; other names are left alone.

    Transformer Engine takes its state pickled. It is pickled here, from bytes: a checkpoint, which may come
    from anywhere, holds numbers only.
    """
    for name, module in _modules(chunks, config):
        tensors = {key: states.get(f"{_PREFIX}{name}.{key}") for key in _TENSORS}
        found = {key: np.frombuffer(data, np.float32) for key, data in tensors.items() if data is not None}
        if len(found) < len(_TENSORS):
            continue
        state: dict[str, Any] = {key: torch.from_numpy(value.copy()) for key, value in found.items()}
        for key in ("amax_history_fwd", "amax_history_bwd"):
            state[key] = state[key].view(config.fp8_amax_history_len, -1)
        products = len(state["scale_fwd"]) // 3  # each has scales of its input, its weight and its output
        state |= {"recipe": _recipe(config), "extra_fp8_variables": {"num_gemms": products}}
        module.set_extra_state(torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8))


def _modules(
    chunks: Sequence[torch.nn.Module], config: TransformerConfig
) -> Iterator[tuple[str, torch.nn.Module]]:
    if not config.fp8 or config.fp8_recipe != "delayed":
        return
    for index, chunk in enumerate(chunks):
        for name, module in chunk.named_modules():
            if hasattr(module, "fp8_meta"):
                yield f"{index}.{name}", module


def _unpacked(module: torch.nn.Module) -> dict[str, Any]:
    packed = module.get_extra_state()
    return pickle.loads(packed.numpy().tobytes()) if packed.numel() else {}


def _recipe(config: TransformerConfig) -> Any:
    from megatron.core.fp8_utils import get_fp8_recipe

    return get_fp8_recipe(config)
