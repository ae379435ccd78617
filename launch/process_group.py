"""Start torch.distributed in one rank: threads, device, backend."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

TIMEOUT = timedelta(minutes=10)
"""How long a collective waits for a rank that does not come."""


def start_process_group(
    rank: int,
    world_size: int,
    *,
    local_rank: int,
    gpu: bool,
    threads: int,
    store: Store | None = None,
) -> None:
    """Initialise the default process group: gloo for CPU tensors, and NCCL for CUDA tensors where `gpu`.

    Args:
        local_rank: the CUDA device of this rank, where `gpu`.
        threads: CPU threads of this rank's kernels.
        store: where the ranks meet; None reads torchrun's MASTER_ADDR and MASTER_PORT.
    """
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    if gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
