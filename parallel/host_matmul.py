"""Matrix products on the host by oneDNN, whose fp32 kernels use all that any x86 or Arm CPU has.

torch sends fp32 products on a CPU to the BLAS that it was built with. The released x86 builds have Intel's
MKL, which does not use the wide vectors of other makers' CPUs; oneDNN, which the same builds carry for bf16
and convolutions, does. Both are plain fp32.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def available() -> bool:
    """Whether this torch has oneDNN's dense linear operator for the CPU and it gives torch's own result."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    a, b = torch.eye(3), torch.arange(6.0).view(3, 2)
    try:
        return torch.equal(_one_dnn(a, b), b)
    except RuntimeError:  # built without the operator's kernel
        return False


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`torch.matmul(a, b)`; by oneDNN for an fp32 matrix `b` on the CPU, where no gradient is recorded.

    Args:
        a: [..., k].
        b: [k, n].
    """
    recorded = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    fits = a.dtype == b.dtype == torch.float32 and b.dim() == 2 and a.dim() >= 2 and a.numel() > 0
    if recorded or not fits or a.is_cuda or not available():
        return torch.matmul(a, b)
    return _one_dnn(a, b)


def _one_dnn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    flat = torch.ops.mkldnn._linear_pointwise(a.reshape(-1, a.shape[-1]), b.t(), None, "none", [], "")
    # As torch.matmul does it: no view for autograd, so that the result may be changed in place.
    result: torch.Tensor = torch.ops.aten._unsafe_view(flat, (*a.shape[:-1], b.shape[1]))
    return result
