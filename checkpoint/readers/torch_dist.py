"""Megatron's format `torch_dist`: tensors of the whole model in chunks of torch.distributed.checkpoint.

Weights are whole, by names of the model alone: "decoder.layers.mlp.linear_fc2.weight" has all layers, stacked
unless every layer has a name of its own. An optimizer stores what it was asked to: `fully_reshardable` whole
tensors too, `dp_reshardable` flat buckets (see `torch_dist_dp_reshardable`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.manifest import Piece
from checkpoint.readers.dcp_chunks import find_damage, locate
from checkpoint.readers.dcp_metadata import DcpMetadata, read_dcp_metadata
from checkpoint.readers.megatron_args import facts_of, unreadable
from checkpoint.readers.megatron_files import Degrees
from checkpoint.readers.torch_dist_damage import CAUSE, Repair, repair
from checkpoint.readers.torch_dist_dp_reshardable import Buckets, Optimizers, is_bucket, read_buckets
from checkpoint.readers.torch_dist_files import check_format, find, read_common
from checkpoint.readers.torch_dist_model import Model
from checkpoint.readers.torch_dist_shards import Whole
from checkpoint.readers.torch_dist_state import read_objects, read_optimizers, read_rest
from checkpoint.source import Source, SourceTensor

SPEC = "megatron-core-gpt-dist"
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)")
_MASTERS = ("param", "fp32_param")
_SHIFTING = "optimizer.state.param."
"""How keys of masters begin in the format that megatron-core may have damaged."""
_WRAPPER = "module."
"""What NeMo has before every parameter's name."""


def recognise(path: Path) -> bool:
    """Whether this is the folder of an iteration, or one that holds such."""
    return find(path) is not None


@dataclass
class _Keys:
    """Stored names by what they are.

    Attributes:
        weights: stored name -> parameter.
        states: stored name -> (parameter, state).
    """

    weights: dict[str, str] = field(default_factory=dict)
    states: dict[str, tuple[str, str]] = field(default_factory=dict)
    buckets: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def read(path: Path) -> Source:
    """What the headers of a checkpoint's files say, and where the values confirm parameters to be.

    Damage (missing, truncated or mixed files, masters that are not the weights') is in `problems`.

    Raises:
        ValueError: the index is missing or damaged, or another backend wrote the files.
    """
    folder = find(path)
    if folder is None:
        raise ValueError(f"{path}: holds no checkpoint of the format torch_dist")
    folder = folder.absolute()
    source = Source("Megatron torch_dist", folder, specs=(SPEC,))
    check_format(folder, source.problems)
    metadata = read_dcp_metadata(folder)
    common = read_common(folder, source.problems)
    keys = _sort(metadata)
    wanted = [*keys.weights, *keys.states, *keys.buckets]
    pieces, problems = locate(metadata, wanted)
    source.problems += [*problems, *find_damage(metadata, keys.others)]
    model = Model({name: _whole(metadata, pieces, stored, name) for stored, name in keys.weights.items()})
    objects = read_objects(metadata, source)
    args = common.get("args") or {}
    optimizers = read_optimizers(common, objects)
    degrees = _degrees(args, model)
    source.tensors = [SourceTensor(w.name, "weight", w.shape, w.pieces) for w in model.weights.values()]
    numbers = Optimizers(
        [n for n, optimizer in optimizers.items() if not optimizer.of_experts],
        [n for n, optimizer in optimizers.items() if optimizer.of_experts],
    )
    wholes = {
        stored: (state, _whole(metadata, pieces, stored, name))
        for stored, (name, state) in keys.states.items()
    }
    _read_states(source, wholes, model, args, apart=bool(numbers.experts))
    if keys.buckets and not source.problems:
        buckets = Buckets.of(_whole(metadata, pieces, stored, stored) for stored in keys.buckets)
        found = read_buckets(buckets, model, degrees, optimizers=numbers, problems=source.problems)
        for (name, state), held in found.items():
            source.tensors.append(SourceTensor(name, state, model.weights[name].shape, tuple(held)))
    _describe(source, common, model, degrees)
    read_rest(source, common, optimizers, model)
    source.problems[:] = dict.fromkeys(source.problems)
    return source


def _sort(metadata: DcpMetadata) -> _Keys:
    keys = _Keys()
    for stored in metadata.tensors:
        match = _STATE.fullmatch(stored)
        if match:
            state = "master" if match[1] in _MASTERS else match[1]
            keys.states[stored] = (match[2].removeprefix(_WRAPPER), state)
        elif is_bucket(stored):
            keys.buckets.append(stored)
        elif re.match(r"(chained_\d+\.)?optimizer\.|rng_state", stored):
            keys.others.append(stored)
        else:
            keys.weights[stored] = stored.removeprefix(_WRAPPER)
    return keys


def _whole(metadata: DcpMetadata, pieces: Mapping[str, tuple[Piece, ...]], stored: str, name: str) -> Whole:
    tensor = metadata.tensors[stored]
    return Whole(name, tensor.dtype, tensor.shape, pieces[stored])


def _read_states(
    source: Source,
    wholes: Mapping[str, tuple[str, Whole]],
    model: Model,
    args: Mapping[str, Any],
    *,
    apart: bool,
) -> None:
    """States that were stored whole.

    Args:
        wholes: stored name -> state, and the tensor under the parameter's name.
        apart: whether experts have an optimizer of their own.
    """
    states: dict[str, dict[str, Whole]] = {}
    for state, whole in wholes.values():
        states.setdefault(state, {})[whole.name] = whole
    done = Repair()
    if not source.problems:
        shifts = any(stored.startswith(_SHIFTING) for stored in wholes)
        done = repair(model, states, args, experts_apart=apart, shifts=shifts)
    for state, held in states.items():
        for name, whole in held.items():
            pieces = tuple(done.pieces.get((name, state), whole.pieces))
            source.tensors.append(SourceTensor(name, state, whole.shape, pieces))
    source.problems += done.problems
    if done.repaired:
        source.notes.append(
            f"damage repaired: {CAUSE}; found in what was saved as other parameters: "
            + ", ".join(f"{name} ({count} parts)" for name, count in done.repaired.items())
        )


def _degrees(args: Mapping[str, Any], model: Model) -> Degrees:
    degrees = Degrees.of(args)
    return (
        degrees if args else degrees._replace(tensor=model.tensor_ranks(), expert_tensor=model.tensor_ranks())
    )


def _describe(source: Source, common: Mapping[str, Any], model: Model, degrees: Degrees) -> None:
    args = common.get("args") or {}
    source.step = int(common.get("iteration") or 0)
    source.facts = facts_of(args) | {"homogeneous_layers": int(model.is_stacked)}
    source.facts.setdefault("num_layers", model.num_layers)
    source.facts.setdefault("tie_word_embeddings", int(model.is_tied))
    source.degrees = {"tensor": degrees.tensor, "pipeline": degrees.pipeline}
    if degrees.expert > 1:
        source.degrees["expert"] = degrees.expert
    kind = (common.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    words = [f"TP{degrees.tensor}", f"PP{degrees.pipeline}"]
    words += [f"VPP{degrees.virtual}"] if degrees.virtual > 1 else []
    words += [f"EP{degrees.expert}"] if degrees.expert > 1 else []
    precision = next((k for k in ("bf16", "fp16") if args.get(k)), "fp32") if args else ""
    states = {tensor.state for tensor in source.tensors} - {"weight"}
    optimizer = (kind or "plain optimizer") if states else "without optimizer"
    source.format = ", ".join(filter(None, ("Megatron torch_dist", " ".join(words), optimizer, precision)))
    source.problems += [f"{source.folder}: {line}" for line in unreadable(args)]
