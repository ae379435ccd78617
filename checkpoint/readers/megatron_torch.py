"""Megatron-LM's checkpoints of the format `torch`: a file a rank, and one more of the distributed optimizer.

Names are megatron-core's as the rank had them: layers count from the first of the chunk, experts from the
first of the expert rank. `megatron_files` has the files' names, `megatron_model` older names and orders,
`megatron_buffers` how flat buffers are taken apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.readers.deepspeed_state import Numbers, plain_items
from checkpoint.readers.megatron_args import facts_of, unreadable
from checkpoint.readers.megatron_files import MODEL, Degrees, Files, iteration_folder, rank_folders, words
from checkpoint.readers.megatron_rank import Reading, read_rank
from checkpoint.source import Source

SPEC = "megatron-core-gpt"
_READ = {"args", "checkpoint_version", "iteration", "optimizer", "rng_state", "rerun_state_machine"}
_BOUND = {"rng_state": "random generators", "rerun_state_machine": "checks of repeated steps"}


def recognise(path: Path) -> bool:
    """Whether this is the folder of an iteration with ranks' folders, or one that holds such."""
    return iteration_folder(path) is not None


def read(path: Path) -> Source:
    """What the headers of a checkpoint's files say, and where values confirm parameters to be.

    Damage (missing, truncated or mixed files, masters that are not the weights') is in `problems`.

    Raises:
        ValueError: no rank's file can be read.
    """
    folder = iteration_folder(path)
    if folder is None:
        raise ValueError(f"{path}: has no folders mp_rank_* of ranks")
    files = Files(folder.absolute(), rank_folders(folder))
    contents = {rank: content for rank in files.ranks if (content := _content(files, rank))}
    if not contents:
        raise ValueError("\n  ".join(files.problems))
    first = next(iter(contents.values()))
    args = first.get("args") or {}
    degrees = Degrees.of(args) if args else Degrees.named(files.ranks, first)
    version = float(first.get("checkpoint_version") or 0)
    reading = Reading(files, degrees, args, version, Numbers(files.problems, []))
    _check(reading, contents)
    for rank, at in degrees.writers().items():
        if rank in contents:
            read_rank(reading, rank, at, contents[rank])
    return _described(reading, first)


def _content(files: Files, rank: str) -> dict[str, Any] | None:
    content = files.open(rank, MODEL)
    if content is None:
        return None
    if isinstance(content, dict) and any(str(key).startswith("model") for key in content):
        return content
    files.problems.append(f"{files.folder / rank / MODEL}: holds no model")
    return None


def _check(reading: Reading, contents: Mapping[str, Mapping[str, Any]]) -> None:
    """Say what is missing, and what does not belong together."""
    files, run = reading.files, words(reading.degrees)
    expected = reading.degrees.writers()
    files.problems += [
        f"{files.folder / rank / MODEL} is missing: the run had {run}"
        for rank in expected
        if rank not in files.ranks
    ]
    strange = [rank for rank in files.ranks if rank not in expected]
    if strange:
        files.problems.append(
            f"{files.folder}: {', '.join(strange)} cannot be of this run, which had {run}: files of "
            "different runs are mixed"
        )
    for key in ("iteration", "checkpoint_version"):
        values: dict[Any, list[str]] = {}
        for rank, content in contents.items():
            values.setdefault(content.get(key), []).append(rank)
        if len(values) > 1:
            said = "; ".join(f"{value} in {', '.join(ranks)}" for value, ranks in values.items())
            files.problems.append(f"{files.folder}: the ranks' files are not of one save: {key} is {said}")
    files.problems += [f"{files.folder}: {line}" for line in unreadable(reading.args)]


def _described(reading: Reading, content: Mapping[str, Any]) -> Source:
    """The source, with everything that is not a tensor."""
    args, left_out = reading.args, reading.left_out
    rest = {key: value for key, value in content.items() if key not in _READ and not key.startswith("model")}
    state = plain_items(rest, "Megatron's", left_out)
    state["args"] = plain_items(args, "argument", left_out)
    left_out += [
        f"{key}: the {what} of each rank, bound to the layout that saved them"
        for key, what in _BOUND.items()
        if content.get(key)
    ]
    others = sorted(reading.files.folder.glob("*/layer_wise_optimizer_*.pt"))
    left_out += [f"{path}: a layer-wise optimizer, which is not read" for path in others]
    facts = facts_of(args)
    layers = _global_layers(reading, facts.get("num_layers"))
    return Source(
        format=_name(reading, content),
        folder=reading.files.folder,
        step=int(content.get("iteration") or 0),
        tensors=reading.tensors,
        degrees=_axes(reading.degrees),
        facts=facts,
        layers=layers,
        scalars=reading.numbers.values,
        groups=reading.numbers.groups(),
        state=state,
        specs=(SPEC,),
        left_out=list(dict.fromkeys(left_out)),
        problems=list(dict.fromkeys(reading.problems)),
        world_size=int(args.get("world_size") or 0) or None,
    )


def _axes(degrees: Degrees) -> dict[str, int]:
    axes = {"tensor": degrees.tensor, "pipeline": degrees.pipeline}
    axes |= {"virtual": degrees.virtual} if degrees.virtual > 1 else {}
    if degrees.has_expert_axes:
        axes |= {"expert": degrees.expert, "expert_tensor": degrees.expert_tensor}
    return axes


def _global_layers(reading: Reading, wanted: int | None) -> dict[tuple[int, int], tuple[int, ...]]:
    """Global numbers of every chunk's layers.

    A chunk holds a run of layers; the first chunks of all stages come before the second ones. That is so in
    every way that megatron-core divides layers: evenly, unevenly at the ends, or by a given layout.
    """
    found, first = {}, 0
    for virtual in range(reading.degrees.virtual):
        for pipeline in range(reading.degrees.pipeline):
            count = reading.layers.get((pipeline, virtual), 0)
            found[pipeline, virtual] = tuple(range(first, first + count))
            first += count
    if wanted is not None and first != wanted and not reading.problems:
        reading.problems.append(
            f"{reading.files.folder}: the stages hold {first} layers, the arguments say {wanted}"
        )
    return found


def _name(reading: Reading, content: Mapping[str, Any]) -> str:
    args = reading.args
    precision = next((kind for kind in ("bf16", "fp16") if args.get(kind)), "fp32")
    kind = "distributed optimizer" if args.get("use_distributed_optimizer") else "plain optimizer"
    optimizer = kind if content.get("optimizer") else "without optimizer"
    return f"Megatron torch, {words(reading.degrees)}, {optimizer}, {precision}"
