"""Saved on one layout, loaded on another: the same bits, and no byte more than needed."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoint.boxes import Box
from checkpoint.load import LoadedState, load
from checkpoint.manifest import LogicalTensor, Piece
from checkpoint.plan import plan
from checkpoint.read import read_copies
from checkpoint.save import Saver
from parallel.slices import TensorSlice
from tests.checkpoint.models import (
    Grid,
    assert_equal,
    empty_slices,
    make_tensors,
    save_all_ranks,
    slices_of,
)
from tests.ranks import run_ranks

LAYOUTS = [Grid(2, 1, 2), Grid(1, 2, 2), Grid(2, 2, 1), Grid(1, 1, 3), Grid(3, 1, 1), Grid(1, 1, 2, False)]


def save_on(folder: str, grid: Grid) -> None:
    rank = dist.get_rank()
    saver = Saver(folder, rank=rank, world_size=grid.world_size)
    state = {"layout": grid.as_json(), "data": {"position": 17}}
    saver.save(100, slices_of(make_tensors(0), grid, rank), state, {"rng": bytes([rank] * 9)})
    saver.close()


def load_on(folder: str, grids: Sequence[Grid]) -> list[LoadedState]:
    """Load on each of several layouts of as many ranks."""
    rank = dist.get_rank()
    found = []
    for grid in grids:
        slices = empty_slices(make_tensors(0), grid, rank)
        found.append(load(folder, slices, rank=rank, layout=grid.as_json(), verify="full"))
        assert_equal(slices, slices_of(make_tensors(0), grid, rank))
    return found


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_ranks_save_on_one_layout_and_load_on_every_other(source: Grid, tmp_path: Path) -> None:
    run_ranks(save_on, source.world_size, str(tmp_path), source)
    for world_size in sorted({grid.world_size for grid in LAYOUTS}):
        grids = [grid for grid in LAYOUTS if grid.world_size == world_size]
        for rank, states in enumerate(run_ranks(load_on, world_size, str(tmp_path), grids)):
            for grid, state in zip(grids, states, strict=True):
                assert state.step == 100
                assert state.state["data"] == {"position": 17}
                assert state.same_layout == (grid == source)
                assert state.rank_state == ({"rng": bytes([rank] * 9)} if grid == source else {})


def random_shapes(rng: random.Random) -> dict[str, tuple[int, ...]]:
    names = ["embed", "q_proj", "o_proj.0", "down_proj.1", "norm", "experts", "o_proj.2"]
    return {
        name: tuple(rng.randint(1, 40) for _ in range(3 if name == "experts" else 1 if name == "norm" else 2))
        for name in names
    }


@pytest.mark.parametrize("seed", range(12))
def test_random_tensors_between_random_layouts(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    tensors = make_tensors(seed, shapes=random_shapes(rng))
    source = Grid(rng.randint(1, 4), 1, rng.randint(1, 5), rng.random() < 0.7)
    target = Grid(rng.randint(1, 4), 1, rng.randint(1, 5), rng.random() < 0.7)
    path, _ = save_all_ranks(tmp_path, tensors, source)
    for rank in range(target.world_size):
        slices = empty_slices(tensors, target, rank)
        load(path, slices)
        assert_equal(slices, slices_of(tensors, target, rank))


@pytest.mark.parametrize(
    "target", [Grid(4, 1, 2), Grid(1, 1, 1), Grid(1, 1, 5), Grid(1, 1, 2, False)], ids=str
)
def test_bytes_read_are_the_bytes_needed(
    target: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever pieces lie row after row in the file; counted at the system call."""
    tensors = make_tensors(0)
    columns = [name for name, _ in tensors if "o_proj" in name or "down_proj" in name]
    tensors = {key: whole for key, whole in tensors.items() if key[0] not in columns}
    path, _ = save_all_ranks(tmp_path, tensors, Grid(2, 1, 2))
    counted = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: Sequence[memoryview], at: int) -> int:
        counted.append(preadv(descriptor, buffers, at))
        return counted[-1]

    monkeypatch.setattr(os, "preadv", counting)
    slices = empty_slices(tensors, target, 0)
    state = load(path, slices)
    needed = sum(piece.data.nbytes for piece in slices)
    assert (sum(counted), state.bytes_read, state.bytes_needed) == (needed, needed, needed)


def test_long_column_runs_are_read_one_by_one(tmp_path: Path) -> None:
    """Rows of 128 KiB, of which a rank needs a half: the other half is not read."""
    tensors = {("o_proj", "weight"): torch.randn(24, 32768)}
    path, _ = save_all_ranks(tmp_path, tensors, Grid(1, 1, 1))
    slices = empty_slices(tensors, Grid(2), 1)
    state = load(path, slices)
    assert_equal(slices, slices_of(tensors, Grid(2), 1))
    assert state.bytes_read == state.bytes_needed == slices[0].data.nbytes


def load_short_columns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[LoadedState, int]:
    """The second half of 2000 rows of 64 bytes, in panels of 16 KiB; returns how many calls read."""
    monkeypatch.setattr("checkpoint.read.BUFFER_BYTES", 1 << 14)
    monkeypatch.setattr("checkpoint.read.TASK_BYTES", 1 << 14)
    tensors = {("o_proj", "weight"): torch.randn(2000, 16)}
    path, _ = save_all_ranks(folder, tensors, Grid(1, 1, 1))
    calls = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: calls.append(1) or preadv(*args))
    slices = empty_slices(tensors, Grid(2), 1)
    state = load(path, slices)
    assert_equal(slices, slices_of(tensors, Grid(2), 1))
    return state, len(calls)


def test_short_column_runs_are_copied_from_a_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, calls = load_short_columns(tmp_path, monkeypatch)
    assert calls == 0
    assert state.bytes_read == state.bytes_needed


def test_where_files_cannot_be_mapped_short_gaps_are_read_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("No such device")

    monkeypatch.setattr("checkpoint.read.mmap.mmap", refuse)
    state, calls = load_short_columns(tmp_path, monkeypatch)
    assert calls == 8, "128 kB in panels of at most 16 KiB"
    assert state.bytes_read < 2 * state.bytes_needed


def test_columns_that_start_at_an_odd_byte(tmp_path: Path) -> None:
    """Files of other trainers need not align their numbers."""
    whole = torch.randn(300, 16)
    (tmp_path / "f").write_bytes(b"\0" * 4099 + whole.numpy().tobytes())
    piece = Piece("f", 4099, "float32", Box((0, 0), (300, 16)))
    data = torch.empty(300 * 5)
    copies = plan(LogicalTensor("w", "weight", (300, 16), "float32", (piece,)), [(0, Box((0, 3), (300, 5)))])
    assert not read_copies(tmp_path, copies, [data]).problems
    assert torch.equal(data, whole[:, 3:8].reshape(-1))


def test_columns_of_a_file_that_is_too_short_are_a_problem_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(300 * 64 - 4096))
    piece = Piece("f", 0, "float32", Box((0, 0), (300, 16)))
    copies = plan(LogicalTensor("w", "weight", (300, 16), "float32", (piece,)), [(0, Box((0, 3), (300, 5)))])
    (problem,) = read_copies(tmp_path, copies, [torch.empty(300 * 5)]).problems
    assert "ends at byte 15104, where the manifest expects" in problem


def test_of_a_whole_weight_each_of_eight_tensor_ranks_reads_its_eighth(tmp_path: Path) -> None:
    """Columns: runs of 7168 bytes, which are short, with gaps of 50176, which are not."""
    tensors = {("down_proj", "weight"): torch.randn(16, 28672).bfloat16()}
    path, _ = save_all_ranks(tmp_path, tensors, Grid())
    for rank in (0, 3, 7):
        slices = empty_slices(tensors, Grid(8), rank)
        state = load(path, slices, rank=rank)
        assert_equal(slices, slices_of(tensors, Grid(8), rank))
        assert state.bytes_read == state.bytes_needed == tensors["down_proj", "weight"].nbytes // 8


def test_rows_of_experts_and_columns_of_these_at_once(tmp_path: Path) -> None:
    """Of each of 6 experts 40 rows of 65536 are needed, of each row of 32 bytes a half."""
    whole = torch.randn(6, 64 * 1024, 8)
    path, _ = save_all_ranks(tmp_path, {("experts", "weight"): whole}, Grid())
    offset, size = (0, 100, 4), (6, 40, 4)
    data = torch.empty(6 * 40 * 4)
    wanted = TensorSlice("experts", "weight", tuple(whole.shape), offset, size, data, replicas=(0,))
    state = load(path, [wanted])
    assert torch.equal(data, whole[:, 100:140, 4:].reshape(-1))
    assert state.bytes_read == state.bytes_needed == 6 * 40 * 4 * 4


def test_a_piece_larger_than_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint.read.BUFFER_BYTES", 100)
    monkeypatch.setattr("checkpoint.read.TASK_BYTES", 1000)
    tensors = make_tensors(0)
    path, _ = save_all_ranks(tmp_path, tensors, Grid(2, 1, 3))
    slices = empty_slices(tensors, Grid(1, 1, 2), 1)
    load(path, slices)
    assert_equal(slices, slices_of(tensors, Grid(1, 1, 2), 1))


def test_fp32_becomes_bf16_to_nearest_even(tmp_path: Path) -> None:
    """A run in fp32 goes on in bf16: weights are rounded, masters are the fp32 weights."""
    whole = make_tensors(0, torch.float32)
    path, _ = save_all_ranks(tmp_path, whole, Grid(2, 1, 2, dtype=torch.float32))
    expected = dict(whole)
    for name, state in list(whole):
        if state == "weight":
            expected[name, "master"] = whole[name, "weight"]
            expected[name, "weight"] = whole[name, "weight"].to(torch.bfloat16)
    slices = empty_slices(expected, Grid(1, 1, 2), 1)
    state = load(path, slices)
    assert_equal(slices, slices_of(expected, Grid(1, 1, 2), 1))
    assert state.derived == {"master": "weight"}


def test_bf16_goes_on_in_fp32_from_the_masters(tmp_path: Path) -> None:
    whole = make_tensors(0)
    path, _ = save_all_ranks(tmp_path, whole, Grid(2, 1, 2))
    expected = {key: tensor for key, tensor in whole.items() if key[1].startswith("exp")}
    expected |= {(name, "weight"): whole[name, "master"] for name, state in whole if state == "master"}
    slices = empty_slices(expected, Grid(1, 1, 2), 1)
    state = load(path, slices)
    assert_equal(slices, slices_of(expected, Grid(1, 1, 2), 1))
    assert state.derived == {"weight": "master"}


def test_weights_only_leaves_the_moments_alone(tmp_path: Path) -> None:
    whole = make_tensors(0)
    path, _ = save_all_ranks(tmp_path, whole, Grid(2, 1, 2))
    slices = empty_slices(whole, Grid(), 0)
    state = load(path, slices, weights_only=True)
    assert state.fresh == ("exp_avg", "exp_avg_sq")
    for piece, saved in zip(slices, slices_of(whole, Grid(), 0), strict=True):
        expected = saved.data if piece.state in ("weight", "master") else torch.full_like(saved.data, 7)
        assert torch.equal(piece.data, expected)


def test_a_transposed_piece_of_a_foreign_file_is_read_by_its_strides(tmp_path: Path) -> None:
    from dataclasses import replace

    from tests.checkpoint.models import rewrite

    whole = {("o_proj", "weight"): torch.randn(30, 20)}
    path, manifest = save_all_ranks(tmp_path, whole, Grid())
    tensor = manifest.tensors[0]
    piece = replace(tensor.pieces[0], box=tensor.pieces[0].box._replace(size=(20, 30)), strides=(1, 20))
    rewrite(path, replace(manifest, tensors=(replace(tensor, shape=(20, 30), pieces=(piece,)),)))
    turned = {("o_proj", "weight"): whole["o_proj", "weight"].t().contiguous()}
    for grid in (Grid(), Grid(2), Grid(1, 1, 3, True)):
        slices = empty_slices(turned, grid, grid.world_size - 1)
        load(path, slices)
        assert_equal(slices, slices_of(turned, grid, grid.world_size - 1))
