"""What the files of one rank of a Megatron checkpoint of the format `torch` hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from checkpoint.readers.deepspeed_state import Numbers
from checkpoint.readers.megatron_args import facts_of
from checkpoint.readers.megatron_distributed import Found, read_buffers, share_out
from checkpoint.readers.megatron_files import MODEL, OPTIMIZER, Degrees, Files
from checkpoint.readers.megatron_model import Parameter, count_layers, is_qkv, read_model, reordered_qkv
from checkpoint.readers.megatron_optimizer import Inner, by_rule, inner_optimizers, read_plain, take_groups
from checkpoint.source import SourceTensor

_PRESENT_ORDER = 2.0  # checkpoint version since which queries, keys and values lie as they do


@dataclass
class Reading:
    """A checkpoint as its ranks' files are gone through.

    Attributes:
        args: Megatron-LM's; empty in very old checkpoints.
        version: of the checkpoint, as Megatron-LM counts.
        numbers: steps and groups; it has the lists of problems and of what is left out.
        layers: (pipeline rank, virtual stage) -> how many layers its chunk holds.
    """

    files: Files
    degrees: Degrees
    args: Mapping[str, Any]
    version: float
    numbers: Numbers
    layers: dict[tuple[int, int], int] = field(default_factory=dict)
    tensors: list[SourceTensor] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        return self.numbers.problems

    @property
    def left_out(self) -> list[str]:
        return self.numbers.left_out


def read_rank(reading: Reading, rank: str, at: dict[str, int], content: Mapping[str, Any]) -> None:
    """Take all that a rank's files hold.

    Args:
        rank: name of its folder.
        at: its coordinates.
        content: of its `model_optim_rng.pt`.
    """
    where = f"{reading.files.folder / rank / MODEL}"
    held = read_model(content)
    reading.left_out.extend(f"{name}: is no tensor" for name in held.others)
    if held.extra_states:
        reading.left_out.append("_extra_state of modules: what Transformer Engine keeps for FP8")
    if held.chunks != reading.degrees.virtual:
        reading.problems.append(
            f"{where}: holds {held.chunks} chunks of the model, the run had {reading.degrees.virtual}"
        )
    for virtual, count in count_layers(held.parameters).items():
        known = reading.layers.setdefault((at["pipeline"], virtual), count)
        if known != count:
            reading.problems.append(
                f"{where}: chunk {virtual} has {count} layers, that of another rank of its stage {known}"
            )
    for parameter in held.parameters:
        _add(reading, at, Found(parameter, "weight", parameter.tensor))
    if not content.get("optimizer"):
        return
    try:
        found = _read_optimizer(reading, rank, content["optimizer"], held.parameters)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OSError) as error:
        reading.problems.append(f"{where}: its optimizer is not understood ({type(error).__name__}: {error})")
        return
    for each in found:
        _add(reading, at, each)


def _read_optimizer(reading: Reading, rank: str, saved: Any, parameters: Sequence[Parameter]) -> list[Found]:
    optimizers = inner_optimizers(saved)
    parts = share_out(parameters, len(optimizers), experts_apart=reading.degrees.expert > 1)
    folder = reading.files.folder / rank
    if any(inner.states is not None for inner in optimizers):
        return [
            found
            for inner, part in zip(optimizers, parts, strict=True)
            for found in read_plain(inner, part, reading.args, reading.numbers, f"{folder / MODEL}")
        ]
    flat = reading.files.open(rank, OPTIMIZER)
    if flat is None:
        return []
    found = read_buffers(flat, parts, folder / OPTIMIZER, reading.problems)
    _take_groups(reading, optimizers, parts, {id(each.parameter) for each in found})
    return found


def _take_groups(
    reading: Reading, optimizers: Sequence[Inner], parts: Sequence[Sequence[Parameter]], trained: set[int]
) -> None:
    """Groups of the distributed optimizer; `trained` has the parameters with a state, by identity."""
    for inner, part in zip(optimizers, parts, strict=True):
        members = by_rule(inner.groups, [p for p in part if id(p) in trained], reading.args)
        if members is not None:
            take_groups(inner.groups, members, reading.numbers)
            continue
        step = inner.groups[0].get("step")
        if step is not None and all(group.get("step") == step for group in inner.groups):
            names = [parameter.name for parameter in part if id(parameter) in trained]
            reading.numbers.put("step", names, step, "of all groups")
        reading.left_out.append(
            f"settings of {len(inner.groups)} parameter groups: nothing tells which parameters they are of"
        )


def _add(reading: Reading, at: dict[str, int], found: Found) -> None:
    parameter, state, tensor = found
    where = at | {"virtual": parameter.virtual} if reading.degrees.virtual > 1 else at
    try:
        pieces = [tensor.piece()]
        if reading.version < _PRESENT_ORDER and is_qkv(parameter.name):
            pieces = reordered_qkv(pieces[0], reading.version, facts_of(reading.args)["head_dim"])
    except KeyError:
        reading.problems.append(
            f"{parameter.name} ({state}): its rows have the order of checkpoint version {reading.version:g}, "
            "and the checkpoint does not say how many of them a head has"
        )
        return
    except ValueError as error:
        reading.problems.append(f"{parameter.name} ({state}): {error}")
        return
    reading.tensors.append(SourceTensor(parameter.name, state, tensor.shape, tuple(pieces), where))
