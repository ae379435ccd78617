"""`dp_reshardable`: masters and moments in the flat buckets of every model-parallel rank's buffers.

optimizer.distributed.dp_group_idx_{i}.gbuf_idx_{g}.dtype_({weights}, {gradients}).bucket_idx_{b}.{state}

with `chained_{k}.` before it where there are several optimizers. Group i counts tensor ranks, then stages; of
experts' optimizers expert-tensor ranks, then expert ranks, then stages. There is a buffer for every chunk of
the model and dtype. Which layers a stage has, buffers' sizes tell, since chunks are runs of layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from checkpoint.manifest import Piece
from checkpoint.readers.megatron_buffers import ALIGNMENT, Doubt, Located, locate
from checkpoint.readers.megatron_files import Degrees
from checkpoint.readers.torch_dist_model import Chunk, Model, Place, Slot, orders
from checkpoint.readers.torch_dist_shards import BufferRun, Shard, ShardRun, Whole, collect
from checkpoint.source import SourceTensor
from checkpoint.streaming.panels import Files

_KEY = re.compile(
    r"(?:chained_(?P<chained>\d+)\.)?optimizer\.distributed\.dp_group_idx_(?P<group>\d+)\."
    r"gbuf_idx_(?P<buffer>\d+)\.dtype_\((?P<dtype>[^,)]+),[^)]*\)\.bucket_idx_(?P<bucket>\d+)\.(?P<state>\w+)"
)
MASTER = "param"
_Pieces = dict[tuple[str, str], list[Piece]]


class BufferName(NamedTuple):
    """A buffer: of which optimizer, in which group of data ranks, which of theirs, and its weights' dtype."""

    optimizer: int
    group: int
    number: int
    dtype: str


def is_bucket(name: str) -> bool:
    return _KEY.fullmatch(name) is not None


@dataclass
class Buckets:
    """The buffers of a checkpoint.

    Attributes:
        buffers: buffer -> state -> bucket's number -> stored tensor.
    """

    buffers: dict[BufferName, dict[str, dict[int, Whole]]] = field(default_factory=dict)

    @staticmethod
    def of(tensors: Iterable[Whole]) -> Buckets:
        found = Buckets()
        for whole in tensors:
            match = _KEY.fullmatch(whole.name)
            if match is None:
                continue
            dtype = match["dtype"].removeprefix("torch.")
            name = BufferName(int(match["chained"] or 0), int(match["group"]), int(match["buffer"]), dtype)
            states = found.buffers.setdefault(name, {})
            states.setdefault(match["state"], {})[int(match["bucket"])] = whole
        return found

    def run(self, name: BufferName, state: str, files: Files) -> BufferRun:
        buckets = self.buffers[name][state]
        return BufferRun(files, [buckets[number] for number in sorted(buckets)])

    def chunks(self, optimizers: Sequence[int], group: int, dtype: str) -> list[BufferName]:
        """The buffers of one dtype of a group, one a chunk of the model, in their order."""
        return sorted(
            name
            for name in self.buffers
            if name.optimizer in optimizers and name.group == group and name.dtype == dtype
        )

    def groups(self, optimizers: Sequence[int]) -> int:
        """How many groups of data ranks these optimizers have."""
        return 1 + max((name.group for name in self.buffers if name.optimizer in optimizers), default=-1)

    def dtypes(self, optimizers: Sequence[int]) -> list[str]:
        """By size, the largest first."""
        sizes: dict[str, int] = {}
        for name, states in self.buffers.items():
            if name.optimizer in optimizers:
                buckets = next(iter(states.values()))
                sizes[name.dtype] = sizes.get(name.dtype, 0) + sum(w.shape[0] for w in buckets.values())
        return sorted(sizes, key=lambda dtype: -sizes[dtype])


class Optimizers(NamedTuple):
    """Numbers of the optimizers that have dense parameters, and of those that have the experts alone."""

    dense: Sequence[int]
    experts: Sequence[int]


@dataclass
class _Reading:
    """A checkpoint as its buffers are gone through.

    Attributes:
        found: (stored name, state) -> pieces.
        copies: the same of the n-th copy, of what several ranks held: n -> ...
    """

    buckets: Buckets
    model: Model
    degrees: Degrees
    problems: list[str]
    files: Files
    found: _Pieces = field(default_factory=dict)
    copies: dict[int, _Pieces] = field(default_factory=dict)


def read_buckets(
    buckets: Buckets, model: Model, degrees: Degrees, *, experts: Sequence[int], problems: list[str]
) -> list[SourceTensor]:
    """The states of all parameters, as the tensors that the model's weights are stored as.

    Args:
        experts: numbers of the optimizers that have the experts alone.
        problems: takes a line for each buffer that cannot be taken apart, and for values that contradict.
    """
    dense = sorted({name.optimizer for name in buckets.buffers} - set(experts))
    optimizers = Optimizers(dense, experts)
    with Files(Path()) as files:
        reading = _Reading(buckets, model, degrees, problems, files)
        try:
            stages = _stages(reading, optimizers)
            for group in range(buckets.groups(optimizers.dense)):
                stage, rank = divmod(group, degrees.tensor)
                within = (rank, degrees.tensor)
                place = Place(within, None if optimizers.experts else within)
                _read_group(reading, optimizers.dense, group, place=place, chunks=stages[stage])
            for group in range(buckets.groups(optimizers.experts)):
                rest, rank = divmod(group, degrees.expert_tensor)
                stage, expert = divmod(rest, degrees.expert)
                within = (rank, degrees.expert_tensor)
                place = Place(None, within, (expert, degrees.expert))
                _read_group(reading, optimizers.experts, group, place=place, chunks=stages[stage])
        except ValueError as error:
            problems.append(str(error))
        return _tensors(reading)


def _tensors(reading: _Reading) -> list[SourceTensor]:
    """What was found, and those copies that data ranks had divided as they had the first one."""
    shapes = {name: whole.shape for name, whole in reading.model.weights.items()}
    tensors = [
        SourceTensor(name, state, shapes[name], tuple(pieces))
        for (name, state), pieces in reading.found.items()
    ]
    boxes = {key: {piece.box for piece in pieces} for key, pieces in reading.found.items()}
    for number, copies in reading.copies.items():
        tensors += [
            SourceTensor(name, state, shapes[name], tuple(pieces), {"data": number})
            for (name, state), pieces in copies.items()
            if boxes.get((name, state), set()).issuperset(piece.box for piece in pieces)
        ]
    return tensors


def _stages(reading: _Reading, optimizers: Optimizers) -> list[list[Chunk]]:
    """Stage -> its chunks, by the sizes of the dense buffers of the first tensor rank."""
    buckets, tensor = reading.buckets, reading.degrees.tensor
    dtype = buckets.dtypes(optimizers.dense)[0]
    groups = buckets.groups(optimizers.dense)
    if groups % tensor:
        raise ValueError(
            f"{groups} groups of data ranks have buckets, which are not those of {tensor} tensor ranks"
        )
    held = [buckets.chunks(optimizers.dense, group, dtype) for group in range(0, groups, tensor)]
    within = (0, tensor)
    place = Place(within, None if optimizers.experts else within)
    stages: list[list[Chunk]] = [[] for _ in held]
    first, last = 0, (max(map(len, held)) - 1, len(held) - 1)
    for virtual in range(last[0] + 1):
        for stage, names in enumerate(held):
            if virtual >= len(names):
                raise ValueError(
                    f"stage {stage} has {len(names)} buffers of {dtype}, another has {last[0] + 1}"
                )
            chunk = Chunk(range(first, first), (virtual, stage) == (0, 0), (virtual, stage) == last)
            layers = _count_layers(reading, names[virtual], chunk, place)
            stages[stage].append(chunk._replace(layers=layers))
            first = layers.stop
    return stages


def _count_layers(reading: _Reading, name: BufferName, chunk: Chunk, place: Place) -> range:
    """The layers of a chunk from that where the one before ended: as many as fill its buffer.

    Alignment takes less than 64 elements for each parameter.
    """
    first = chunk.layers.start
    numel = reading.buckets.run(name, MASTER, reading.files).numel
    inner = Chunk(chunk.layers, is_first=False, is_last=False)
    slots = _slots(reading, chunk, place, name.dtype)
    for stop in range(first, reading.model.num_layers + 1):
        if stop > first:
            slots += _slots(reading, inner._replace(layers=range(stop - 1, stop)), place, name.dtype)
        least = sum(slot.shard.numel for slot in slots)
        if least <= numel < least + ALIGNMENT * max(1, len(slots)):
            return range(first, stop)
        if least > numel:
            break
    raise ValueError(
        f"{_called(name)}: has {numel} elements, which no number of layers from layer {first} on has; likely "
        "cause: parameters that are not trained, or files of different saves mixed"
    )


def _slots(reading: _Reading, chunk: Chunk, place: Place, dtype: str) -> list[Slot]:
    return [slot for slot in reading.model.slots(chunk, place) if slot.shard.dtype == dtype]


def _read_group(
    reading: _Reading, optimizers: Sequence[int], group: int, *, place: Place, chunks: Sequence[Chunk]
) -> None:
    """All buffers of one model-parallel rank."""
    for dtype in reading.buckets.dtypes(optimizers):
        names = reading.buckets.chunks(optimizers, group, dtype)
        held = [slots for chunk in chunks if (slots := _slots(reading, chunk, place, dtype))]
        if len(names) != len(held):
            raise ValueError(
                f"group {group} of data ranks has {len(names)} buffers of {dtype}, expected {len(held)}, one "
                "for each chunk of the model"
            )
        for name, slots in zip(names, held, strict=True):
            _read_buffer(reading, name, slots)


def _read_buffer(reading: _Reading, name: BufferName, slots: Sequence[Slot]) -> None:
    masters = reading.buckets.run(name, MASTER, reading.files)
    shards, located = _locate(reading, masters, slots)
    called = _called(name)
    if not located.starts:
        where = f" (the first {located.reached} elements fit)" if located.reached else ""
        reading.problems.append(
            f"{called}: no order of the {len(slots)} parameters of its rank has these masters{where}; "
            "likely cause: files of different saves mixed, or a file that was changed"
        )
        return
    reading.problems += [_doubt(called, shards[doubt.parameter], doubt) for doubt in located.doubts]
    for state in reading.buckets.buffers[name]:
        run = reading.buckets.run(name, state, reading.files)
        for number, start in located.starts.items():
            shard = shards[number]
            into = reading.copies.setdefault(1 + name.group, {}) if shard.is_copy else reading.found
            runs = run.between(start, start + shard.numel)
            collect(into, "master" if state == MASTER else state, shard, start=start, runs=runs)


def _locate(reading: _Reading, masters: BufferRun, slots: Sequence[Slot]) -> tuple[list[Shard], Located]:
    """The order that fits exactly; else one that fits nearly; else none."""
    best: tuple[list[Shard], Located] | None = None
    for shards in orders(slots, list(reading.model.weights)):
        runs = [ShardRun(reading.files, shard) for shard in shards]
        located = locate(runs, masters, masters.starts)
        if located.starts and not located.doubts:
            return shards, located
        if best is None or (bool(located.starts), located.reached) > (bool(best[1].starts), best[1].reached):
            best = shards, located
    assert best is not None
    return best


def _called(name: BufferName) -> str:
    optimizer = f"optimizer {name.optimizer}, " if name.optimizer else ""
    return f"{optimizer}group {name.group} of data ranks, buffer {name.number} ({name.dtype})"


def _doubt(called: str, shard: Shard, doubt: Doubt) -> str:
    return (
        f"{shard.name}: {doubt.differing} of {doubt.compared} compared elements are not the rounded master "
        f"({called}, from element {doubt.start} on); likely cause: files of different saves "
        "mixed, or a file that was changed"
    )
