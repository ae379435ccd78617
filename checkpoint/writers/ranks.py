"""Ratoon's own format cut as a layout holds it: a file for every model-parallel rank, read from end to end.

A run needs no such thing, since every rank finds its boxes in any checkpoint. It pays where many ranks start
again and again from one checkpoint on a file system that dislikes small reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from checkpoint.boxes import Box
from checkpoint.convert.output import Hashes, OutputFile, WritePlan
from checkpoint.manifest import LogicalTensor, Piece
from checkpoint.opening import Opened
from checkpoint.source import Part
from checkpoint.writers.options import WriteOptions
from checkpoint.writers.shards import Whole, shard
from checkpoint.writers.universal import complete, rounded_away, tensor_dtype

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_COLUMNS = re.compile(r".*\.(o_proj|down_proj)\.weight")
_WHOLE = re.compile(r".*(norm\.(weight|bias)|\.mlp\.gate\.weight|(o_proj|down_proj)\.bias)")
_LAST = re.compile(r"(model\.norm|lm_head)\.")

_Boxes = dict[tuple[str, str], tuple[LogicalTensor, Box]]
"""(file, key) -> what lies there"""


@dataclass(frozen=True)
class Cut:
    """The degrees by which tensors are dealt out to files."""

    tensor: int
    pipeline: int
    expert: int
    num_layers: int
    num_experts: int

    def files(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, Box]]:
        """(number of the model-parallel rank, what it holds) for one parameter."""
        stage, expert = self._stage(name), _EXPERT.search(name)
        group = int(expert[1]) * self.expert // self.num_experts if expert else 0
        first = (stage * self.expert + group) * self.tensor
        zeros = (0,) * len(shape)
        if not shape or _WHOLE.fullmatch(name):
            yield first, Box(zeros, shape)
            return
        axis = 1 if _COLUMNS.fullmatch(name) and len(shape) > 1 else 0
        width = -(-shape[axis] // self.tensor)  # the last rank of a vocabulary has the padding
        for rank in range(self.tensor):
            start, end = min(rank * width, shape[axis]), min((rank + 1) * width, shape[axis])
            if start < end:
                offset = tuple(start if a == axis else 0 for a in range(len(shape)))
                size = tuple(end - start if a == axis else s for a, s in enumerate(shape))
                yield first + rank, Box(offset, size)

    def _stage(self, name: str) -> int:
        if layer := _LAYER.match(name):
            return int(layer[1]) * self.pipeline // self.num_layers
        return self.pipeline - 1 if _LAST.match(name) else 0


def plan(opened: Opened, options: WriteOptions) -> WritePlan:
    """A file for each model-parallel rank of `options.layout`.

    Raises:
        ValueError: the layout does not divide the model's layers or experts, or weights are not written in
            the dtype that is asked for.
    """
    cut = _cut(opened, options.layout)
    tensors: dict[int, list[Whole]] = {}
    boxes: _Boxes = {}
    for tensor in opened.manifest.tensors:
        for rank, box in cut.files(tensor.name, tensor.shape):
            key = f"{tensor.name}:{tensor.state}[{','.join(map(str, box.offset))}]"
            axes = range(len(box.size))
            part = Part(tensor.name, tensor.shape, box, (0,) * len(axes), tuple(axes), (1,) * len(axes))
            whole = Whole(key, tensor_dtype(tensor, options.dtype), box.size, tensor.state, (part,))
            tensors.setdefault(rank, []).append(whole)
            boxes[f"rank-{rank:05d}.safetensors", key] = (tensor, box)
    written = WritePlan("Ratoon, cut by a layout", lost=rounded_away(opened, options.dtype))
    written.files = [shard(f"rank-{rank:05d}.safetensors", held) for rank, held in sorted(tensors.items())]
    if opened.manifest.rank_blobs:
        written.notes.append("the ranks' random states do not go along: they belong to the layout that saved")
    written.last = lambda hashes: _manifest(opened, written.files, boxes, hashes)
    return written


def _cut(opened: Opened, layout: Mapping[str, int]) -> Cut:
    names = [tensor.name for tensor in opened.manifest.tensors]
    layers = 1 + max((int(m[1]) for name in names if (m := _LAYER.match(name))), default=0)
    experts = 1 + max((int(m[1]) for name in names if (m := _EXPERT.search(name))), default=0)
    cut = Cut(layout.get("tensor", 1), layout.get("pipeline", 1), layout.get("expert", 1), layers, experts)
    problems = []
    if layers % cut.pipeline:
        problems.append(f"{layers} layers do not divide over pipeline = {cut.pipeline}")
    if experts % cut.expert:
        problems.append(f"{experts} experts do not divide over expert = {cut.expert}")
    if problems:
        raise ValueError(f"{opened.folder} cannot be cut that way: {'; '.join(problems)}")
    return cut


def _manifest(
    opened: Opened,
    files: list[OutputFile],
    boxes: _Boxes,
    hashes: Hashes,
) -> dict[str, bytes]:
    pieces: dict[tuple[str, str], list[Piece]] = {}
    for file in files:
        for region in file.regions:
            tensor, box = boxes[file.path, region.key]
            piece = Piece(file.path, region.start, region.dtype, box, hashes[file.path][region.key])
            pieces.setdefault((tensor.name, tensor.state), []).append(piece)
    by_key = opened.manifest.by_key()
    tensors = [
        replace(by_key[key], dtype=held[0].dtype, pieces=tuple(held), replicas=(), average=False)
        for key, held in sorted(pieces.items())
    ]
    return complete(opened, tensors)
