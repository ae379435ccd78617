"""Single tensors, whole, for whoever wants to look at one."""

from __future__ import annotations

from pathlib import Path

import torch

from checkpoint.fill import plan_filling
from checkpoint.manifest import LogicalTensor
from parallel.slices import TensorSlice


def read_whole(folder: Path, tensor: LogicalTensor) -> torch.Tensor:
    """The tensor in its own shape and dtype; in fp32 where it is the mean of several copies.

    Args:
        folder: that the pieces' files are relative to.

    Raises:
        ValueError: its bytes are damaged or missing.
    """
    dtype = torch.float32 if tensor.average else getattr(torch, tensor.dtype)
    flat = torch.empty(tensor.numel, dtype=dtype)
    zeros = (0,) * len(tensor.shape)
    whole = TensorSlice(tensor.name, tensor.state, tensor.shape, zeros, tensor.shape, flat, (0,))
    filling = plan_filling(folder, {0: tensor}, [whole])
    problems = filling.problems or filling.read(folder, [whole]).problems
    if problems:
        raise ValueError(f"{tensor.name} ({tensor.state}): " + "; ".join(problems))
    return flat.view(tensor.shape)
