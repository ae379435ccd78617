"""`dp_reshardable`: masters and moments as the distributed optimizer has them, in flat buckets without names.

Tensors are called `optimizer.distributed.dp_group_idx_{i}.gbuf_idx_{g}.dtype_(weights, gradients).
bucket_idx_{b}.{param, exp_avg, exp_avg_sq}`: i is the model-parallel rank, tensor ranks first, then (of
experts) expert ranks, then pipeline stages; a buffer g is of one model chunk and dtype. What a rank holds and in
which order is predicted from the model's tensors, has to have the sizes of the buckets, and is confirmed by
values: a weight is its rounded master. Gaps between parameters hold uninitialised memory and are not read.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from checkpoint.manifest import Piece
from checkpoint.panels import Files
from checkpoint.readers.megatron_buffers import ALIGNMENT, locate
from checkpoint.readers.torch_dist_local import Local, Model
from checkpoint.readers.torch_dist_order import Chunk, Order, Rank, orders, registered
from checkpoint.readers.torch_dist_runs import Run, Runs, differing, run_of

MASTER = "param"
_KEY = re.compile(
    r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)"
    r"\.dtype_\((?:torch\.)?(\w+), .*\)\.bucket_idx_(\d+)\.(\w+)"
)


class BufferName(NamedTuple):
    """Optimizer, model-parallel rank, number of the buffer, dtype of the weights."""

    optimizer: int
    group: int
    buffer: int
    dtype: str


@dataclass
class Buffer:
    """The buckets of a buffer, one behind the other.

    Attributes:
        sizes: of the buckets, without padding at their ends.
        states: name -> runs of elements.
    """

    sizes: dict[int, int] = field(default_factory=dict)
    chunks: dict[str, list[tuple[int, Piece]]] = field(default_factory=dict)

    def buckets(self) -> list[int]:
        return [self.sizes[number] for number in sorted(self.sizes)]

    def runs(self, state: str) -> list[Run]:
        """Of a state; what a rank saved beyond the end of a bucket is padding."""
        starts, start = {}, 0
        for number in sorted(self.sizes):
            starts[number] = start
            start += self.sizes[number]
        found = []
        for number, piece in self.chunks[state]:
            low, end = piece.box.offset[0], self.sizes[number]
            if low < end:
                run = run_of(piece, starts[number] + low)
                found.append(run.cut(run.start, min(run.end, starts[number] + end)))
        return found


def is_bucket(key: str) -> bool:
    """Whether this is the name of a bucket."""
    return _KEY.fullmatch(key) is not None


def find_buffers(
    tensors: Mapping[str, tuple[tuple[int, ...], Sequence[Piece]]],
) -> dict[BufferName, Buffer]:
    """The buffers of all ranks, in order.

    Args:
        tensors: key -> shape and pieces.
    """
    found: dict[BufferName, Buffer] = {}
    for key, (shape, pieces) in tensors.items():
        match = _KEY.fullmatch(key)
        if match:
            name = BufferName(int(match[1] or 0), int(match[2]), int(match[3]), match[4])
            buffer = found.setdefault(name, Buffer())
            bucket = int(match[5])
            buffer.sizes[bucket] = shape[0]
            buffer.chunks.setdefault(match[6], []).extend((bucket, piece) for piece in pieces)
    return dict(sorted(found.items()))


class Located(NamedTuple):
    """A parameter and the element of the buffer that it begins at; how many compared ones contradict."""

    parameter: Local
    start: int
    differing: int
    compared: int


def find_parameters(
    model: Model, rank: Rank, buffer: Buffer, dtype: str, *, likely: Chunk, files: Files
) -> list[Located]:
    """The parameters of a buffer; empty where no chunk of the model, in no order, has its sizes and values.

    Args:
        dtype: of the weights.
        likely: the chunk that it should be.
    """
    masters = Runs(files, buffer.runs(MASTER), sum(buffer.buckets()))
    best: list[Located] = []
    for chunk in _chunks(model, rank, likely, masters.numel, dtype):
        for order in orders(model):
            parameters = _of(model, rank, chunk, order, dtype)
            starts = _walk([each.numel for each in reversed(parameters)], buffer.buckets())
            if starts is None:
                continue
            found = _confirm(parameters[::-1], starts, masters, files)
            if found and (not best or _contradicting(found) < _contradicting(best)):
                best = found
            if found and not _contradicting(found):
                return found
    return best or _with_gaps(_of(model, rank, likely, next(orders(model)), dtype), masters, buffer, files)


def _of(model: Model, rank: Rank, chunk: Chunk, order: Order, dtype: str) -> list[Local]:
    return [each for each in registered(model, rank, chunk, order) if each.dtype == dtype]


def _contradicting(found: Sequence[Located]) -> int:
    return sum(each.differing for each in found)


def _chunks(model: Model, rank: Rank, likely: Chunk, numel: int, dtype: str) -> Iterator[Chunk]:
    """Every chunk that could have as many elements, alignment included; the likely one first."""
    yield likely
    order = next(orders(model))
    layers = [_measure(_of(model, rank, Chunk(layer, 1, False, False), order, dtype))
              for layer in range(model.num_layers)]
    for begins, ends in itertools.product((False, True), repeat=2):
        around = _measure(_of(model, rank, Chunk(0, 0, begins, ends), order, dtype))
        for first in range(1 if begins else model.num_layers + 1):
            elements, parameters = around
            for count in range(model.num_layers - first + 1):
                if count:
                    elements += layers[first + count - 1][0]
                    parameters += layers[first + count - 1][1]
                chunk = Chunk(first, count, begins, ends)
                if chunk != likely and 0 <= numel - elements < ALIGNMENT * parameters:
                    yield chunk


def _measure(parameters: Sequence[Local]) -> tuple[int, int]:
    """Their elements, and how many they are."""
    return sum(each.numel for each in parameters), len(parameters)


def _walk(numels: Sequence[int], buckets: Sequence[int]) -> list[int] | None:
    """Where parameters begin that fill the buckets exactly; None where they do not."""
    starts: list[int] = []
    base, position, left = 0, 0, list(buckets)
    for numel in numels:
        start = position + -position % ALIGNMENT
        if left and start + numel > left[0]:
            if not 0 <= left[0] - position < ALIGNMENT:
                return None
            base += left.pop(0)
            start = 0
        if not left or start + numel > left[0]:
            return None
        starts.append(base + start)
        position = start + numel
    filled = len(left) == 1 and 0 <= left[0] - position < ALIGNMENT
    return starts if filled else None


def _confirm(
    parameters: Sequence[Local], starts: Sequence[int], masters: Runs, files: Files
) -> list[Located]:
    """Empty if some parameter is another one's values in most of its elements."""
    found = []
    for parameter, start in zip(parameters, starts, strict=True):
        wrong, compared = differing(parameter.weight(files), masters, start)
        if 2 * wrong > compared:
            return []
        found.append(Located(parameter, start, wrong, compared))
    return found


def _with_gaps(
    parameters: Sequence[Local], masters: Runs, buffer: Buffer, files: Files
) -> list[Located]:
    """The same with parameters missing, which are frozen."""
    bounds = [0]
    for size in buffer.buckets()[:-1]:
        bounds.append(bounds[-1] + size)
    weights = [each.weight(files) for each in parameters]
    found = locate(weights, masters, bounds)
    return [
        Located(parameters[number], start, *differing(weights[number], masters, start))
        for number, start in found.starts.items()
    ]
