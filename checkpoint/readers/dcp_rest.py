"""What a DCP checkpoint holds besides model and optimizer: schedulers, data positions, counters."""

from __future__ import annotations

import math
import re
from typing import Any

from checkpoint.readers.dcp_chunks import find_damage, read_items, read_numbers
from checkpoint.readers.dcp_metadata import DcpMetadata
from checkpoint.readers.dcp_tree import Tree, below
from checkpoint.readers.deepspeed_state import plain
from checkpoint.source import Source

_COUNTER = re.compile(r"(.+\.)?(step|steps|global_step|iteration|iter|current_step|trained_steps)")
_FOREIGN = re.compile(r"sched|loader|data")
"""What counts steps of its own, or samples."""
_FOLDER = re.compile(r"(?:.*[^a-z])?(?:step|steps|global_step|checkpoint|ckpt|iter|iteration)[-_]?(\d+)")


def read_rest(metadata: DcpMetadata, roots: list[str], tree: Tree, source: Source) -> None:
    """Into the source's state, by stored name, what JSON can hold; a line in `left_out` for the rest."""
    optimizers = {*below(metadata.items, roots, "state"), *below(metadata.items, roots, "param_groups")}
    refused: dict[str, str] = {}
    items, wrong = read_items(metadata, [n for n in metadata.items if n not in optimizers], refused=refused)
    counters = [name for name in tree.others if math.prod(metadata.tensors[name].shape) == 1]
    numbers, problems = read_numbers(metadata, counters)
    source.problems += [*wrong, *problems, *find_damage(metadata, tree.others)]
    values: dict[str, Any] = {}
    for name, value in {**items, **numbers}.items():
        try:
            values[name] = plain(value)
        except ValueError as error:
            refused[name] = str(error)
    for name in tree.others:
        if name not in values:
            tensor = metadata.tensors[name]
            refused[name] = f"a {tensor.dtype} tensor of shape {list(tensor.shape)} that is no parameter"
    source.left_out += [f"{name}: {reason}, not carried" for name, reason in refused.items()]
    source.state = values


def trainer_step(source: Source) -> int:
    """The trainer's own counter, else the number in the folder's name, else the optimizer's."""
    counters = [
        (name.count("."), name)
        for name, value in source.state.items()
        if _COUNTER.fullmatch(name) and type(value) is int and not _FOREIGN.search(name)
    ]
    if counters:
        return int(source.state[min(counters)[1]])
    for name in (source.folder.name, source.folder.parent.name):
        match = _FOLDER.fullmatch(name.lower())
        if match:
            return int(match[1])
    made = set(source.scalars.get("step", {}).values())
    return int(max(made, default=0))
