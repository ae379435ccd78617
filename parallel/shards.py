"""What this rank updates: the optimizer's own fp32 copy of every parameter, cut into logical tensors.

With the distributed optimizer each data and context rank updates a flat range of a parameter, without it all
of them update all of it. An fp32 weight is its own main copy; a weight in lower precision has a master.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer

from parallel.mesh import Mesh
from parallel.naming import Block, NamedParameter


@dataclass(frozen=True)
class MainShard:
    """A range of one local parameter that this rank updates.

    Attributes:
        main: the optimizer's parameter: fp32, `end - start` elements. Adam reads its `grad` and writes it.
        start: first element of the range in the flattened local parameter.
        end: one past the last.
        state: what the optimizer keeps of `main`; further states are put here.
        is_master: whether the model's weight is a copy of `main` in lower precision.
        shared: whether every data and context rank has the same range.
    """

    main: torch.Tensor
    start: int
    end: int
    state: dict[str, Any]
    is_master: bool
    shared: bool

    def run(self, block: Block) -> slice:
        """Elements of `main` that belong to the block; empty where the block lies outside of the range."""
        first = max(self.start, block.start)
        last = max(first, min(self.end, block.start + block.numel))
        return slice(first - self.start, last - self.start)


@dataclass(frozen=True)
class MainPiece:
    """A run of one logical tensor inside a shard: the unit on which updates are changed.

    Attributes:
        name: of the logical tensor.
        value: 1-D fp32 view of the main copy; written in place.
        copies: how many ranks hold this very piece; a sum over the mesh divides by it.
    """

    name: str
    value: torch.Tensor
    copies: int
    shard: MainShard
    place: slice

    @property
    def gradient(self) -> torch.Tensor:
        """1-D fp32 gradient, summed over the mesh: there from `Engine.ready_gradients` to `zero_grad`."""
        gradient = self.shard.main.grad
        assert gradient is not None, f"{self.name}: the gradients are not ready"
        return gradient.view(-1)[self.place]

    def state(self, key: str) -> torch.Tensor:
        """1-D view of a state that was added as `key`, or of a moment."""
        kept: torch.Tensor = self.shard.state[key]
        return kept.view(-1)[self.place]

    def add_state(self, key: str) -> None:
        """Keep an fp32 state for the whole shard, zero at first, unless there is one."""
        if key not in self.shard.state:
            self.shard.state[key] = torch.zeros_like(self.shard.main, dtype=torch.float32)


def parts(optimizer: Any) -> list[Any]:
    """megatron-core's optimizers that have parameters on this rank; dense ones and experts are apart."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if part.optimizer is not None]


def main_shards(optimizer: Any) -> dict[torch.nn.Parameter, MainShard]:
    """The shard of every parameter of the model that this rank updates."""
    found: dict[torch.nn.Parameter, MainShard] = {}
    for part in parts(optimizer):
        state = part.optimizer.state
        if isinstance(part, DistributedOptimizer):
            found.update(_distributed(part, state))
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                found[parameter] = _whole(parameter, state, is_master=False)
        for models, mains in zip(
            getattr(part, "float16_groups", []), getattr(part, "fp32_from_float16_groups", []), strict=True
        ):
            for model, main in zip(models, mains, strict=True):
                found[model] = _whole(main, state, is_master=True)
    return found


def main_pieces(named: Iterable[NamedParameter], optimizer: Any, mesh: Mesh) -> Iterator[MainPiece]:
    """Every logical tensor's run in every shard of this rank, in the order of the parameters.

    Padding of the vocabulary belongs to no logical tensor and is left out.
    """
    shards = main_shards(optimizer)
    for entry in named:
        shard = shards.get(entry.parameter)
        if shard is None:
            continue
        holders = mesh.holders(entry.kind, on_first_and_last_stage=entry.tied, sharded=not shard.shared)
        flat = shard.main.detach().view(-1)
        for block in entry.blocks:
            place = shard.run(block)
            if place.stop > place.start:
                yield MainPiece(block.name, flat[place], len(holders), shard, place)


def step_main(optimizer: Any) -> None:
    """Update the main copies alone: the first half of megatron-core's `step_with_ready_grads`."""
    for part in parts(optimizer):
        part.optimizer.step()


def copy_main_to_model(optimizer: Any) -> None:
    """Write this rank's main copies into the model's weights: the second half, without the gathering."""
    for part in parts(optimizer):
        if not isinstance(part, FP32Optimizer):  # there the weights are the main copies
            part._copy_main_params_to_model_params()


def _whole(main: torch.Tensor, state: Any, *, is_master: bool) -> MainShard:
    return MainShard(main, 0, main.numel(), state[main], is_master, shared=True)


def _distributed(part: DistributedOptimizer, state: Any) -> dict[torch.nn.Parameter, MainShard]:
    found: dict[torch.nn.Parameter, MainShard] = {}
    pairs = [
        *zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True),
        *zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True),
    ]
    for models, shards in pairs:
        for model, shard in zip(models, shards, strict=True):
            place = part._get_model_param_range_map(model)["param"]
            is_master = model.dtype != torch.float32
            found[model] = MainShard(shard, place.start, place.end, state[shard], is_master, shared=False)
    return found
