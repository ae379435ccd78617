"""From stored pieces and the parts they stand for to logical tensors."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.assembly.assemble import from_placed
from checkpoint.assembly.compose import compose_all
from checkpoint.boxes import Box, cover_fault
from checkpoint.language.place import Placed
from checkpoint.manifest import LogicalTensor, Piece
from checkpoint.plan import row_major
from checkpoint.source import ParameterGroup, Part, Source, SourceTensor, plain_part

Array = npt.NDArray[np.int32]


@dataclass
class Case:
    """A stored tensor in pieces, in one file's bytes, and one part of it."""

    stored: Array
    content: Array
    pieces: list[Piece]
    part: Part


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_axes = draw(st.integers(0, 3))
    size = tuple(draw(st.integers(1, 6)) for _ in range(num_axes))
    stored_axes = num_axes + draw(st.integers(0, 2))
    axes = tuple(draw(st.permutations(range(stored_axes)))[:num_axes])
    start = tuple(draw(st.integers(0, 3)) for _ in range(stored_axes))
    steps = tuple(draw(st.integers(1, 3)) for _ in range(stored_axes))
    extent = [1] * stored_axes
    for axis, count in zip(axes, size, strict=True):
        extent[axis] = 1 + (count - 1) * steps[axis]
    shape = tuple(s + e + draw(st.integers(0, 2)) for s, e in zip(start, extent, strict=True))
    offset = tuple(draw(st.integers(0, 3)) for _ in range(num_axes))
    whole = tuple(o + s + draw(st.integers(0, 2)) for o, s in zip(offset, size, strict=True))
    stored = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
    content, pieces = draw(written(stored))
    return Case(stored, content, pieces, Part("a", whole, Box(offset, size), start, axes, steps))


@st.composite
def written(draw: st.DrawFn, stored: Array) -> tuple[Array, list[Piece]]:
    """The tensor cut into a grid of boxes, each in the order of any permutation of its axes, with gaps."""
    cuts = []
    for extent in stored.shape:
        inner = draw(st.sets(st.integers(1, extent - 1), max_size=2)) if extent > 1 else set()
        cuts.append(list(itertools.pairwise([0, *sorted(inner), extent])))
    runs: list[Array] = []
    pieces: list[Piece] = []
    at = 0
    for ranges in itertools.product(*cuts):
        box = Box(tuple(low for low, _ in ranges), tuple(high - low for low, high in ranges))
        order = draw(st.permutations(range(stored.ndim)))
        block = stored[tuple(slice(low, high) for low, high in ranges)].transpose(order)
        strides = [0] * stored.ndim
        for axis, stride in zip(order, row_major(block.shape), strict=True):
            strides[axis] = stride
        gap = draw(st.integers(0, 2))
        digest = f"{len(pieces):016x}"
        pieces.append(Piece("file", 4 * (at + gap), "int32", box, digest, tuple(strides)))
        runs += [np.full(gap, -1, np.int32), block.reshape(-1)]
        at += gap + block.size
    return np.concatenate(runs), pieces


def read_piece(content: Array, piece: Piece) -> Array:
    strides = row_major(piece.box.size) if piece.strides is None else piece.strides
    assert piece.start + piece.num_bytes <= content.nbytes
    run = content[piece.start // 4 :]
    return np.lib.stride_tricks.as_strided(run, piece.box.size, [4 * stride for stride in strides])


@settings(max_examples=300, deadline=None)
@given(cases())
def test_composed_pieces_hold_what_indexing_the_stored_tensor_gives(case: Case) -> None:
    part = case.part
    index: list[int | slice] = list(part.start)
    for extent, axis in zip(part.box.size, part.axes, strict=True):
        step, first = part.steps[axis], part.start[axis]
        index[axis] = slice(first, first + (extent - 1) * step + 1, step)
    in_stored_order = sorted(range(len(part.axes)), key=lambda i: part.axes[i])
    expected = case.stored[tuple(index)].transpose(np.argsort(in_stored_order) if part.axes else ())
    ((_, found),) = compose_all(case.pieces, [part])
    logical = np.full(part.shape, -1, np.int32)
    for piece in found:
        box = tuple(slice(o, o + s) for o, s in zip(piece.box.offset, piece.box.size, strict=True))
        logical[box] = read_piece(case.content, piece)
    inside = tuple(slice(o, o + s) for o, s in zip(part.box.offset, part.box.size, strict=True))
    np.testing.assert_array_equal(logical[inside], expected)
    shifted = [
        Box(tuple(o - p for o, p in zip(q.box.offset, part.box.offset, strict=True)), q.box.size)
        for q in found
    ]
    assert cover_fault(part.box.size, shifted) is None


@settings(max_examples=100, deadline=None)
@given(cases())
def test_only_a_piece_that_is_all_there_keeps_its_hash(case: Case) -> None:
    ((_, found),) = compose_all(case.pieces, [case.part])
    by_hash = {piece.hash: piece for piece in case.pieces}
    for piece in found:
        if piece.hash is not None:
            whole = by_hash[piece.hash]
            assert (piece.start, piece.num_bytes) == (whole.start, whole.num_bytes)
        else:
            assert all(
                piece.box.numel < other.box.numel for other in case.pieces if piece.start == other.start
            )


def held(name: str, shape: tuple[int, ...], *pieces: Piece, state: str = "weight", **at: int) -> SourceTensor:
    return SourceTensor(name, state, shape, pieces, at)


def rows(file: str, first: int, count: int, width: int = 4) -> Piece:
    return Piece(file, 0, "float32", Box((first, 0), (count, width)))


def placed(tensor: SourceTensor, name: str, role: str = "primary", part: Part | None = None) -> Placed:
    return Placed(tensor, (part or plain_part(name, tensor.shape),), role)  # type: ignore[arg-type]


def one(*entries: Placed) -> LogicalTensor:
    (tensor,) = from_placed(Source("x", Path("/x")), entries, facts={}).tensors
    return tensor


def test_ranges_of_data_ranks_are_parts_of_one_tensor() -> None:
    tensor = one(
        placed(held("w", (8, 4), rows("d1", 3, 5), data=1), "a"),
        placed(held("w", (8, 4), rows("d0", 0, 3), data=0), "a"),
    )
    assert [piece.file for piece in tensor.pieces] == ["d0", "d1"]
    assert tensor.replicas == ()


def test_what_all_data_ranks_hold_is_held_once_and_its_replicas_stand_beside() -> None:
    tensor = one(*(placed(held("w", (8, 4), rows(f"d{n}", 0, 8), data=n), "a") for n in range(3)))
    assert [piece.file for piece in tensor.pieces] == ["d0"]
    assert [[piece.file for piece in replica] for replica in tensor.replicas] == [["d1"], ["d2"]]


def shard(rank: int) -> Part:
    return Part("a", (8, 4), Box((4 * rank, 0), (4, 4)), (0, 0), (0, 1), (1, 1))


def test_shards_of_a_copy_in_another_stage_are_one_replica() -> None:
    entries = [
        placed(
            held("w", (4, 4), rows(f"p{stage}t{rank}", 0, 4), pipeline=stage, tensor=rank),
            "a",
            "replica" if stage else "primary",
            shard(rank),
        )
        for stage, rank in itertools.product(range(2), range(2))
    ]
    tensor = one(*entries)
    assert [piece.file for piece in tensor.pieces] == ["p0t0", "p0t1"]
    assert [[piece.file for piece in replica] for replica in tensor.replicas] == [["p1t0", "p1t1"]]


def test_copies_to_average_are_the_pieces_and_the_replicas() -> None:
    tensor = one(*(placed(held("w", (8, 4), rows(f"t{n}", 0, 8), tensor=n), "a", "average") for n in (0, 1)))
    assert tensor.average
    assert ([p.file for p in tensor.pieces], [p.file for p in tensor.replicas[0]]) == (["t0"], ["t1"])


def test_what_a_rank_holds_twice_overlaps() -> None:
    tensor = one(placed(held("w", (8, 4), rows("x", 0, 8), rows("y", 0, 8), data=0), "a"))
    assert cover_fault(tensor.shape, [piece.box for piece in tensor.pieces]) is not None


def test_a_tensor_without_a_piece_is_a_gap_and_not_forgotten() -> None:
    tensor = one(placed(held("w", (8, 4)), "a"))
    assert cover_fault(tensor.shape, [piece.box for piece in tensor.pieces]) is not None


def test_ranks_that_disagree_about_a_shape_are_refused() -> None:
    entries = [
        placed(held("w", (8, 4), rows("x", 0, 8), tensor=0), "a"),
        placed(held("v", (9, 4), rows("y", 0, 9), tensor=1), "a"),
    ]
    with pytest.raises(ValueError, match=r"a \(weight\): \[8, 4\] on one rank, \[9, 4\] on another, by v at"):
        one(*entries)


def fused() -> tuple[Source, list[Placed]]:
    """A qkv of rows 0 to 3 (q), 4 (k), 5 (v), and a norm."""
    source = Source("x", Path("/x"), step=9)
    source.groups = [
        ParameterGroup(("qkv",), {"weight_decay": 0.1, "lr": 0.5}),
        ParameterGroup(("norm",), {"weight_decay": 0.0, "lr": 0.25}),
        ParameterGroup(("norm", "qkv"), {"weight_decay": 0.0, "lr": 0.25}),
    ]
    qkv, norm = held("qkv", (6, 4), rows("f", 0, 6)), held("norm", (2, 4), rows("g", 0, 2))
    parts = tuple(
        Part(name, (count, 4), Box((0, 0), (count, 4)), (first, 0), (0, 1), (1, 1))
        for name, first, count in (("q", 0, 4), ("k", 4, 1), ("v", 5, 1))
    )
    return source, [Placed(qkv, parts, "primary"), placed(norm, "n")]


def test_a_fused_parameter_names_all_its_parts_in_its_group_and_like_groups_are_one() -> None:
    source, entries = fused()
    state = from_placed(source, entries, facts={"num_layers": 3}).state
    assert state["groups"] == [
        {"names": ["q", "k", "v"], "weight_decay": 0.1, "lr": 0.5},
        {"names": ["n", "q", "k", "v"], "weight_decay": 0.0, "lr": 0.25},
    ]
    assert state["scalars"] == {"updates": 9, "lr": 0.5}
    assert state["facts"] == {"num_layers": 3}


def test_steps_that_agree_are_one_number() -> None:
    source, entries = fused()
    source.scalars = {"step": {"qkv": 7.0, "norm": 7}, "beta_product": {"norm": 0.5}}
    state = from_placed(source, entries, facts={}).state
    assert state["scalars"]["updates"] == 7
    assert state["per_parameter"] == {"beta_product": {"n": 0.5}}


def test_steps_that_differ_are_kept_for_each_parameter() -> None:
    source, entries = fused()
    source.scalars = {"step": {"qkv": 7, "norm": 6, "ghost": 5}}
    state = from_placed(source, entries, facts={}).state
    assert "updates" not in state["scalars"]
    assert state["per_parameter"] == {"step": {"q": 7, "k": 7, "v": 7, "n": 6}}
    assert state["left_out"] == ["per-parameter step names what no tensor is called: ghost"]


def test_a_state_of_another_shape_is_carried_whole_where_one_rank_held_the_parameter() -> None:
    source, entries = fused()
    scales = Piece("s", 0, "float32", Box((0,), (3,)))
    odd = [held(name, (3,), scales, state="absmax") for name in ("qkv", "norm")]
    manifest = from_placed(source, [*entries, *(Placed(tensor, (), "primary") for tensor in odd)], facts={})
    assert manifest.by_key()["n", "absmax"] == LogicalTensor("n", "absmax", (3,), "float32", (scales,))
    (line,) = manifest.state["left_out"]
    assert line.startswith("qkv (absmax): its shape [3] is not the parameter's [6, 4]")


def test_fifty_thousand_pieces_take_about_a_second() -> None:
    """800 fused matrices on 4 tensor ranks in 16 flat ranges: 51200 stored pieces, on a slow machine."""
    entries = []
    for number, rank in itertools.product(range(800), range(4)):
        parts = tuple(
            Part(f"{number}.{name}", (256, 64), Box((64 * rank, 0), (64, 64)), (at, 0), (0, 1), (1, 1))
            for name, at in (("gate", 0), ("up", 64))
        )
        for data in range(16):
            tensor = held(f"fc{number}", (128, 64), rows(f"{rank}", 8 * data, 8, 64), tensor=rank, data=data)
            entries.append(Placed(tensor, parts, "primary"))
    begin = time.process_time()
    manifest = from_placed(Source("x", Path("/x")), entries, facts={})
    seconds = time.process_time() - begin
    assert sum(len(tensor.pieces) for tensor in manifest.tensors) == 51200
    assert seconds < 5
