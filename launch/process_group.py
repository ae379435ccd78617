"""Start torch.distributed in one rank: threads, device, backend."""

from __future__ import annotations

import resource
from datetime import timedelta
from typing import TYPE_CHECKING

from parallel.timeout import TIMEOUT_MINUTES

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]


def start_process_group(
    rank: int,
    world_size: int,
    *,
    device: int | None,
    threads: int,
    store: Store | None = None,
) -> None:
    """Initialise the default process group: gloo for CPU tensors, and NCCL for CUDA tensors with `device`.

    Args:
        device: the CUDA device of this rank; None computes on the CPU.
        threads: CPU threads of this rank's kernels.
        store: where the ranks meet; None reads torchrun's MASTER_ADDR and MASTER_PORT.
    """
    import torch
    import torch.distributed as dist

    _allow_many_sockets()
    torch.set_num_threads(threads)
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device is None else "cpu:gloo,cuda:nccl",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=TIMEOUT_MINUTES),
    )


def _allow_many_sockets() -> None:
    """Raise the limit of open files as far as it goes: gloo opens a socket to every rank of every group.

    That makes several times the number of ranks, and the usual limit is 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
