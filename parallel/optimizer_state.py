"""The state of megatron-core's optimizers as boxes of logical tensors, straight from the shards."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from parallel.mesh import Mesh
from parallel.naming import Block, NamedParameter
from parallel.shards import MainShard, main_shards, parts
from parallel.slices import TensorSlice, flat_range_boxes


def prepare_state(optimizer: Any) -> None:
    """Create the moments before the first step, so that a checkpoint can be loaded into them.

    torch's AdamW makes its state, the step count included, at the first step and takes a state that has only
    the moments for complete; Transformer Engine's and Apex's FusedAdam count steps per group. The fused AdamW
    reads the count where the parameter is: on CUDA, from the kernel.
    """
    for part in parts(optimizer):
        inner = part.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                if state:
                    continue
                if isinstance(inner, torch.optim.AdamW):
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)


def get_step(optimizer: Any) -> int:
    """Updates made so far, which Adam's bias correction needs."""
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group and group["params"]:  # without parameters here FusedAdam does not count
                return int(group["step"])
            for parameter in group["params"]:
                if "step" in part.optimizer.state[parameter]:
                    return int(part.optimizer.state[parameter]["step"])
    return 0


def set_step(optimizer: Any, step: int) -> None:
    """Set the number of updates made so far, on every parameter."""
    for part in parts(optimizer):
        torch_adam = isinstance(part.optimizer, torch.optim.AdamW)
        for group in part.optimizer.param_groups:
            if not torch_adam:
                group["step"] = step
            for parameter in group["params"] if torch_adam else ():
                part.optimizer.state[parameter]["step"].fill_(step)


def state_slices(
    named: list[NamedParameter],
    optimizer: Any,
    mesh: Mesh,
    *,
    added: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> Iterator[TensorSlice]:
    """Weights, masters, moments and further states that this rank holds.

    A weight is held whole by every data rank. Masters and moments are too without the distributed optimizer;
    with it each data and context rank has a flat range of the parameter. An fp32 weight is its own master.

    Args:
        added: states that only these logical tensors have, though others may share their memory, and that a
            checkpoint may lack.
    """
    shards = main_shards(optimizer)
    for entry in named:
        holders = mesh.holders(entry.kind, on_first_and_last_stage=entry.tied)
        weight = entry.parameter.data
        yield from _cut(entry.blocks, "weight", weight, 0, holders)
        if entry.parameter not in shards:
            continue
        shard = shards[entry.parameter]
        holders = mesh.holders(entry.kind, on_first_and_last_stage=entry.tied, sharded=not shard.shared)
        if shard.is_master:
            yield from _cut(entry.blocks, "master", shard.main.data, shard.start, holders)
        for state, value in _per_element(shard).items():
            if state not in added:
                yield from _cut(entry.blocks, state, value, shard.start, holders)
                continue
            blocks = [block for block in entry.blocks if block.name in added[state]]
            for piece in _cut(blocks, state, value, shard.start, holders):
                yield replace(piece, optional=True)


def _per_element(shard: MainShard) -> dict[str, torch.Tensor]:
    """States with a number for each element; others, such as Adam's count, belong to the whole shard."""
    return {
        key: value
        for key, value in shard.state.items()
        if torch.is_tensor(value) and value.shape == shard.main.shape
    }


def _cut(
    blocks: Iterable[Block], state: str, memory: torch.Tensor, start: int, holders: tuple[int, ...]
) -> Iterator[TensorSlice]:
    """Boxes of the blocks that lie in `memory`, which begins at element `start` of the parameter."""
    flat = memory.view(-1)
    for block in blocks:
        first, last = max(start, block.start), min(start + flat.numel(), block.start + block.numel)
        position = first - start
        for offset, size in flat_range_boxes(block.size, first - block.start, last - block.start):
            at = tuple(b + o for b, o in zip(block.offset, offset, strict=True))
            numel = 1
            for extent in size:
                numel *= extent
            yield TensorSlice(
                block.name, state, block.shape, at, size, flat[position : position + numel], holders
            )
            position += numel
