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
from checkpoint.readers.dcp_metadata import Chunk, DcpMetadata, read_dcp_metadata
from checkpoint.readers.megatron_args import facts_of, unreadable
from checkpoint.readers.megatron_files import Degrees
from checkpoint.readers.torch_dist_damage import CAUSE, Repair, repair
from checkpoint.readers.torch_dist_dp_reshardable import Buckets, is_bucket, read_buckets
from checkpoint.readers.torch_dist_files import check_format, find, named_step, read_common
from checkpoint.readers.torch_dist_model import Model
from checkpoint.readers.torch_dist_model_space import is_flattened, unflattened
from checkpoint.readers.torch_dist_shards import Whole
from checkpoint.readers.torch_dist_state import Optimizer, read_objects, read_optimizers, read_rest
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


@dataclass
class _Reading:
    """A checkpoint as it is taken apart.

    Attributes:
        common: what all ranks have in common.
        pieces: of every tensor that is carried, by stored name.
        experts: numbers of the optimizers that have the experts alone.
    """

    source: Source
    metadata: DcpMetadata
    keys: _Keys
    common: Mapping[str, Any]
    pieces: Mapping[str, tuple[Piece, ...]]
    optimizers: Mapping[int, Optimizer]

    @property
    def args(self) -> Mapping[str, Any]:
        """Megatron-LM's arguments."""
        return self.common.get("args") or {}

    @property
    def experts(self) -> list[int]:
        return [number for number, optimizer in self.optimizers.items() if optimizer.of_experts]

    def whole(self, stored: str, name: str) -> Whole:
        tensor = self.metadata.tensors[stored]
        return Whole(name, tensor.dtype, tensor.shape, self.pieces[stored])


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
    keys = _sort(metadata)
    pieces, problems = locate(metadata, [*keys.weights, *keys.states, *keys.buckets])
    objects = read_objects(metadata, source)
    common = read_common(folder, objects, source.problems)
    source.problems += [*problems, *find_damage(metadata, keys.others)]
    source.left_out += [f"{name}: a tensor that is no parameter's, not carried" for name in keys.others]
    reading = _Reading(source, metadata, keys, common, pieces, read_optimizers(common, objects))
    model = Model({name: reading.whole(stored, name) for stored, name in keys.weights.items()})
    source.tensors = [SourceTensor(w.name, "weight", w.shape, w.pieces) for w in model.weights.values()]
    degrees = _degrees(reading.args, model)
    _read_states(reading, model)
    if keys.buckets and not source.problems:
        buckets = Buckets.of(reading.whole(stored, stored) for stored in keys.buckets)
        source.tensors += read_buckets(
            buckets, model, degrees, experts=reading.experts, problems=source.problems
        )
    _describe(reading, model, degrees)
    read_rest(source, common, reading.optimizers, model)
    source.problems[:] = dict.fromkeys(source.problems)
    return source


def _sort(metadata: DcpMetadata) -> _Keys:
    keys = _Keys()
    seen: set[tuple[Chunk, ...]] = set()
    for stored, tensor in metadata.tensors.items():
        if tensor.chunks in seen:
            continue  # another name for the very same bytes
        if tensor.chunks and all(chunk.stored for chunk in tensor.chunks):
            seen.add(tensor.chunks)
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


def _read_states(reading: _Reading, model: Model) -> None:
    """States that were stored whole, in their parameters' shapes or as flat blocks of these."""
    source = reading.source
    states: dict[str, dict[str, Whole]] = {}
    for stored, (name, state) in reading.keys.states.items():
        whole, weight = reading.whole(stored, name), model.weights.get(name)
        try:
            flat = weight is not None and is_flattened(whole, weight)
            states.setdefault(state, {})[name] = unflattened(whole, weight) if flat and weight else whole
        except ValueError as error:
            source.problems.append(str(error))
    done = Repair()
    if not source.problems:
        shifts = any(stored.startswith(_SHIFTING) for stored in reading.keys.states)
        try:
            done = repair(model, states, reading.args, experts_apart=bool(reading.experts), shifts=shifts)
        except (ValueError, OSError) as error:
            source.problems.append(str(error))
    for state, held in states.items():
        for name, whole in held.items():
            pieces = tuple(done.pieces.get((name, state), whole.pieces))
            source.tensors.append(SourceTensor(name, state, whole.shape, pieces))
    source.problems += done.lost + done.unexplained
    source.optimizer_problems += done.lost
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


def _describe(reading: _Reading, model: Model, degrees: Degrees) -> None:
    source, args = reading.source, reading.args
    source.step = int(reading.common.get("iteration") or named_step(source.folder))
    source.facts = facts_of(args) | {"homogeneous_layers": int(model.is_stacked)}
    source.facts.setdefault("num_layers", model.num_layers)
    source.facts.setdefault("tie_word_embeddings", int(model.is_tied))
    source.degrees = {"tensor": degrees.tensor, "pipeline": degrees.pipeline}
    if degrees.expert > 1:
        source.degrees["expert"] = degrees.expert
    source.world_size = int(args.get("world_size") or 0) or None
    if not args:
        source.notes.append(
            f"{source.folder}: holds no arguments: sizes of the model that shapes do not tell are not known, "
            "nor how it was split over stages"
        )
    source.problems += [f"{source.folder}: {line}" for line in unreadable(args)]
    source.format = ", ".join(filter(None, ("Megatron torch_dist", _words(degrees), *_kind(reading))))


def _words(degrees: Degrees) -> str:
    words = [f"TP{degrees.tensor}", f"PP{degrees.pipeline}"]
    words += [f"VPP{degrees.virtual}"] if degrees.virtual > 1 else []
    words += [f"EP{degrees.expert}"] if degrees.expert > 1 else []
    return " ".join(words)


def _kind(reading: _Reading) -> tuple[str, str]:
    """What the optimizer's state was asked to be, and the precision."""
    args, common = reading.args, reading.common
    precision = next((kind for kind in ("bf16", "fp16") if args.get(kind)), "fp32") if args else ""
    if not (reading.keys.states or reading.keys.buckets):
        return "without optimizer", precision
    kind = (common.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    saved = common.get("optimizer") or {}
    kind = kind or saved.get(0, saved).get("param_state_sharding_type")
    return kind or "plain optimizer", precision
