"""The optimizer in `model_optim_rng.pt`: groups, whose members have no names, and plain optimizers' states.

The distributed optimizer saves groups without members. A plain one numbers its members through: group by
group, in each in the order of the model. Which parameters make up a group is megatron-core's rule (biases and
vectors have no weight decay, embedding and output may have a learning rate of their own); for plain
optimizers shapes, and in low precision values, confirm it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint.archive.file_tensor import FileTensor
from checkpoint.readers.deepspeed_state import Numbers
from checkpoint.readers.megatron_buffers import compare
from checkpoint.readers.megatron_distributed import FileRun, Found
from checkpoint.readers.megatron_model import Parameter
from checkpoint.streaming.panels import Files

_INNER = ("optimizer", "optimizer_state_dict")
_MASTERS = ("fp32_from_fp16_params", "fp32_from_fp16")
_STEP = "step"


class Inner(NamedTuple):
    """torch's state dict of an optimizer, and the masters beside it.

    Attributes:
        states: by number of the parameter; None in the distributed optimizer.
        masters: lists, one a group, of the parameters that are not float32; None where there are none.
    """

    groups: list[dict[str, Any]]
    states: Mapping[int, Mapping[str, Any]] | None
    masters: list[list[FileTensor]] | None


def inner_optimizers(saved: Any) -> list[Inner]:
    """What "optimizer" in a rank's file holds: one of them, or several chained (MoE)."""
    found = []
    for state in saved if isinstance(saved, list) else [saved]:
        inner = next((state[key] for key in _INNER if key in state), state)
        masters = next((state[key] for key in _MASTERS if key in state), None)
        found.append(Inner(inner["param_groups"], inner.get("state"), masters))
    return found


def by_rule(
    groups: Sequence[Mapping[str, Any]], parameters: Sequence[Parameter], args: Mapping[str, Any]
) -> list[list[Parameter]] | None:
    """The members of each group by megatron-core's rule; None where it does not tell the groups apart."""
    if len(groups) == 1:
        return [list(parameters)]
    keys = [
        (_decays(group), _has_own_rate(group, args), bool(group.get("is_expert_parallel")))
        for group in groups
    ]
    if len(set(keys)) != len(keys):
        return None
    experts_apart = len({key[2] for key in keys}) > 1
    rates_apart = len({key[1] for key in keys}) > 1
    members: dict[tuple[bool, bool, bool], list[Parameter]] = {key: [] for key in keys}
    for parameter in parameters:
        of_expert = parameter.of_expert if experts_apart else keys[0][2]
        own_rate = _is_embedding_or_output(parameter) if rates_apart else keys[0][1]
        key = (_is_decayed(parameter, args), own_rate, of_expert)
        if key not in members:
            return None
        members[key].append(parameter)
    return list(members.values())


def take_groups(
    groups: Sequence[Mapping[str, Any]], members: Sequence[Sequence[Parameter]], numbers: Numbers
) -> None:
    """Settings of groups, and the steps that they count."""
    named = []
    for group, parameters in zip(groups, members, strict=True):
        names = [parameter.name for parameter in parameters]
        step = group.get(_STEP)
        if isinstance(step, FileTensor):
            step = step.item()
        if step is not None:
            numbers.put(_STEP, names, step, "of its group")
        named.append((names, {key: value for key, value in group.items() if key != _STEP}))
    numbers.put_groups(named)


class _Member(NamedTuple):
    parameter: Parameter
    states: Mapping[str, Any]
    master: FileTensor | None


def read_plain(
    inner: Inner, parameters: Sequence[Parameter], args: Mapping[str, Any], numbers: Numbers, where: str
) -> list[Found]:
    """Masters and moments of a plain optimizer, each whole.

    What fits no parameter, or a weight that is not its rounded master, is a problem in `numbers`.

    Args:
        parameters: of this optimizer, in the order of the model.
        where: the file.
    """
    with Files(Path()) as files:
        ruled = by_rule(inner.groups, parameters, args)
        members = _pair_groups(inner, ruled, files) if ruled is not None else None
        follows_rule = members is not None
        if members is None:
            members = _pair_groups(inner, [parameters] * len(inner.groups), files)
        if members is None:
            numbers.problems.append(
                f"{where}: the optimizer's {sum(len(g['params']) for g in inner.groups)} states do not have "
                f"the shapes and masters of the model's {len(parameters)} parameters in their order, "
                "whatever the groups; likely cause: files of different saves or models mixed"
            )
            return []
        for member in (member for group in members for member in group):
            numbers.problems += _doubt(member, files, where)
    if inner.masters is None:
        numbers.problems += _undecided(members, parameters, where, follows_rule=follows_rule)
    take_groups(inner.groups, [[member.parameter for member in group] for group in members], numbers)
    return [found for group in members for member in group for found in _found(member, numbers, where)]


def _pair_groups(
    inner: Inner, candidates: Sequence[Sequence[Parameter]], files: Files
) -> list[list[_Member]] | None:
    """The members of all groups, each the first candidate in order that fits; None where one has none."""
    taken: set[int] = set()
    paired = []
    for number, group in enumerate(inner.groups):
        free = [parameter for parameter in candidates[number] if id(parameter) not in taken]
        masters = inner.masters[number] if inner.masters is not None else None
        states = [(inner.states or {}).get(index, {}) for index in group["params"]]
        members = _pair(states, masters, free, files)
        if members is None:
            return None
        taken |= {id(member.parameter) for member in members}
        paired.append(members)
    return paired


def _pair(
    states: Sequence[Mapping[str, Any]],
    masters: Sequence[FileTensor] | None,
    candidates: Sequence[Parameter],
    files: Files,
) -> list[_Member] | None:
    members: list[_Member] = []
    left, unused = iter(candidates), list(masters or ())
    for state in states:
        for parameter in left:
            has_master = masters is not None and parameter.tensor.dtype != "float32"
            if has_master and not unused:
                return None
            master = unused[0] if has_master else None
            if _fits(parameter, state, master, files):
                members.append(_Member(parameter, state, master))
                unused = unused[1:] if master is not None else unused
                break
        else:
            return None
    return members if not unused else None


def _fits(parameter: Parameter, state: Mapping[str, Any], master: FileTensor | None, files: Files) -> bool:
    shape = parameter.tensor.shape
    shapes = [value.shape for value in state.values() if isinstance(value, FileTensor) and value.shape]
    if shape not in shapes and shapes:
        return False
    if master is None:
        return True
    if master.shape != shape:
        return False
    differing, compared = _differing(parameter, master, files)
    return 2 * differing <= compared


def _differing(parameter: Parameter, master: FileTensor, files: Files) -> tuple[int, int]:
    return compare(FileRun.of(files, parameter.tensor), FileRun.of(files, master))


def _doubt(member: _Member, files: Files, where: str) -> Iterator[str]:
    if member.master is not None:
        differing, compared = _differing(member.parameter, member.master, files)
        if differing:
            yield (
                f"{where}: {differing} of {compared} compared elements of {member.parameter.name} are not its"
                f" master rounded to {member.parameter.tensor.dtype}; likely cause: a file that was changed"
            )


def _undecided(
    members: Sequence[Sequence[_Member]],
    parameters: Sequence[Parameter],
    where: str,
    *,
    follows_rule: bool,
) -> Iterator[str]:
    """Without masters to compare, parameters of one shape cannot be told apart where the rule does not."""
    found = {id(member.parameter) for group in members for member in group}
    shapes = Counter(
        shape for group in members for shape in {member.parameter.tensor.shape for member in group}
    )
    left = [p.name for p in parameters if id(p) not in found and p.tensor.shape in shapes]
    if left:
        yield (
            f"{where}: the optimizer has no state of {len(left)} parameters with the shape of others, and "
            f"nothing tells which ({', '.join(left[:3])}, ... or others): frozen parameters in float32"
        )
    shared = [list(shape) for shape, groups in shapes.items() if groups > 1]
    if shared and not follows_rule:
        yield (
            f"{where}: several of {len(members)} parameter groups have parameters of shapes {shared[:3]}, "
            "and in float32 nothing tells which of them are whose: the groups are not megatron-core's"
        )


def _found(member: _Member, numbers: Numbers, where: str) -> Iterator[Found]:
    parameter = member.parameter
    if member.master is not None:
        yield Found(parameter, "master", member.master)
    for state, value in member.states.items():
        if isinstance(value, FileTensor) and (value.shape or not parameter.tensor.shape):
            yield Found(parameter, state, value)
        elif isinstance(value, FileTensor):
            numbers.put(state, [parameter.name], value.item(), where)
        elif isinstance(value, int | float):
            numbers.put(state, [parameter.name], value, where)


def _decays(group: Mapping[str, Any]) -> bool:
    """NeMo has `pre_wd_mult`."""
    factor = next((group[key] for key in ("wd_mult", "pre_wd_mult", "weight_decay") if key in group), 1.0)
    return float(factor) != 0.0


def _has_own_rate(group: Mapping[str, Any], args: Mapping[str, Any]) -> bool:
    rate = args.get("decoupled_lr")
    return bool(group.get("is_decoupled_lr")) or (rate is not None and group.get("max_lr") == rate)


def _is_decayed(parameter: Parameter, args: Mapping[str, Any]) -> bool:
    if args.get("apply_wd_to_qk_layernorm") and (
        "q_layernorm." in parameter.name or "k_layernorm." in parameter.name
    ):
        return True
    return not parameter.is_vector


def _is_embedding_or_output(parameter: Parameter) -> bool:
    return parameter.name in ("embedding.word_embeddings.weight", "output_layer.weight")
