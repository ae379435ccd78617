"""The optimizer's part of a DCP checkpoint: parameter groups, and the numbers it keeps of each parameter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoint.readers.dcp_chunks import read_items, read_numbers
from checkpoint.readers.dcp_metadata import DcpMetadata
from checkpoint.readers.dcp_tree import below
from checkpoint.readers.deepspeed_state import plain

MASTERS = ("master", "master_param", "master_params", "master_weight", "master_weights", "fp32_param")
"""Words that optimizers have for fp32 copies of bf16 parameters."""


@dataclass
class Group:
    """A parameter group as it was saved: names of parameters, or their numbers."""

    members: list[str | int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def read_groups(metadata: DcpMetadata, roots: Iterable[str], problems: list[str]) -> list[Group]:
    """The groups of all optimizers, in their order; those saved parameter by parameter joined again."""
    groups: list[Group] = []
    for root in roots:
        items, wrong = read_items(metadata, below(metadata.items, [root], "param_groups"))
        numbers, missing = read_numbers(metadata, below(metadata.tensors, [root], "param_groups"))
        problems += [*wrong, *missing]
        values = {name[len(root) + len("param_groups.") :]: v for name, v in {**items, **numbers}.items()}
        groups += _listed(values) if any(_LIST.fullmatch(name) for name in values) else _by_name(values)
    return groups


_LIST = re.compile(r"\d+\.params")


def _listed(values: Mapping[str, Any]) -> list[Group]:
    """From "0.lr", "0.params", "1.lr", ..."""
    found: dict[int, Group] = {}
    for name, value in values.items():
        number, _, key = name.partition(".")
        group = found.setdefault(int(number), Group())
        if key == "params":
            group.members = list(value)
        elif key != "param_names":
            group.settings[key] = plain(value)
    return [found[number] for number in sorted(found)]


def _by_name(values: Mapping[str, Any]) -> list[Group]:
    """From "layers.0.weight.lr", ...: parameters with the same settings are a group."""
    settings: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        parameter, _, key = name.rpartition(".")
        settings.setdefault(parameter, {})[key] = plain(value)
    found: dict[str, Group] = {}
    for parameter, own in settings.items():
        group = found.setdefault(json.dumps(own, sort_keys=True), Group(settings=own))
        group.members.append(parameter)
    return list(found.values())


def name_numbers(
    groups: list[Group], held: Mapping[int, tuple[int, ...]], model: Mapping[str, tuple[int, ...]]
) -> dict[int, str]:
    """Parameter numbers -> names, where an optimizer's own state dict was saved, which has no names.

    torch numbers parameters group by group, and within a group in the order they were given in, which is
    taken to be the model's. With several groups only shapes tell which parameters a group has; it is known
    where no shape occurs in two groups.

    Args:
        held: number -> shape of its states.
        model: name -> shape, in the model's order.

    Raises:
        ValueError: shapes and counts do not fit, or leave a choice.
    """
    named: dict[int, str] = {}
    names = list(model)
    if len(groups) == 1 and len(groups[0].members) == len(names):
        named = {int(number): name for number, name in zip(groups[0].members, names, strict=True)}
    else:
        for shape in dict.fromkeys(held.values()):
            alike = [name for name in names if model[name] == shape]
            numbers = [
                (int(n), at) for at, g in enumerate(groups) for n in g.members if held.get(int(n)) == shape
            ]
            if len({at for _, at in numbers}) == 1 and len(alike) == len(numbers):
                named |= {number: name for (number, _), name in zip(numbers, alike, strict=True)}
    if any(number not in named or model[named[number]] != shape for number, shape in held.items()):
        raise ValueError(
            "the optimizer's state was saved by parameter number, and only the model's code knows which "
            "parameter a number means: load it where it was written and save "
            "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(model, optimizer) instead"
        )
    return named
