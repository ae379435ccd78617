"""The random streams of a rank as bytes: torch's, CUDA's and megatron-core's."""

from __future__ import annotations

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

_MEGATRON = "megatron:"


def get_random_state() -> dict[str, bytes]:
    """Everything that dropout on this rank draws from."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[_MEGATRON + name] = state
    return {name: state.cpu().numpy().tobytes() for name, state in states.items()}


def set_random_state(states: dict[str, bytes]) -> None:
    """Put back what `get_random_state` returned on the same rank of the same layout."""
    tensors = {name: torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for name, data in states.items()}
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    tracked = {
        name.removeprefix(_MEGATRON): state for name, state in tensors.items() if name.startswith(_MEGATRON)
    }
    get_cuda_rng_tracker().set_states(tracked)
