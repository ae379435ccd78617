"""The FLOP/s that MFU divides by: NVIDIA's number for a known GPU, measured for anything else."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass

# Part of torch's device name -> dense TFLOP/s by arithmetic, from NVIDIA's data sheets; the first match
# counts. fp32 is that of the ordinary cores: torch uses TF32 only when asked. GH200 is found under H200.
_TERAFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    ("GB200", {"bf16": 2500.0, "fp8": 5000.0}),
    ("B200", {"bf16": 2250.0, "fp8": 4500.0}),
    ("H200 NVL", {"fp32": 60.0, "bf16": 835.5, "fp8": 1670.5}),
    ("H200", {"fp32": 67.0, "bf16": 989.4, "fp8": 1978.9}),
    ("H100 NVL", {"fp32": 60.0, "bf16": 835.5, "fp8": 1670.5}),
    ("H100 PCIe", {"fp32": 51.2, "bf16": 756.0, "fp8": 1513.0}),
    ("H100", {"fp32": 67.0, "bf16": 989.4, "fp8": 1978.9}),
    ("A100", {"fp32": 19.5, "bf16": 312.0}),
)
_MEASURED_SIZE = 1024
_MEASURED_SECONDS = 0.3


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one rank's device, and where the number comes from."""

    flops_per_second: float
    source: str


def listed_peak(device_name: str, arithmetic: str) -> Peak | None:
    """The data sheet's peak of a GPU, by torch's name of it; None for what is not listed.

    Args:
        arithmetic: "fp32", "bf16" or "fp8".
    """
    for part, peaks in _TERAFLOPS:
        if part in device_name:
            teraflops = peaks.get(arithmetic)
            if teraflops is None:
                return None
            return Peak(teraflops * 1e12, f"data sheet: {part} {arithmetic} dense, {teraflops:g} TFLOP/s")
    return None


@functools.cache
def measured_peak(device: str, arithmetic: str, threads: int) -> Peak:
    """The fastest of the matrix products that this process finishes in a third of a second.

    Args:
        device: "cpu" or "cuda".
        threads: torch.get_num_threads() of this rank; part of the cache's key.
    """
    import torch

    from parallel.host_matmul import matmul

    dtype = torch.float32 if arithmetic == "fp32" else torch.bfloat16
    size = _MEASURED_SIZE * (8 if device == "cuda" else 1)
    own = torch.Generator(device)  # a run's own stream must not depend on whether this was measured
    a = torch.randn(size, size, generator=own, device=device).to(dtype)
    best, until = 0.0, 0.0
    while not best or time.perf_counter() < until:
        start = time.perf_counter()
        matmul(a, a)
        if device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if until:  # the first product only warms up
            best = max(best, 2.0 * size**3 / (now - start))
        until = until or now + _MEASURED_SECONDS
    on = f"{threads} threads" if device == "cpu" else device
    return Peak(best, f"measured: matrix product of {size}, {dtype}, {on}: {best / 1e9:.4g} GFLOP/s")


def peak(arithmetic: str, *, ranks: int) -> Peak:
    """The peak of this process's device: from the data sheet where it is listed, else measured.

    Args:
        ranks: processes on this machine. Where they have more threads than it has cores, each can have only
            its share of them.
    """
    import torch

    if not torch.cuda.is_available():
        threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
        one = measured_peak("cpu", arithmetic, threads)
        if ranks * threads <= cores:
            return one
        share = cores / (ranks * threads)
        return Peak(one.flops_per_second * share, f"{one.source} x {cores} cores / {ranks * threads} threads")
    listed = listed_peak(torch.cuda.get_device_name(), arithmetic)
    return listed or measured_peak("cuda", arithmetic, 0)
