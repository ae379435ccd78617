"""What a `torch_dist` checkpoint holds besides tensors: groups, counters, schedules, objects of ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoint.archive.file_tensor import FileTensor
from checkpoint.plan import row_major
from checkpoint.readers.dcp_chunks import read_items
from checkpoint.readers.dcp_metadata import DcpMetadata
from checkpoint.readers.deepspeed_state import Numbers, plain_items
from checkpoint.readers.megatron_model import Parameter
from checkpoint.readers.megatron_optimizer import by_rule, take_groups
from checkpoint.readers.torch_dist_files import COMMON_OBJECT
from checkpoint.readers.torch_dist_model import Model
from checkpoint.source import Source

_OBJECT = re.compile(
    r"(?:chained_(?P<chained>\d+)\.)?optimizer\.distributed\.dp_group_idx_(?P<group>\d+)\."
    r"(?P<what>\w+)/shard_[\d.]+_[\d.]+"
)
_OBJECTS = ("optimizer", "grad_scaler")
_BOUNDS = ("per_bucket_numel", "per_bucket_numel_unpadded")
_READ = {"args", "checkpoint_version", "iteration", "optimizer", "rerun_state_machine", "content_metadata"}


@dataclass
class Optimizer:
    """One optimizer, alike on all its ranks.

    Attributes:
        states: torch's state dict of it ("param_groups"), of every group of data ranks.
        scaler: of the loss, with fp16.
    """

    states: list[Mapping[str, Any]] = field(default_factory=list)
    scaler: Mapping[str, Any] | None = None

    @property
    def of_experts(self) -> bool:
        """Whether it has experts alone, on ranks of their own."""
        groups = [group for state in self.states for group in state.get("param_groups", ())]
        return bool(groups) and all(group.get("is_expert_parallel") for group in groups)


def read_objects(metadata: DcpMetadata, source: Source) -> dict[str, Any]:
    """The common state and objects of ranks' optimizers, by stored name.

    A line in `left_out` for the other ones.
    """
    wanted = {name for name in metadata.items if _what(name) in _OBJECTS or name == COMMON_OBJECT}
    values, problems = read_items(metadata, wanted)
    source.problems += problems
    rest = [name for name in metadata.items if name not in wanted and _what(name) not in _BOUNDS]
    source.left_out += list(dict.fromkeys(map(_left_out, rest)))
    return values


def _what(stored: str) -> str:
    """What of an optimizer an object is; "" for anything else."""
    match = _OBJECT.fullmatch(stored)
    return match["what"] if match else ""


def _left_out(stored: str) -> str:
    if "_extra_state" in stored:
        return "_extra_state of modules: what Transformer Engine keeps for FP8, not carried"
    if stored.startswith("rng_state"):
        return "rng_state: the random generators of each rank, bound to the layout that saved them"
    if _what(stored) == "param_state":
        return (
            "masters and moments: dp_zero_gather_scatter, which megatron-core has given up, is not read; let "
            "it load and save with --dist-ckpt-optim-fully-reshardable"
        )
    return f"{stored.partition('/')[0]}: an object of a rank, not carried"


def read_optimizers(common: Mapping[str, Any], objects: Mapping[str, Any]) -> dict[int, Optimizer]:
    """The optimizers by number, where the common state or objects of ranks have their groups."""
    found: dict[int, Optimizer] = {}
    for name, value in objects.items():
        match = _OBJECT.fullmatch(name)
        held = value[0] if isinstance(value, list) and len(value) == 1 else value
        if match and isinstance(held, Mapping):
            _take(found.setdefault(int(match["chained"] or 0), Optimizer()), {match["what"]: held})
    saved = common.get("optimizer") or {}
    saved = dict(enumerate(saved)) if isinstance(saved, list) else saved
    chained = saved if all(isinstance(key, int) for key in saved) else {0: saved}
    for number, state in chained.items():
        _take(found.setdefault(number, Optimizer()), state)
    return dict(sorted(found.items()))


def _take(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """What one place says of an optimizer: torch's state dict of it, inside another one or not."""
    inner = state.get("optimizer", state)
    if "param_groups" in inner:
        optimizer.states.append(inner)
    optimizer.scaler = optimizer.scaler or state.get("grad_scaler")


def read_rest(
    source: Source, common: Mapping[str, Any], optimizers: Mapping[int, Optimizer], model: Model
) -> None:
    """Groups, numbers of steps, and what else is common to all ranks."""
    args = common.get("args") or {}
    numbers = Numbers(source.problems, source.left_out)
    there = {tensor.name for tensor in source.tensors if tensor.state != "weight"}
    parameters = [p for p in _parameters(model) if p.name in there]
    apart = any(optimizer.of_experts for optimizer in optimizers.values())
    for optimizer in optimizers.values():
        members = [p for p in parameters if not apart or p.of_expert == optimizer.of_experts]
        if members and optimizer.states:
            _read_groups(optimizer, members, args, numbers)
    source.scalars, source.groups = numbers.values, numbers.groups()
    rest = {key: value for key, value in common.items() if key not in _READ}
    scalers = [optimizer.scaler for optimizer in optimizers.values() if optimizer.scaler]
    rest |= {"grad_scaler": scalers[0]} if scalers else {}
    source.state = plain_items(rest, "Megatron's", source.left_out)
    if args:
        source.state["args"] = plain_items(args, "argument", source.left_out)
    if common.get("rerun_state_machine"):
        source.left_out.append("rerun_state_machine: the checks of repeated steps of each rank")
    source.left_out[:] = dict.fromkeys(source.left_out)


def _read_groups(
    optimizer: Optimizer, members: list[Parameter], args: Mapping[str, Any], numbers: Numbers
) -> None:
    told = False
    for state in optimizer.states:
        groups = state["param_groups"]
        chosen = by_rule(groups, members, args)
        if chosen is not None:
            take_groups(groups, chosen, numbers)
            told = True
        step = (state.get("state") or {}).get("common_step")
        if step is not None:
            value = step.item() if isinstance(step, FileTensor) else step
            numbers.put("step", [p.name for p in members], value, "of the optimizer")
    if not told:
        numbers.left_out.append("settings of parameter groups: nothing tells which parameters they have")


def _parameters(model: Model) -> list[Parameter]:
    """The parameters as megatron-core's rule of groups asks for them: in the shape of one layer."""
    found = []
    for name, whole in model.weights.items():
        shape = whole.shape[model.lead(name) :]
        place = FileTensor(
            whole.pieces[0].file if whole.pieces else "", 0, whole.dtype, shape, row_major(shape)
        )
        found.append(Parameter(name, place, 0))
    return found
