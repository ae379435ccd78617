"""Loading on the layout that saved and on another one: time and bytes, beside DCP's and megatron-core's own.

Two ranks; each state is held once by all together ("flat": as a distributed optimizer has it, weights on
both) or cut over tensor ranks as Megatron cuts it ("tensor").
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from checkpoint.load import load
from checkpoint.manifest import LogicalTensor
from checkpoint.opening import open_checkpoint
from checkpoint.save import Saver
from launch.ranks import run_ranks
from parallel.slices import TensorSlice, flat_range_boxes
from tools.bench_convert.contest import drop_from_cache, read_into_cache

RANKS = 2
_COLUMNS = re.compile(r".*\.(o_proj|down_proj)\.weight")

Tensors = tuple[LogicalTensor, ...]


@dataclass(frozen=True)
class Took:
    """One load or save.

    Attributes:
        seconds: of the slowest rank.
        read, own: bytes read from files, and held, by all ranks together; 0 where nobody counts.
    """

    what: str
    seconds: float
    read: int = 0
    own: int = 0


def measure(source: Path, folder: Path, rounds: int, *, cold: bool) -> list[Took]:
    """Save a checkpoint's state by three libraries on two ranks; load it on the same and on another layout.

    Args:
        source: says which tensors there are; their values do not matter.
    """
    tensors = open_checkpoint(source).manifest.tensors
    found = [*_save(tensors, folder)]
    for _ in range(rounds):
        for what, load_by in LOADS.items():
            (drop_from_cache if cold else read_into_cache)(folder)
            parts = run_ranks(load_by, RANKS, tensors, str(folder))
            seconds = max(each[0] for each in parts)
            found.append(Took(what, seconds, sum(each[1] for each in parts), sum(each[2] for each in parts)))
    return found


def _save(tensors: Tensors, folder: Path) -> list[Took]:
    found = []
    for what, save_by in SAVES.items():
        shutil.rmtree(folder / what.split(":")[0], ignore_errors=True)
        found.append(Took(f"{what} save", max(run_ranks(save_by, RANKS, tensors, str(folder)))))
    return found


def slices(tensors: Tensors, layout: str, rank: int) -> list[TensorSlice]:
    """What a rank of a layout holds; the numbers are of no account."""
    found = []
    for tensor in tensors:
        boxes, holders = _boxes(tensor, layout, rank)
        for offset, size in boxes:
            data = torch.full((math.prod(size),), 0.5, dtype=getattr(torch, tensor.dtype))
            found.append(TensorSlice(tensor.name, tensor.state, tensor.shape, offset, size, data, holders))
    return found


def _boxes(
    tensor: LogicalTensor, layout: str, rank: int
) -> tuple[list[tuple[tuple[int, ...], tuple[int, ...]]], tuple[int, ...]]:
    whole = [((0,) * len(tensor.shape), tensor.shape)]
    everybody = tuple(range(RANKS))
    if layout == "flat":
        if tensor.state == "weight":
            return whole, everybody
        share = -(-tensor.numel // RANKS)
        end = min((rank + 1) * share, tensor.numel)
        return flat_range_boxes(tensor.shape, rank * share, end), (rank,)
    if len(tensor.shape) < 2:
        return whole, everybody
    axis = 1 if _COLUMNS.fullmatch(tensor.name) else 0
    width = tensor.shape[axis] // RANKS
    size = tuple(width if a == axis else s for a, s in enumerate(tensor.shape))
    return [(tuple(rank * width if a == axis else 0 for a in range(len(size))), size)], (rank,)


def _timed(work: Callable[[], Any]) -> float:
    dist.barrier()
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def _save_ours(layout: str) -> Callable[[Tensors, str], float]:
    def save(tensors: Tensors, folder: str) -> float:
        rank = dist.get_rank()
        saver = Saver(f"{folder}/ratoon-{layout}", rank=rank, world_size=RANKS, background=False)
        held = slices(tensors, layout, rank)
        return _timed(lambda: saver.save(1, held, {}))

    return save


def _load_ours(saved: str, layout: str) -> Callable[[Tensors, str], tuple[float, int, int]]:
    def read(tensors: Tensors, folder: str) -> tuple[float, int, int]:
        held = slices(tensors, layout, dist.get_rank())
        seen: list[Any] = []
        seconds = _timed(lambda: seen.append(load(Path(folder) / f"ratoon-{saved}", held)))
        return seconds, seen[0].bytes_read, sum(each.data.nbytes for each in held)

    return read


def _sharded(tensors: Tensors, axis: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (RANKS,))
    state = {}
    for tensor in tensors:
        cut = axis if len(tensor.shape) > 1 else 0
        shape = [s // RANKS if a == cut else s for a, s in enumerate(tensor.shape)]
        local = torch.full(shape, 0.5, dtype=getattr(torch, tensor.dtype))
        state[f"{tensor.name}.{tensor.state}"] = DTensor.from_local(local, mesh, [Shard(cut)])
    return state


def _save_dcp(tensors: Tensors, folder: str) -> float:
    state = _sharded(tensors, 0)
    return _timed(lambda: dcp_save(state, checkpoint_id=f"{folder}/dcp"))


def _load_dcp(axis: int) -> Callable[[Tensors, str], tuple[float, int, int]]:
    def read(tensors: Tensors, folder: str) -> tuple[float, int, int]:
        state = _sharded(tensors, axis)
        return _timed(lambda: dcp_load(state, checkpoint_id=f"{folder}/dcp")), 0, 0

    return read


def _megatron(tensors: Tensors, axis: int) -> dict[str, Any]:
    state = {}
    for tensor in tensors:
        key = f"{tensor.name}.{tensor.state}"
        cut = axis if len(tensor.shape) > 1 else 0
        shape = [s // RANKS if a == cut else s for a, s in enumerate(tensor.shape)]
        local = torch.full(shape, 0.5, dtype=getattr(torch, tensor.dtype))
        state[key] = ShardedTensor.from_rank_offsets(key, local, (cut, dist.get_rank(), RANKS))
    return state


def _save_megatron(tensors: Tensors, folder: str) -> float:
    _without_cuda()
    path, state = Path(folder) / "megatron-core", _megatron(tensors, 0)
    if dist.get_rank() == 0:
        path.mkdir()
    return _timed(lambda: dist_checkpointing.save(state, str(path)))


def _without_cuda() -> None:
    """megatron-core's saving waits for CUDA and asks for its device, with or without tensors there."""
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


def _load_megatron(axis: int) -> Callable[[Tensors, str], tuple[float, int, int]]:
    def read(tensors: Tensors, folder: str) -> tuple[float, int, int]:
        _without_cuda()
        state = _megatron(tensors, axis)
        return _timed(lambda: dist_checkpointing.load(state, f"{folder}/megatron-core")), 0, 0

    return read


SAVES = {
    "ratoon-flat": _save_ours("flat"),
    "ratoon-tensor": _save_ours("tensor"),
    "dcp": _save_dcp,
    "megatron-core": _save_megatron,
}
LOADS = {
    "ratoon: tensor from tensor": _load_ours("tensor", "tensor"),
    "ratoon: tensor from flat": _load_ours("flat", "tensor"),
    "ratoon: flat from flat": _load_ours("flat", "flat"),
    "ratoon: flat from tensor": _load_ours("tensor", "flat"),
    "dcp: same layout": _load_dcp(0),
    "dcp: other layout": _load_dcp(1),
    "megatron-core: same layout": _load_megatron(0),
    "megatron-core: other layout": _load_megatron(1),
}
