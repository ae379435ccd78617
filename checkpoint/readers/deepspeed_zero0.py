"""Without ZeRO: the optimizer's own state dict, which numbers parameters and does not name them.

Each group lists its parameters in the model's order. So the names follow from the shapes, if there is only
one way to deal out the model's parameters to the groups; otherwise the optimizer's state is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from checkpoint.archive.file_tensor import FileTensor
from checkpoint.readers.deepspeed_flat import Collected
from checkpoint.readers.deepspeed_state import Numbers
from checkpoint.readers.deepspeed_zero12 import put_number

Shape = tuple[int, ...]
_WIDEST = 10_000  # ways to have dealt out some of the parameters, at which the search is given up


def read_optimizer(
    optimizer: Mapping[str, Any], parameters: Mapping[str, Shape], into: Collected, numbers: Numbers
) -> None:
    """Take the state of the optimizer of one model-parallel rank.

    Args:
        optimizer: what the file of model states has under "optimizer".
        parameters: name -> shape of the model's parameters, in the model's order.
    """
    base = optimizer.get("optimizer_state_dict", optimizer)
    groups = base.get("param_groups")
    if not groups:
        return
    masters = optimizer.get("fp32_groups")
    shapes = [
        _shapes(group["params"], base["state"], masters[number] if masters else None)
        for number, group in enumerate(groups)
    ]
    names = None if None in shapes else deal_out(parameters, [group for group in shapes if group is not None])
    if names is None:
        numbers.left_out.append(
            "the optimizer's state: without ZeRO it numbers parameters, and which number is which parameter "
            "does not follow from the shapes"
        )
        return
    for number, group in enumerate(groups):
        for place, (name, identity) in enumerate(zip(names[number], group["params"], strict=True)):
            if masters:
                into.add_whole(name, "master", masters[number][place])
            for state, value in base["state"].get(identity, {}).items():
                if isinstance(value, FileTensor) and value.shape == parameters[name]:
                    into.add_whole(name, state, value)
                else:
                    put_number(numbers, state, [name], value)
    numbers.put_groups(zip(names, groups, strict=True))


def _shapes(
    identities: Sequence[int], state: Mapping[int, Any], masters: Sequence[FileTensor] | None
) -> list[Shape] | None:
    """Of a group's parameters, from their masters or moments; None where one has neither."""
    if masters is not None:
        return [tensor.shape for tensor in masters]
    found = []
    for identity in identities:
        tensors = [v for v in state.get(identity, {}).values() if isinstance(v, FileTensor) and v.shape]
        if not tensors:
            return None
        found.append(tensors[0].shape)
    return found


class _Reached(NamedTuple):
    """That some parameters can be dealt out so: in how many ways (2 for more), by which last choice."""

    ways: int
    group: int | None
    before: tuple[int, ...]


def deal_out(parameters: Mapping[str, Shape], groups: Sequence[Sequence[Shape]]) -> list[list[str]] | None:
    """The names of each group's parameters, where each group keeps the model's order; None if not certain."""
    spare = len(parameters) - sum(map(len, groups))
    frontier = {(0,) * len(groups): _Reached(1, None, ())}
    path = [frontier]
    for index, shape in enumerate(parameters.values()):
        reached: dict[tuple[int, ...], _Reached] = {}
        for taken, (ways, _, _) in frontier.items():
            for group, after in _choices(shape, taken, groups, may_skip=index - sum(taken) < spare):
                more = reached[after].ways if after in reached else 0
                reached[after] = _Reached(min(2, ways + more), group, taken)
        frontier = reached
        path.append(frontier)
        if len(frontier) > _WIDEST:
            return None
    return _trace(path, list(parameters), [len(group) for group in groups])


def _choices(
    shape: Shape, taken: tuple[int, ...], groups: Sequence[Sequence[Shape]], *, may_skip: bool
) -> Iterator[tuple[int | None, tuple[int, ...]]]:
    """The groups whose next parameter this one may be; none, where some are not trained."""
    for group, members in enumerate(groups):
        if taken[group] < len(members) and members[taken[group]] == shape:
            yield group, (*taken[:group], taken[group] + 1, *taken[group + 1 :])
    if may_skip:
        yield None, taken


def _trace(
    path: Sequence[Mapping[tuple[int, ...], _Reached]], names: Sequence[str], sizes: Sequence[int]
) -> list[list[str]] | None:
    at = tuple(sizes)
    if at not in path[-1] or path[-1][at].ways != 1:
        return None
    dealt: list[list[str]] = [[] for _ in sizes]
    for name, reached in zip(reversed(names), reversed(path), strict=False):
        _, group, before = reached[at]
        if group is not None:
            dealt[group].insert(0, name)
        at = before
    return dealt
