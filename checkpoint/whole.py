"""Single tensors, whole, for whoever wants to look at one."""

from __future__ import annotations

from pathlib import Path

import torch

from checkpoint.boxes import Box
from checkpoint.manifest import LogicalTensor
from checkpoint.plan import plan
from checkpoint.read import read_copies


def read_whole(folder: Path, tensor: LogicalTensor) -> torch.Tensor:
    """The tensor in its own dtype and shape.

    Args:
        folder: that the pieces' files are relative to.

    Raises:
        ValueError: its bytes are damaged or missing.
    """
    flat = torch.empty(tensor.numel, dtype=getattr(torch, tensor.dtype))
    box = Box((0,) * len(tensor.shape), tensor.shape)
    report = read_copies(folder, list(plan(tensor, [(0, box)])), [flat])
    if report.problems:
        raise ValueError(f"{tensor.name} ({tensor.state}): " + "; ".join(report.problems))
    return flat.view(tensor.shape)
