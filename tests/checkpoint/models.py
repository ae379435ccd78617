"""Small models as logical tensors, and the slices of them that each rank of some layout holds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from checkpoint.folder import mark_complete, step_name
from checkpoint.manifest import MANIFEST, Manifest
from checkpoint.merge import merge
from checkpoint.write import share_out, write_rank_file
from parallel.slices import TensorSlice, flat_range_boxes

Key = tuple[str, str]

SHAPES = {
    "model.embed_tokens.weight": (50, 24),  # split by rows
    "model.layers.0.self_attn.q_proj.weight": (24, 24),  # rows
    "model.layers.0.self_attn.o_proj.weight": (24, 24),  # columns
    "model.layers.0.mlp.down_proj.weight": (24, 36),  # columns
    "model.layers.0.input_layernorm.weight": (24,),  # replicated
    "model.layers.1.self_attn.q_proj.weight": (24, 24),
    "model.layers.1.mlp.down_proj.weight": (24, 36),
    "model.layers.1.mlp.experts.weight": (3, 10, 14),  # three axes, replicated over tensor ranks
    "model.norm.weight": (24,),
}


@dataclass(frozen=True)
class Grid:
    """tensor x pipeline x data ranks, tensor fastest; with `zero`, data ranks share out the optimizer."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: bool = True
    dtype: torch.dtype = torch.bfloat16

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def rank(self, t: int, p: int, d: int) -> int:
        return t + self.tensor * (p + self.pipeline * d)

    def as_json(self) -> dict[str, object]:
        return {"tensor": self.tensor, "pipeline": self.pipeline, "data": self.data, "zero": self.zero}


def make_tensors(
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType(SHAPES),
) -> dict[Key, torch.Tensor]:
    """Whole tensors of all states, as one rank in training precision `dtype` would have them."""
    tensors = {}
    states = ["exp_avg", "exp_avg_sq"] + (["master"] if dtype != torch.float32 else [])
    for name, shape in shapes.items():
        for state in [*states, "weight"]:
            key = hashlib.sha256(f"{seed}{name}{state}".encode()).digest()[:6]
            generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
            drawn = torch.randn(shape, generator=generator)
            tensors[name, state] = drawn.square() if state == "exp_avg_sq" else drawn
        if dtype != torch.float32:
            tensors[name, "weight"] = tensors[name, "master"].to(dtype)
    return tensors


def cut(whole: torch.Tensor, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
    """The box as a new 1-D tensor."""
    return whole[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].reshape(-1).clone()


def slices_of(tensors: dict[Key, torch.Tensor], grid: Grid, rank: int) -> list[TensorSlice]:
    """What `rank` holds, with the values of `tensors`."""
    t, model_parallel = rank % grid.tensor, grid.tensor * grid.pipeline
    p, d = rank % model_parallel // grid.tensor, rank // model_parallel
    slices = []
    for (name, state), whole in tensors.items():
        stage = 0 if grid.pipeline == 1 or "layers.0" in name or "embed" in name else grid.pipeline - 1
        if stage != p:
            continue
        offset, size, split = _tensor_parallel_box(name, tuple(whole.shape), grid.tensor, t)
        tensor_ranks = [t] if split else range(grid.tensor)
        if state == "weight" or not grid.zero:
            holders = tuple(sorted(grid.rank(u, p, e) for u in tensor_ranks for e in range(grid.data)))
            slices.append(
                TensorSlice(
                    name, state, tuple(whole.shape), offset, size, cut(whole, offset, size), replicas=holders
                )
            )
            continue
        holders = tuple(grid.rank(u, p, d) for u in tensor_ranks)
        share = -(-math.prod(size) // grid.data)
        for inner, extent in flat_range_boxes(size, d * share, min((d + 1) * share, math.prod(size))):
            at = tuple(o + i for o, i in zip(offset, inner, strict=True))
            slices.append(
                TensorSlice(
                    name, state, tuple(whole.shape), at, extent, cut(whole, at, extent), replicas=holders
                )
            )
    return slices


def empty_slices(tensors: dict[Key, torch.Tensor], grid: Grid, rank: int) -> list[TensorSlice]:
    """The same, with other values: all 7."""
    slices = slices_of(tensors, grid, rank)
    for piece in slices:
        piece.data.fill_(7)
    return slices


def assert_equal(actual: list[TensorSlice], expected: list[TensorSlice]) -> None:
    """Same boxes, same bits."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a.name, a.state, a.offset, a.size) == (b.name, b.state, b.offset, b.size)
        assert a.data.dtype == b.data.dtype
        assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)), (a.name, a.state, a.offset)


def _tensor_parallel_box(
    name: str, shape: tuple[int, ...], tensor: int, t: int
) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    axis = 1 if "o_proj" in name or "down_proj" in name else 0
    if tensor == 1 or "norm" in name or "experts" in name:
        return (0,) * len(shape), shape, tensor == 1
    share = -(-shape[axis] // tensor)  # the vocabulary is not divisible: the last rank has less
    first, last = min(t * share, shape[axis]), min((t + 1) * share, shape[axis])
    offset = tuple(first if a == axis else 0 for a in range(len(shape)))
    return offset, tuple(last - first if a == axis else n for a, n in enumerate(shape)), True


def save_all_ranks(
    folder: Path, tensors: dict[Key, torch.Tensor], grid: Grid, step: int = 100
) -> tuple[Path, Manifest]:
    """A complete checkpoint as the ranks of `grid` would save it, written by this one process."""
    path = folder / step_name(step)
    path.mkdir(parents=True)
    parts = []
    for rank in range(grid.world_size):
        mine = share_out(slices_of(tensors, grid, rank), rank)
        file = path / f"rank-{rank:05d}.safetensors"
        options = {"rank": rank, "step": step, "world_size": grid.world_size}
        parts.append(write_rank_file(file, mine, {"rng": bytes([rank])}, **options).manifest.to_json())
    joined, blobs = merge(parts)
    manifest = Manifest(step, grid.world_size, tuple(joined), {"layout": grid.as_json()}, blobs)
    rewrite(path, manifest)
    return path, manifest


def rewrite(path: Path, manifest: Manifest) -> None:
    """Put this manifest into the checkpoint and mark it complete."""
    (path / MANIFEST).write_bytes(manifest.to_json())
    mark_complete(path, manifest.step, "test", run="test")
