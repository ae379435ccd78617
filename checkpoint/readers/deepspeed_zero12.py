"""ZeRO 1 and 2: each data rank has a range of the flat buffer of every parameter group.

A buffer holds a group's parameters one behind the other, aligned and padded as the version of DeepSpeed saw
fit: `param_slice_mappings` says which elements of this rank's range are which parameter's. Older files have
the order only (`param_shapes`). `base_optimizer_state` keeps the padding at the end that the fp32 buffers
lost when saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from checkpoint.archive.file_tensor import FileTensor
from checkpoint.archive.standins import Opaque
from checkpoint.readers.deepspeed_flat import Collected
from checkpoint.readers.deepspeed_state import Numbers

Shapes = Mapping[str, tuple[int, ...]]


class Fragment(NamedTuple):
    """Elements of a parameter in a rank's flat buffer."""

    name: str
    start: int
    numel: int


def read_ranks(
    states: Mapping[int, Mapping[str, Any]], shapes: Sequence[Shapes], into: Collected, numbers: Numbers
) -> None:
    """Take the pieces that the data ranks of one model-parallel rank hold.

    Args:
        states: `optimizer_state_dict` of every rank's file, by data rank.
        shapes: `param_shapes` of the model states: of every group, in flat order.
    """
    mapped = [_mapping_holds(states.values(), group, known) for group, known in enumerate(shapes)]
    for data_rank, state in sorted(states.items()):
        _read_rank(state, shapes, (data_rank, mapped), into=into, numbers=numbers)


def _read_rank(
    state: Mapping[str, Any],
    shapes: Sequence[Shapes],
    place: tuple[int, Sequence[bool]],
    *,
    into: Collected,
    numbers: Numbers,
) -> None:
    for group, master in enumerate(state["single_partition_of_fp32_groups"]):
        if group >= len(shapes):
            into.problems.append(f"{master.file}: has group {group}, the model states list {len(shapes)}")
            continue
        known, (data_rank, mapped) = shapes[group], place
        fragments = _mapped(state, group) if mapped[group] else _counted(state, group, known, data_rank)
        unknown = [fragment.name for fragment in fragments if fragment.name not in known]
        if unknown:
            into.problems.append(f"{master.file}: the model states give no shape of {', '.join(unknown)}")
            continue
        tensors = {"master": master}
        padding = (state.get("group_paddings") or {group: 0})[group]
        whole = sum(math.prod(known[fragment.name]) for fragment in fragments)
        for key, value in _moments(state, group).items():
            flat = isinstance(value, FileTensor) and len(value.shape) == 1
            if flat and value.numel in (master.numel, master.numel + padding):
                tensors[key] = value
            elif flat and value.numel == whole:
                _take_whole(key, value, fragments, known, data_rank=data_rank, into=into)
            else:
                put_number(numbers, key, [fragment.name for fragment in fragments], value)
        for name, start, numel in fragments:
            if start + numel > master.numel:
                into.problems.append(
                    f"{master.file}: {name} lies at {start} to {start + numel} of group {group}, which has "
                    f"{master.numel} elements"
                )
                continue
            for key, flat in tensors.items():
                into.add_flat(name, key, known[name], run=flat.narrow((start,), (numel,)))


def _take_whole(
    state: str,
    flat: FileTensor,
    fragments: Sequence[Fragment],
    shapes: Shapes,
    *,
    data_rank: int,
    into: Collected,
) -> None:
    """Muon's momentum: the rank keeps all of it of every parameter of which it has some elements."""
    start = 0
    for fragment in fragments:
        numel = math.prod(shapes[fragment.name])
        tensor = flat.narrow((start,), (numel,)).reshape(shapes[fragment.name])
        into.add_copy(fragment.name, state, tensor, data_rank)
        start += numel


def read_groups(state: Mapping[str, Any], shapes: Sequence[Shapes], numbers: Numbers) -> None:
    """Take the settings of the parameter groups, each one's own."""
    base = state.get("base_optimizer_state")
    if isinstance(base, Mapping):
        numbers.put_groups(zip(shapes, base["param_groups"], strict=False))


def _moments(state: Mapping[str, Any], group: int) -> dict[str, Any]:
    """What the base optimizer keeps of a group's buffer, by its own words."""
    base = state.get("base_optimizer_state")
    if base is None:
        return {}
    if isinstance(base, Mapping):
        identity = base["param_groups"][group]["params"][0]
        return dict(base["state"].get(identity, {}))
    found = dict(base[group])  # an "elastic" checkpoint: a list
    if (step := state.get("base_optimizer_state_step")) is not None:
        found.setdefault("step", step)
    return found


def _mapping_holds(states: Iterable[Mapping[str, Any]], group: int, shapes: Shapes) -> bool:
    """Whether the ranks' mappings are there and follow the order of the flat buffer.

    With `round_robin_gradients` DeepSpeed (0.19.8, `_link_all_hp_params`) computes them as if the parameters
    had not been reordered: what they say is then wrong, and the order of `param_shapes` right.
    """
    found: dict[str, None] = {}
    for state in states:
        if "param_slice_mappings" not in state:
            return False
        ordered = sorted(_mapped(state, group), key=lambda fragment: fragment.start)
        found |= dict.fromkeys(fragment.name for fragment in ordered)
        if any(padding for padding in (state.get("param_alignment_paddings") or {group: []})[group]):
            return True  # then they are computed from the true offsets
    return list(found) == [name for name in shapes if name in found]


def _mapped(state: Mapping[str, Any], group: int) -> list[Fragment]:
    addresses = state["param_slice_mappings"][group]
    fields = {n: a.state if isinstance(a, Opaque) else a for n, a in addresses.items()}
    return [Fragment(name, address["start"], address["numel"]) for name, address in fields.items()]


def _counted(state: Mapping[str, Any], group: int, shapes: Shapes, data_rank: int) -> list[Fragment]:
    """Where parameters lie in a rank's range if nothing but the end of the group is padded."""
    master, paddings = state["single_partition_of_fp32_groups"][group], state.get("group_paddings")
    # ZeRO cuts the padding off the last rank's range, so that with it every range is as long
    length = master.numel + (paddings[group] if paddings and "zero_stage" in state else 0)
    begin, end = data_rank * length, (data_rank + 1) * length
    position, found = 0, []
    for name, shape in shapes.items():
        first, last = position, position + math.prod(shape)
        position = last
        low, high = max(first, begin), min(last, end)
        if low < high:
            found.append(Fragment(name, low - begin, high - low))
    return found


def put_number(numbers: Numbers, state: str, names: Sequence[str], value: Any) -> None:
    """Take a number of some parameters; what is none is left out, by name."""
    if isinstance(value, FileTensor) and value.numel == 1:
        numbers.put(state, names, value.item(), value.file)
    elif isinstance(value, bool | int | float):
        numbers.put(state, names, value, "")
    elif names:
        what = f"shape {list(value.shape)}" if isinstance(value, FileTensor) else f"a {type(value).__name__}"
        numbers.left_out.append(f"{state} of the group of {names[0]}: {what} belongs to no single parameter")
