"""How a run spread its layers over stages, and which buffers that made, by Megatron-LM's arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from checkpoint.readers.megatron_files import Degrees
from checkpoint.readers.torch_dist_model import Chunk, Place

_ALIGNED = 128  # elements: where buckets begin, whatever the data ranks
_BUSY_BANDWIDTH = 1 << 16  # elements, with pad_buckets_for_high_nccl_busbw
_MANY = 1024  # data ranks that are tried where the arguments do not say


class BufferPlace(NamedTuple):
    """A buffer of gradients and optimizer states, of all dtypes, on one model-parallel rank.

    Attributes:
        divisors: numbers of elements, of one of which the ends of its buckets are multiples.
    """

    called: str
    chunk: Chunk
    place: Place
    divisors: tuple[int, ...]


def count_layers(args: Mapping[str, Any], num_layers: int) -> dict[tuple[int, int], int] | None:
    """(stage, virtual stage) -> layers, as megatron-core divides them (`get_num_layers_to_build`).

    None where the arguments have a layout of their own, or do not divide.
    """
    degrees = Degrees.of(args)
    stages, virtual = degrees.pipeline, degrees.virtual
    if args.get("pipeline_model_parallel_layout"):
        return None
    first, last = (args.get(f"decoder_{end}_pipeline_num_layers") for end in ("first", "last"))
    before = bool(args.get("account_for_embedding_in_pipeline_split"))
    behind = bool(args.get("account_for_loss_in_pipeline_split"))
    uneven = {stage: n for stage, n in ((0, first), (stages - 1, last)) if n is not None}
    rest, left = num_layers + before + behind - sum(uneven.values()), stages - len(uneven)
    if rest % left if left else rest:
        return None
    counts: dict[tuple[int, int], int] = {}
    for stage in range(stages):
        held = uneven.get(stage, rest // max(1, left))
        if held % virtual:
            return None
        counts |= {(stage, v): held // virtual for v in range(virtual)}
    counts[0, 0] -= before
    counts[stages - 1, virtual - 1] -= behind
    return counts


def chunks_of(counts: Mapping[tuple[int, int], int]) -> dict[tuple[int, int], Chunk]:
    """(stage, virtual stage) -> what it holds: runs of layers, all first virtual stages before the second."""
    order = sorted(counts, key=lambda key: (key[1], key[0]))
    found, first = {}, 0
    for key in order:
        layers = range(first, first + counts[key])
        found[key] = Chunk(layers, key == order[0], key == order[-1])
        first = layers.stop
    return found


def buffers_of(args: Mapping[str, Any], num_layers: int, *, experts_apart: bool) -> list[BufferPlace] | None:
    """Every buffer of every model-parallel rank; None where the arguments do not say which layers it has."""
    counts = count_layers(args, num_layers)
    if counts is None:
        return None
    degrees, found = Degrees.of(args), []
    for (stage, virtual), chunk in chunks_of(counts).items():
        for called, place, shared in _places(degrees, experts_apart=experts_apart):
            where = f"stage {stage}" + (f".{virtual}" if degrees.virtual > 1 else "") + called
            divisors = tuple(_divisors(args, shared * degrees.pipeline))
            found.append(BufferPlace(where, chunk, place, divisors))
    return found


def _places(degrees: Degrees, *, experts_apart: bool) -> Iterator[tuple[str, Place, int]]:
    """Words, place, and how many ranks of a stage hold the different parts of a parameter."""
    for rank in range(degrees.tensor):
        within = (rank, degrees.tensor)
        yield f", tensor rank {rank}", Place(within, None if experts_apart else within), degrees.tensor
    if not experts_apart:
        return
    for expert in range(degrees.expert):
        for rank in range(degrees.expert_tensor):
            place = Place(None, (rank, degrees.expert_tensor), (expert, degrees.expert))
            called = f", expert rank {expert}, expert-tensor rank {rank}"
            yield called, place, degrees.expert * degrees.expert_tensor


def _divisors(args: Mapping[str, Any], model_parallel: int) -> Iterator[int]:
    """megatron-core, `param_and_grad_buffer.py`: the data ranks of an optimizer share every bucket evenly."""
    world = args.get("world_size")
    if world:
        instances = int(args.get("num_distributed_optimizer_instances") or 1)
        candidates = [max(1, int(world) // model_parallel // instances)]
    else:
        candidates = list(range(1, _MANY + 1))
    divisors = [math.lcm(data, _ALIGNED) for data in candidates]
    yield from dict.fromkeys([*divisors, *(math.lcm(d, _BUSY_BANDWIDTH) for d in divisors[:1])])
