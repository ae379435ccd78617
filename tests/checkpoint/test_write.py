"""What a rank writes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from checkpoint.manifest import ITEM_SIZES
from checkpoint.write import HostCopy, share_out, write_rank_file
from parallel.slices import TensorSlice
from tests.checkpoint.models import Grid, assert_equal, make_tensors, slices_of

GRIDS = [Grid(2, 1, 2), Grid(1, 2, 3), Grid(2, 2, 2, zero=False), Grid(4, 1, 1)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_of_the_holders_of_a_box_one_writes_it(grid: Grid) -> None:
    tensors = make_tensors(0)
    held: set[tuple[object, ...]] = set()
    written: Counter[tuple[object, ...]] = Counter()
    for rank in range(grid.world_size):
        slices = slices_of(tensors, grid, rank)
        held |= {(s.name, s.state, s.offset, s.size) for s in slices if s.data.numel()}
        written.update((s.name, s.state, s.offset, s.size) for s in share_out(slices, rank))
    assert set(written) == held
    assert set(written.values()) == {1}


def test_replicas_share_the_bytes_evenly() -> None:
    """Largest first, to the least loaded: apart by at most the largest piece."""
    grid = Grid(1, 1, 4, zero=False)
    tensors = make_tensors(0)
    slices = slices_of(tensors, grid, 0)
    loads = [sum(s.data.nbytes for s in share_out(slices_of(tensors, grid, r), r)) for r in range(4)]
    assert sum(loads) == sum(s.data.nbytes for s in slices)
    assert max(loads) - min(loads) <= max(s.data.nbytes for s in slices)


def test_the_order_of_the_slices_does_not_matter() -> None:
    grid = Grid(1, 1, 3, zero=False)
    slices = slices_of(make_tensors(0), grid, 1)
    names = {(s.name, s.state) for s in share_out(slices, 1)}
    assert {(s.name, s.state) for s in share_out(slices[::-1], 1)} == names


def test_the_file_is_safetensors_and_its_pieces_are_aligned(tmp_path: Path) -> None:
    slices = slices_of(make_tensors(0), Grid(2, 1, 3), 1)
    path = tmp_path / "rank-00001.safetensors"
    written = write_rank_file(path, slices, {"rng": b"abc"}, rank=1, step=5, world_size=6)
    assert path.stat().st_size == written.num_bytes
    for tensor in written.manifest.tensors:
        assert tensor.pieces[0].start % ITEM_SIZES[tensor.dtype] == 0
    with safe_open(str(path), "pt") as file:
        assert len(file.keys()) == len([s for s in slices if s.data.numel()]) + 1
        for piece in slices:
            found = file.get_tensor(f"{piece.name}:{piece.state}{list(piece.offset)}")
            assert found.shape == piece.size
            assert torch.equal(found.reshape(-1), piece.data)
        assert bytes(file.get_tensor("rank_state:rng").tolist()) == b"abc"


def test_the_host_copy_does_not_follow_the_training() -> None:
    slices = slices_of(make_tensors(0), Grid(), 0)
    copy = HostCopy()
    copies = copy.take(slices)
    for piece in slices:
        piece.data.zero_()
    expected = {(s.name, s.state): s for s in slices_of(make_tensors(0), Grid(), 0)}
    assert_equal(copies, [expected[s.name, s.state] for s in copies])
    memory = copies[0].data.untyped_storage().data_ptr()
    assert copy.take(slices)[0].data.untyped_storage().data_ptr() == memory, "the memory is kept"


def test_every_dtype_has_a_file_format(tmp_path: Path) -> None:
    slices = [
        TensorSlice(
            name,
            "weight",
            (4,),
            (0,),
            (4,),
            torch.zeros(4, dtype=getattr(torch, name)),
            replicas=(0,),
        )
        for name in ITEM_SIZES
    ]
    write_rank_file(tmp_path / "a.safetensors", slices, {}, rank=0, step=0, world_size=1)
    with safe_open(str(tmp_path / "a.safetensors"), "pt") as file:
        for name in ITEM_SIZES:
            assert file.get_tensor(f"{name}:weight[0]").dtype == getattr(torch, name)
