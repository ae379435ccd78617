"""ZeRO 3: every parameter is split evenly by itself, ceil(numel / ranks) elements each, zeros behind the end.

A sub-group's flat buffer holds this rank's part of its parameters one behind the other, in the order of
`param_shapes`. The model's 16-bit weights are nowhere in the files: the masters are the truth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint.archive.file_tensor import FileTensor
from checkpoint.readers.deepspeed_flat import Collected
from checkpoint.readers.deepspeed_state import Numbers
from checkpoint.readers.deepspeed_zero12 import Shapes, put_number


def read_ranks(
    states: Mapping[int, Mapping[str, Any]],
    shapes: Sequence[Shapes],
    ranks: int,
    *,
    into: Collected,
    numbers: Numbers,
) -> None:
    """Take the pieces that the data ranks of one model-parallel rank hold.

    Args:
        states: `optimizer_state_dict` of every rank's file, by data rank.
        shapes: `param_shapes` of the model states: of every sub-group.
        ranks: how many data ranks there are.
    """
    for data_rank, state in sorted(states.items()):
        _read_rank(state, shapes, (data_rank, ranks), into=into, numbers=numbers)


def _read_rank(
    state: Mapping[str, Any],
    shapes: Sequence[Shapes],
    place: tuple[int, int],
    *,
    into: Collected,
    numbers: Numbers,
) -> None:
    masters, base = state["fp32_flat_groups"], state["optimizer_state_dict"]["state"]
    special = state.get("ds_zero_partition_groups") or []
    if len(masters) != len(shapes):
        into.problems.append(
            f"{masters[0].file if masters else 'an optimizer file'}: {len(masters)} sub-groups, the "
            f"model states list {len(shapes)}"
        )
        return
    for number, master in enumerate(masters):
        known = shapes[number]
        rank, ranks = place
        if number < len(special) and special[number]:
            rank = special[number].get("partition_rank", rank)
            ranks = special[number].get("partition_count", ranks)
        tensors = {"master": master}
        for key, value in base.get(number, {}).items():
            if isinstance(value, FileTensor) and value.numel == master.numel and len(value.shape) == 1:
                tensors[key] = value
            else:
                put_number(numbers, key, list(known), value)
        _take_sub_group(known, tensors, (rank, ranks), into=into)


def read_groups(state: Mapping[str, Any], shapes: Sequence[Shapes], numbers: Numbers) -> None:
    """Take the settings of the parameter groups; a group's members are the numbers of its sub-groups."""
    groups = state["optimizer_state_dict"]["param_groups"]
    members = [
        [name for sub_group in group["params"] if sub_group < len(shapes) for name in shapes[sub_group]]
        for group in groups
    ]
    numbers.put_groups(zip(members, groups, strict=True))


def take_frozen(
    fragments: Mapping[str, FileTensor], shapes: Shapes, place: tuple[int, int], into: Collected
) -> None:
    """Take this rank's part of the weights that are not trained."""
    for name, fragment in fragments.items():
        _take(name, "weight", shapes[name], run=fragment, place=place, into=into)


def _take_sub_group(
    shapes: Shapes, tensors: Mapping[str, FileTensor], place: tuple[int, int], *, into: Collected
) -> None:
    position, length = 0, tensors["master"].numel
    for name, shape in shapes.items():
        part = -(-math.prod(shape) // place[1])
        if position + part > length:
            into.problems.append(
                f"{tensors['master'].file}: a sub-group has {length} elements, too few for {name} at "
                f"{position}: is it the file of one of {place[1]} data ranks?"
            )
            return
        for key, flat in tensors.items():
            run = flat.narrow((position,), (part,))
            _take(name, key, shape, run=run, place=place, into=into)
        position += part
    if position != length:
        into.problems.append(
            f"{tensors['master'].file}: a sub-group has {length} elements, its parameters only {position}: "
            f"is it the file of one of {place[1]} data ranks?"
        )


def _take(
    name: str,
    state: str,
    shape: tuple[int, ...],
    *,
    run: FileTensor,
    place: tuple[int, int],
    into: Collected,
) -> None:
    """A rank's part of a parameter, without the zeros behind the parameter's end."""
    first = place[0] * -(-math.prod(shape) // place[1])
    real = max(0, min(run.numel, math.prod(shape) - first))
    flat = run.reshape((run.numel,)).narrow((0,), (real,))
    into.add_flat(name, state, shape, run=flat, first=first)
