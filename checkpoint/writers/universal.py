"""Ratoon universal: whole tensors in safetensors shards under logical names, every state included.

model-00001-of-00002.safetensors and model.safetensors.index.json are the weights, as Hugging Face has them;
optimizer-exp_avg-00001-of-00002.safetensors and so on every other state, as "NAME@STATE"; manifest.json and
COMPLETE make the folder a checkpoint of Ratoon's own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from urllib.parse import quote

import xxhash

from checkpoint.boxes import Box
from checkpoint.convert.files import FOREIGN_FILES, Stamps
from checkpoint.convert.output import Hashes, OutputFile, WritePlan
from checkpoint.folder import COMPLETE
from checkpoint.manifest import MANIFEST, LogicalTensor, Manifest, Piece
from checkpoint.opening import Opened
from checkpoint.source import plain_part
from checkpoint.writers.carry import carried_files, configure
from checkpoint.writers.options import WriteOptions
from checkpoint.writers.shards import Whole, index, shards

WEIGHT = "weight"


def plan(opened: Opened, options: WriteOptions) -> WritePlan:
    """What a universal folder of the checkpoint consists of. It can hold everything but ranks' own bytes.

    Raises:
        ValueError: a dtype is asked for that weights are not written in.
    """
    written = WritePlan("Ratoon universal", carried=carried_files(opened, options.carry))
    written.lost = rounded_away(opened, options.dtype)
    kinds = Counter(tensor_dtype(t, options.dtype) for t in opened.manifest.tensors if t.state == WEIGHT)
    if kinds:
        configure(written, opened, kinds.most_common(1)[0][0])
    by_state: dict[str, list[Whole]] = {}
    for tensor in in_source_order(opened.manifest.tensors):
        dtype = tensor_dtype(tensor, options.dtype)
        key = tensor.name if tensor.state == WEIGHT else f"{tensor.name}@{tensor.state}"
        part = plain_part(tensor.name, tensor.shape)
        by_state.setdefault(tensor.state, []).append(Whole(key, dtype, tensor.shape, tensor.state, (part,)))
    for state, wholes in by_state.items():
        stem = "model" if state == WEIGHT else f"optimizer-{quote(state, safe='')}"
        files = shards(stem, wholes, options.shard_bytes)
        written.files += files
        if state == WEIGHT and len(files) > 1:
            written.small["model.safetensors.index.json"] = index(files)
    if opened.manifest.rank_blobs:
        names = sorted({blob.name for blob in opened.manifest.rank_blobs})
        written.notes.append(f"not taken along, since they belong to one layout: {', '.join(names)}")
    written.last = lambda hashes: _manifest(opened, written.files, hashes)
    return written


def tensor_dtype(tensor: LogicalTensor, weights: str | None = None) -> str:
    """What its numbers are kept in; a mean is taken in fp32.

    Args:
        weights: what weights are asked for in.
    """
    if weights is not None and tensor.state == WEIGHT:
        return weights
    return "float32" if tensor.average else tensor.dtype


def in_source_order(tensors: Iterable[LogicalTensor]) -> list[LogicalTensor]:
    """As their bytes lie in the source, so that writing one after the other reads it forwards."""
    return sorted(tensors, key=lambda tensor: (tensor.pieces[0].file, tensor.pieces[0].start))


def rounded_away(opened: Opened, weights: str | None) -> list[str]:
    """A line where weights lose precision that no master keeps."""
    if weights not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {weights}: weights are written as float32, bfloat16 or float16")
    masters = {tensor.name for tensor in opened.manifest.tensors if tensor.state == "master"}
    names = [
        tensor.name
        for tensor in opened.manifest.tensors
        if tensor.state == WEIGHT
        and tensor.name not in masters
        and tensor_dtype(tensor, weights) not in (tensor_dtype(tensor), "float32")
    ]
    if not names:
        return []
    return [f"precision of {len(names)} weights that have no fp32 master: they are rounded to {weights}"]


def complete(
    opened: Opened, tensors: Iterable[LogicalTensor], *, files: Stamps | None = None
) -> dict[str, bytes]:
    """The manifest of such a folder, and the marker that makes it count.

    Among a run's checkpoints it is never the newest, and retention lets it be: it names no run.

    Args:
        files: that do not belong to the folder, and have to stay what they are.
    """
    state = {
        **opened.manifest.state,
        "format": opened.manifest.state.get("format", opened.format),
        "converted_from": str(opened.folder),
        "left_out": list(opened.left_out),
    }
    state.pop("layout", None)  # whole tensors have none
    state.pop(FOREIGN_FILES, None)
    if files is not None:
        state[FOREIGN_FILES] = dict(files)
    text = Manifest(opened.manifest.step, 1, tuple(tensors), state).to_json()
    digest = xxhash.xxh3_64_hexdigest(text)
    marker = {"step": opened.manifest.step, "sequence": 0, "save": digest, "manifest": digest, "run": ""}
    return {MANIFEST: text, COMPLETE: json.dumps(marker).encode()}


def _manifest(opened: Opened, files: Iterable[OutputFile], hashes: Hashes) -> dict[str, bytes]:
    by_key = opened.manifest.by_key()
    tensors = []
    for file in files:
        for region in file.regions:
            tensor = by_key[region.parts[0].name, region.state]
            box = Box((0,) * len(region.shape), region.shape)
            piece = Piece(file.path, region.start, region.dtype, box, hashes[file.path][region.key])
            tensors.append(replace(tensor, dtype=region.dtype, pieces=(piece,), replicas=(), average=False))
    return complete(opened, sorted(tensors, key=lambda tensor: (tensor.name, tensor.state)))
