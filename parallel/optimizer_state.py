"""The state of megatron-core's optimizers as boxes of logical tensors, straight from the shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from parallel.mesh import Mesh
from parallel.naming import Block, NamedParameter
from parallel.slices import TensorSlice, flat_range_boxes


def prepare_state(optimizer: Any) -> None:
    """Create the moments before the first step, so that a checkpoint can be loaded into them.

    torch's AdamW makes its state, the step count included, at the first step and takes a state that has only
    the moments for complete; Transformer Engine's and Apex's FusedAdam count steps per group. The fused AdamW
    reads the count where the parameter is: on CUDA, from the kernel.
    """
    for part in _parts(optimizer):
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
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group and group["params"]:  # without parameters here FusedAdam does not count
                return int(group["step"])
            for parameter in group["params"]:
                if "step" in part.optimizer.state[parameter]:
                    return int(part.optimizer.state[parameter]["step"])
    return 0


def set_step(optimizer: Any, step: int) -> None:
    """Set the number of updates made so far, on every parameter."""
    for part in _parts(optimizer):
        torch_adam = isinstance(part.optimizer, torch.optim.AdamW)
        for group in part.optimizer.param_groups:
            if not torch_adam:
                group["step"] = step
            for parameter in group["params"] if torch_adam else ():
                part.optimizer.state[parameter]["step"].fill_(step)


def state_slices(named: list[NamedParameter], optimizer: Any, mesh: Mesh) -> Iterator[TensorSlice]:
    """Weights, masters and moments that this rank holds.

    A weight is held whole by every data rank. Masters and moments are too without the distributed optimizer;
    with it each data and context rank has a flat range of the parameter. An fp32 weight is its own master.
    """
    shards = _shards(optimizer)
    for entry in named:
        holders = mesh.holders(entry.kind, on_first_and_last_stage=entry.tied)
        weight = entry.parameter.data
        yield from _cut(entry.blocks, "weight", weight, 0, weight.numel(), holders)
        if entry.parameter not in shards:
            continue
        main, start, end, states, shared = shards[entry.parameter]
        holders = mesh.holders(entry.kind, on_first_and_last_stage=entry.tied, sharded=not shared)
        if main is not None:
            yield from _cut(entry.blocks, "master", main, start, end, holders)
        for state, value in states.items():
            if torch.is_tensor(value) and value.numel() == end - start:
                yield from _cut(entry.blocks, state, value, start, end, holders)


def _parts(optimizer: Any) -> list[Any]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if part.optimizer is not None]


_Shard = tuple[torch.Tensor | None, int, int, dict[str, Any], bool]


def _shards(optimizer: Any) -> dict[torch.nn.Parameter, _Shard]:
    """Parameter -> (master or None, first and last element, state, whether replicas hold it too)."""
    found: dict[torch.nn.Parameter, _Shard] = {}
    for part in _parts(optimizer):
        state = part.optimizer.state
        if isinstance(part, DistributedOptimizer):
            found.update(_distributed_shards(part, state))
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                found[parameter] = (None, 0, parameter.numel(), state[parameter], True)
        for models, mains in zip(
            getattr(part, "float16_groups", []), getattr(part, "fp32_from_float16_groups", []), strict=True
        ):
            for model, main in zip(models, mains, strict=True):
                found[model] = (main.data, 0, main.numel(), state[main], True)
    return found


def _distributed_shards(part: DistributedOptimizer, state: Any) -> dict[torch.nn.Parameter, _Shard]:
    found: dict[torch.nn.Parameter, _Shard] = {}
    pairs = [
        *zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True),
        *zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True),
    ]
    for models, shards in pairs:
        for model, shard in zip(models, shards, strict=True):
            place = part._get_model_param_range_map(model)["param"]
            master = None if model.dtype == torch.float32 else shard.data
            found[model] = (master, place.start, place.end, state[shard], False)
    return found


def _cut(
    blocks: tuple[Block, ...],
    state: str,
    memory: torch.Tensor,
    start: int,
    end: int,
    holders: tuple[int, ...],
) -> Iterator[TensorSlice]:
    """Boxes of the blocks that lie in elements [start, end) of the parameter; `memory` begins at `start`."""
    flat = memory.view(-1)
    for block in blocks:
        first, last = max(start, block.start), min(end, block.start + block.numel)
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
