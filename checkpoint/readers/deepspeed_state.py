"""What a DeepSpeed checkpoint holds besides tensors: groups, counters, client state."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoint.archive.file_tensor import FileTensor
from checkpoint.archive.standins import Opaque
from checkpoint.source import ParameterGroup

COUNTERS = (
    "global_steps",
    "global_samples",
    "skipped_steps",
    "lr_scheduler",
    "dp_world_size",
    "mp_world_size",
    "ds_config",
    "ds_version",
)
_DEEPSPEED = {
    *COUNTERS,
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params"),
    *("frozen_param_fragments", "data_sampler", "random_ltd", "checkpoint_parallel_dimensions"),
    *("universal_checkpoint_info", "ds_autoep_layers", "autoep_layers", "num_experts", "folding"),
}
_SCALER = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
_LARGEST = 64  # elements of a tensor that is kept as numbers


class NotPlainError(ValueError):
    """A value that JSON cannot hold."""


def plain(value: Any) -> Any:
    """The value as JSON knows it: small tensors as numbers, objects as their attributes.

    Raises:
        NotPlainError: a large tensor, or an object without attributes.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, FileTensor):
        if value.numel > _LARGEST:
            raise NotPlainError(f"a tensor of {value.numel} elements")
        return value.item() if not value.shape else value.read().tolist()
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(inner) for inner in value]
    if isinstance(value, Opaque):
        if isinstance(value.state, dict):
            return plain(value.state)
        if len(value.args) == 1:  # a member of an enum
            return plain(value.args[0])
        raise NotPlainError(f"an object of {value.name}")
    if hasattr(value, "tolist"):  # of numpy
        return plain(value.tolist())
    raise NotPlainError(f"a {type(value).__name__}")


def plain_items(values: Mapping[Any, Any], what: str, left_out: list[str]) -> dict[str, Any]:
    """The entries that are plain; a line in `left_out` for each other one."""
    found = {}
    for key, value in values.items():
        try:
            found[str(key)] = plain(value)
        except ValueError as error:
            left_out.append(f"{what} {key!r}: {error}")
    return found


def trainer_state(
    model: Mapping[str, Any], optimizer: Mapping[str, Any], left_out: list[str]
) -> dict[str, Any]:
    """Counters, scheduler, loss scale and the user's own client state, under DeepSpeed's words.

    Args:
        model: a file of model states.
        optimizer: the optimizer's state dict beside it; empty where there is none.
    """
    held = {key: model[key] for key in COUNTERS if model.get(key) is not None}
    held |= {key: optimizer[key] for key in _SCALER if optimizer.get(key) is not None}
    state = plain_items(held, "DeepSpeed's", left_out)
    for key in ("data_sampler", "random_ltd"):
        if model.get(key) is not None:
            state |= plain_items({key: model[key]}, "DeepSpeed's", left_out)
    client = {key: value for key, value in model.items() if key not in _DEEPSPEED}
    if client:
        state["client_state"] = plain_items(client, "client state", left_out)
    return state


@dataclass
class Numbers:
    """Numbers that an optimizer keeps of each parameter, and its groups; alike on all ranks."""

    problems: list[str]
    left_out: list[str]
    values: dict[str, dict[str, float | int]] = field(default_factory=dict)
    _groups: dict[tuple[str, int], tuple[dict[str, None], dict[str, Any]]] = field(default_factory=dict)

    def put(self, state: str, names: Iterable[str], number: float | int, where: str) -> None:
        """The number of some parameters."""
        if isinstance(number, float) and state == "step" and number.is_integer():
            number = int(number)  # torch's own optimizers count in floats
        values = self.values.setdefault(state, {})
        for name in names:
            if values.setdefault(name, number) != number:
                self.problems.append(
                    f"{name}: {state} is {values[name]} on one rank and {number} on another ({where})"
                )

    def put_groups(self, groups: Iterable[tuple[Iterable[str], Mapping[str, Any]]]) -> None:
        """The groups of one model-parallel rank; pipeline ranks each have some parameters of a group."""
        seen: dict[str, int] = {}
        for names, group in groups:
            settings = plain_items(
                {key: value for key, value in group.items() if key != "params"},
                "group setting",
                self.left_out,
            )
            digest = json.dumps(settings, sort_keys=True)
            number = seen[digest] = seen.get(digest, -1) + 1
            members, _ = self._groups.setdefault((digest, number), ({}, settings))
            members.update(dict.fromkeys(names))

    def groups(self) -> list[ParameterGroup]:
        return [ParameterGroup(tuple(names), settings) for names, settings in self._groups.values() if names]
